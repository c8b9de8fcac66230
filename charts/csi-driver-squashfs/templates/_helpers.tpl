{{/* The start of all names: short enough for "-controller" and for what Kubernetes appends to the names of pods. */}}
{{- define "squashfs.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* What selects the pods of a component: (dict "root" $ "component" "node"). Not to be changed by an upgrade. */}}
{{- define "squashfs.selectorLabels" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{/* The labels of an object: (dict "root" $), with "component" for what belongs to one, and "extra" labels of the user. */}}
{{- define "squashfs.labels" -}}
{{- $selector := include "squashfs.selectorLabels" . | fromYaml -}}
{{- $common := dict
  "helm.sh/chart" (printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-")
  "app.kubernetes.io/version" .root.Chart.AppVersion
  "app.kubernetes.io/part-of" "csi-driver-squashfs"
  "app.kubernetes.io/managed-by" .root.Release.Service -}}
{{- merge (dict) $selector (.extra | default dict) .root.Values.customLabels $common | toYaml -}}
{{- end -}}

{{/* An image, (dict "root" $ "image" .Values.image.driver), from the one registry if there is one. */}}
{{- define "squashfs.image" -}}
{{- $repository := .image.repository -}}
{{- with .root.Values.image.registry -}}
{{- $parts := splitList "/" $repository -}}
{{- if and (gt (len $parts) 1) (regexMatch "[.:]|^localhost$" (first $parts)) -}}
{{- $repository = rest $parts | join "/" -}}
{{- end -}}
{{- $repository = printf "%s/%s" (trimSuffix "/" .) $repository -}}
{{- end -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (.image.tag | default .root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "squashfs.serviceAccount.node" -}}
{{- .Values.serviceAccount.node | default (ternary (printf "%s-node" (include "squashfs.fullname" .)) "default" .Values.serviceAccount.create) -}}
{{- end -}}

{{- define "squashfs.serviceAccount.controller" -}}
{{- if not (or .Values.serviceAccount.create .Values.serviceAccount.controller) -}}
{{- fail "serviceAccount.create is false: name the controller's in serviceAccount.controller, as the role is not for every pod of the namespace" -}}
{{- end -}}
{{- .Values.serviceAccount.controller | default (printf "%s-controller" (include "squashfs.fullname" .)) -}}
{{- end -}}

{{/* The directory of the driver's socket, records and scratch layers. */}}
{{- define "squashfs.pluginDir" -}}
{{- $directory := printf "%s/plugins/%s" (trimSuffix "/" .Values.kubeletDir) .Values.driver.name -}}
{{- $longest := max (len (printf "%s/csi.sock" $directory)) (len (printf "%s/plugins_registry/%s@reg.sock" .Values.kubeletDir .Values.driver.name)) -}}
{{- if gt $longest 107 -}}
{{- fail (printf "kubeletDir and driver.name make a socket's path of %d bytes, and Linux takes 107 (unix(7)): choose a shorter driver.name" $longest) -}}
{{- end -}}
{{- $directory -}}
{{- end -}}

{{/* ADDRESS:PORT, with the brackets of IPv6: (dict "address" "::" "port" 1). */}}
{{- define "squashfs.hostPort" -}}
{{- ternary (printf "[%s]:%v" .address .port) (printf "%s:%v" .address .port) (contains ":" .address) -}}
{{- end -}}

{{/* Where a node serves health: its network is the kubelet's, or one of a pod that the kubelet enters from outside. */}}
{{- define "squashfs.nodeHealthAddress" -}}
{{- ternary "127.0.0.1" "::" .Values.node.hostNetwork -}}
{{- end -}}

{{/* Not empty where metrics.address is one of the loopback interface. */}}
{{- define "squashfs.metricsOnLoopback" -}}
{{- if regexMatch "(?i)^(127[.]|[0:]*:0*1$|::ffff:127[.])" .Values.metrics.address -}}
true
{{- end -}}
{{- end -}}

{{/* The arguments that node and controller share. */}}
{{- define "squashfs.commonArgs" -}}
- --log-level={{ .Values.logLevel }}
- --log-format={{ .Values.logFormat }}
{{- end -}}

{{/* What `status` and `doctor`, run in the container, must know too. */}}
{{- define "squashfs.commonEnv" -}}
- name: DRIVER_NAME
  value: {{ .Values.driver.name }}
{{- if .Values.policy }}
- name: POLICY
  value: /etc/csi-driver-squashfs/policy.yaml
{{- end }}
{{- end -}}

{{/* The policy is read once, at the start: another policy is another pod. The same holds for the controller's template of Jobs. */}}
{{- define "squashfs.podAnnotations" -}}
{{- $annotations := deepCopy (index .root.Values .component "podAnnotations") -}}
{{- with .root.Values.policy -}}
{{- $_ := set $annotations "checksum/policy" (toYaml . | sha256sum) -}}
{{- end -}}
{{- if and .root.Values.builder.enabled (eq .component "controller") -}}
{{- $_ := set $annotations "checksum/build-job" (include "squashfs.buildJob" .root | sha256sum) -}}
{{- end -}}
{{- with $annotations -}}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end -}}
{{- end -}}

{{/* Kubernetes refuses a privileged container that may not escalate its privileges. */}}
{{- define "squashfs.securityContext" -}}
{{- ternary (omit . "allowPrivilegeEscalation") . (.privileged | default false) | toYaml -}}
{{- end -}}

{{/* The job label that Prometheus gives to what a PodMonitor finds. */}}
{{- define "squashfs.job" -}}
{{- .Values.metrics.job | default (printf "%s/%s" .Release.Namespace (include "squashfs.fullname" .)) -}}
{{- end -}}

{{- define "squashfs.needsMetrics" -}}
{{- if not .root.Values.metrics.enabled -}}
{{- fail (printf "metrics.%s.enabled needs metrics.enabled" .value) -}}
{{- end -}}
{{- end -}}

{{/* Where the nodes keep copies of images; empty for the driver's own directory, or where they keep none. */}}
{{- define "squashfs.cacheDirectory" -}}
{{- if .Values.node.cache.quota }}{{ .Values.node.cache.directory }}{{ end }}
{{- end }}

{{/* A quantity, in bytes. */}}
{{- define "squashfs.bytes" -}}
{{- $text := ternary (printf "%.0f" .) (toString .) (kindIs "float64" .) -}}
{{- $number := regexFind "^[0-9.]+" $text -}}
{{- $unit := trimPrefix $number $text -}}
{{- $factors := dict "" 1 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- if not (hasKey $factors $unit) -}}
{{- fail (printf "%v is no quantity that can be added to another: write it as 64Mi" .) -}}
{{- end -}}
{{- mulf (float64 $number) (get $factors $unit) | int64 -}}
{{- end -}}

{{/* The Job that makes an image, but for its name, what is to be made, and the share. */}}
{{- define "squashfs.buildJob" -}}
{{- $volumes := list -}}
{{- range .Values.builder.extraVolumes }}{{ $volumes = append $volumes .name }}{{ end -}}
apiVersion: batch/v1
kind: Job
metadata:
  namespace: {{ .Values.builder.namespace }}
  labels:
    {{- include "squashfs.labels" (dict "root" $ "component" "builder") | nindent 4 }}
spec:
  backoffLimit: {{ .Values.builder.backoffLimit }}
  activeDeadlineSeconds: {{ .Values.builder.activeDeadlineSeconds }}
  ttlSecondsAfterFinished: {{ .Values.builder.ttlSecondsAfterFinished }}
  template:
    metadata:
      labels:
        {{- include "squashfs.labels" (dict "root" $ "component" "builder" "extra" .Values.builder.podLabels) | nindent 8 }}
      {{- with .Values.builder.podAnnotations }}
      annotations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    spec:
      restartPolicy: Never
      {{- with .Values.serviceAccount.builder }}
      serviceAccountName: {{ . }}
      {{- end }}
      automountServiceAccountToken: false
      {{- with .Values.builder.priorityClassName }}
      priorityClassName: {{ . }}
      {{- end }}
      nodeSelector:
        {{- merge (dict "kubernetes.io/os" "linux") .Values.builder.nodeSelector | toYaml | nindent 8 }}
      {{- with .Values.builder.affinity }}
      affinity:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .Values.builder.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .Values.imagePullSecrets }}
      imagePullSecrets:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      containers:
        - name: build
          image: {{ include "squashfs.image" (dict "root" $ "image" .Values.image.builder) }}
          imagePullPolicy: {{ .Values.image.builder.pullPolicy }}
          # The reason of a failure becomes an event of the claim.
          terminationMessagePolicy: FallbackToLogsOnError
          args:
            {{- if .Values.builder.registrySecret }}
            - --authfile=/etc/registry/.dockerconfigjson
            {{- end }}
            {{- if .Values.builder.signingSecret }}
            - --sign-key=/etc/signing/minisign.key
            {{- end }}
            {{- with .Values.builder.extraArgs }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          {{- with .Values.builder.extraEnv }}
          env:
            {{- toYaml . | nindent 12 }}
          {{- end }}
          securityContext:
            {{- include "squashfs.securityContext" .Values.builder.securityContext | nindent 12 }}
          resources:
            {{- toYaml .Values.builder.resources | nindent 12 }}
          volumeMounts:
            - name: work
              mountPath: /tmp
            {{- if .Values.builder.registrySecret }}
            - name: registry
              mountPath: /etc/registry
              readOnly: true
            {{- end }}
            {{- if .Values.builder.signingSecret }}
            - name: signing
              mountPath: /etc/signing
              readOnly: true
            {{- end }}
            {{- with .Values.builder.extraVolumeMounts }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
      volumes:
        {{- if not (has "work" $volumes) }}
        - name: work
          emptyDir:
            sizeLimit: {{ .Values.builder.workSize }}
        {{- end }}
        {{- with .Values.builder.registrySecret }}
        - name: registry
          secret:
            secretName: {{ . }}
        {{- end }}
        {{- with .Values.builder.signingSecret }}
        - name: signing
          secret:
            secretName: {{ . }}
        {{- end }}
        {{- with .Values.builder.extraVolumes }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
{{- end -}}

{{/* What is read ahead on a node is of the memory of the driver's container. */}}
{{- define "squashfs.nodeResources" -}}
{{- $resources := deepCopy (.Values.node.resources | default dict) -}}
{{- $limit := dig "limits" "memory" "" $resources -}}
{{- $budget := dig "prefetch" "budget" "" .Values.node -}}
{{- if and $limit $budget -}}
{{- $sum := add (include "squashfs.bytes" $limit) (include "squashfs.bytes" $budget) -}}
{{- $_ := set $resources.limits "memory" (toString $sum) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}
