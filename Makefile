# The habits of this project; `make help` lists them.

# A fresh machine has a toolchain and sudo or root; everything else is installed here.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# One static binary, with no path of this machine in it: what is tested is what is shipped.
CARGO_BUILD_TARGET ?= $(shell rustc -vV | sed -n 's/^host: //p')
RUSTFLAGS = -C target-feature=+crt-static --remap-path-prefix=$(CURDIR)=/src \
	--remap-path-prefix=$(or $(CARGO_HOME),$(HOME)/.cargo)=/cargo
export CARGO_BUILD_TARGET RUSTFLAGS
BUILT = $(or $(CARGO_TARGET_DIR),target)/$(CARGO_BUILD_TARGET)/release
# For CARGO_BUILD_TARGET=aarch64-unknown-linux-gnu on another machine: the linker of Debian's gcc-aarch64-linux-gnu.
ifneq ($(shell uname -m),aarch64)
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER ?= aarch64-linux-gnu-gcc
endif
# A CSI client for the demo and the benchmark.
CLIENT = $(BUILT)/examples/csi
KERNEL ?= 6.12
# The binary of an integration test, as cargo names it.
test_binary = $$(cargo test --release --locked --no-run --test $(1) --message-format=json | jq -r 'select(.profile.test and .target.name == "$(1)").executable')
VM = $(SUDO) e2e/vm run --kernel $(KERNEL) --bin $(BUILT)/csi-driver-squashfs

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## build the release binary
	cargo build --release --locked

.PHONY: client
client:
	cargo build --release --locked --bins --example csi

# The same bytes from the same program: nothing of the time or the machine gets into the archive's layers.
IMAGE = ghcr.io/csi-driver-squashfs/csi-driver-squashfs
ARCHIVE = target/image/csi-driver-squashfs-$(ARCH).tar
ARCH = $(if $(filter aarch64%,$(CARGO_BUILD_TARGET)),arm64,amd64)
BUILDAH = $(SUDO) buildah --storage-driver vfs --root $(CURDIR)/target/image/storage --runroot $(CURDIR)/target/image/run

.PHONY: image
image: tools ## build the container image, an OCI archive below target/image, without a registry or a daemon
	@# Not by "build", after which tests may have put one with their own features of the same crates in its place.
	cargo build --release --locked
	@$(SUDO) rm -rf target/image && mkdir -p target/image
	version=$$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml); \
	$(BUILDAH) build --quiet --timestamp 0 --arch $(ARCH) --build-arg VERSION=$$version --tag $(IMAGE):$$version \
		--file Containerfile $(BUILT) && \
	$(BUILDAH) push --quiet $(IMAGE):$$version oci-archive:$(ARCHIVE):$(IMAGE):$$version
	@$(SUDO) rm -rf target/image/storage target/image/run
	@ls -l target/image

.PHONY: demo
demo: client ## show the main job on real parts, in a virtual machine
	@$(VM) --copy $(CLIENT) --copy e2e/lib.sh --copy e2e/demo -- /root/demo

.PHONY: test
test: test-unit test-host test-vm test-sanity test-chart test-prometheus test-image test-kubernetes ## run every test: pure logic, this kernel (root), a virtual machine with an NFS server, Kubernetes

.PHONY: test-unit
test-unit: ## run the tests of pure logic; no root needed
	cargo test --release --locked --lib --bins

.PHONY: test-host
test-host: tools ## run the tests that need root and this kernel's loop devices, but no NFS
	$(SUDO) $(call test_binary,host) --include-ignored --test-threads=1

.PHONY: test-vm
test-vm: tools ## run the scenarios in the virtual machine (KERNEL=6.1 for another kernel, FILTER=name for one)
	cargo build --release --locked
	$(VM) --copy $(call test_binary,vm) -- sh -c '/root/vm-* --include-ignored --test-threads=1 $(FILTER)'

.PHONY: test-sanity
test-sanity: target/tools/csi-sanity build ## run the CSI project's own conformance tests in the virtual machine (needs Go)
	$(VM) --copy $< --copy e2e/lib.sh --copy e2e/sanity -- /root/sanity

# Where a target needs Go, it says so. The compiler collects no garbage before it has 2 GiB: that is a fifth of its time.
GO = $(or $(shell command -v go),$(error $@ needs Go 1.26 or newer: https://go.dev/dl))
GO_BUILD = CGO_ENABLED=0 GOGC=off GOMEMLIMIT=2GiB $(GO) build -C $(<D) -trimpath -tags grpcnotrace -ldflags "-s -w $(1)"
# The programs of other projects that tests run, and those that render and check the chart.
PROGRAMS = $(addprefix target/tools/,csi-sanity helm-docs kubeconform kube-score yq)
$(PROGRAMS) &: e2e/programs/go.mod
	$(call GO_BUILD) -o $(CURDIR)/$(@D)/ tool
	touch $(PROGRAMS)

# It is made of the libraries of Kubernetes. Builds at the same time would compile twice what they share.
target/tools/helm: e2e/kubernetes/go.mod | $(PROGRAMS)
	$(call GO_BUILD) -o $(CURDIR)/$@ helm.sh/helm/v4/cmd/helm
	touch $@

# Debian's package would start a server: only the programs are taken from it.
PROMETHEUS = target/tools/prometheus target/tools/promtool
$(PROMETHEUS) &:
	$(SUDO) apt-get -q update
	mkdir -p $(@D) && cd $(@D) && apt-get -q download prometheus && \
		dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x --strip-components=3 ./usr/bin/prometheus ./usr/bin/promtool && \
		rm prometheus_*.deb

target/tools/kubernetes-schemas/complete: charts/tools/schemas | tools
	$< $(@D)

.PHONY: chart
chart: $(PROGRAMS) target/tools/helm ## write what follows from the Helm chart anew: its README.md and the manifests (needs Go)
	PATH=$(CURDIR)/target/tools:$$PATH charts/tools/generate charts/csi-driver-squashfs/README.md manifests/csi-driver-squashfs.yaml

.PHONY: test-chart
test-chart: tools $(PROGRAMS) target/tools/helm $(PROMETHEUS) target/tools/kubernetes-schemas/complete build ## check the Helm chart and the manifests (needs Go; first time: five minutes)
	e2e/chart --driver $(BUILT)/csi-driver-squashfs

.PHONY: test-image
test-image: image ## look into the container image, and make it again
	e2e/image $(ARCHIVE)

.PHONY: test-prometheus
test-prometheus: client target/tools/helm target/tools/yq $(PROMETHEUS) ## run the alerts and the dashboard on a real Prometheus, in the virtual machine (needs Go)
	$(VM) $(addprefix --bin ,target/tools/helm target/tools/yq $(PROMETHEUS)) --copy $(CLIENT) --copy charts/csi-driver-squashfs --copy e2e/prometheus -- /root/prometheus

# A Kubernetes cluster to test with, as static programs; all in one build, as they share most of their packages.
KUBERNETES = $(addprefix target/tools/kubernetes/,csi-provisioner etcd kube-apiserver kube-controller-manager kube-scheduler \
	kubectl kubelet)
# What depends on a version, such as the kubeVersion of a chart, believes what is linked in.
$(KUBERNETES) &: e2e/kubernetes/go.mod | target/tools/helm
	version=$$(awk '$$1 == "k8s.io/kubernetes" { print $$2 }' $<); numbers=$${version#v}; minor=$${numbers#*.}; \
	linked=k8s.io/component-base/version; tools=$$($(GO) list -C $(<D) tool | grep -v ^helm); \
	$(call GO_BUILD,-X $$linked.gitVersion=$$version -X $$linked.gitMajor=$${numbers%%.*} -X $$linked.gitMinor=$${minor%%.*}) \
		-o $(CURDIR)/$(@D)/ $$tools
	mv $(@D)/server $(@D)/etcd
	touch $(KUBERNETES)

.PHONY: programs
programs: $(PROGRAMS) target/tools/helm

.PHONY: kubernetes
kubernetes: $(KUBERNETES) ## build etcd and the parts of Kubernetes that tests run (needs Go; first time: eight minutes and 4 GB)

.PHONY: test-kubernetes
test-kubernetes: kubernetes target/tools/helm build image ## run the driver in a real cluster (needs Go; 20 minutes where the machine is emulated)
	e2e/kubernetes/cluster e2e/kubernetes/controller $(BUILT)/csi-driver-squashfs
	$(VM) --memory 4096 --timeout 3600 $(addprefix --bin ,$(KUBERNETES) target/tools/helm) \
		--copy $(ARCHIVE) --copy charts --copy manifests/examples --copy e2e/lib.sh --copy e2e/kubernetes \
		-- /root/kubernetes/node /root/kubernetes/scenarios $(FILTER)

.PHONY: soak
soak: tools ## run the long tests at full length
	$(SUDO) env SOAK=1 $(call test_binary,host) --include-ignored --test-threads=1

.PHONY: bench
bench: client ## measure against the tools that users would pick, in the virtual machine
	@$(VM) --copy $(CLIENT) --copy e2e/lib.sh --copy e2e/bench -- /root/bench

.PHONY: lint
lint: tools cargo-deny advisories ## check format, lints, licences and advisories, shell scripts
	cargo fmt --check
	cargo clippy --release --locked --all-targets -- -D warnings
	cargo deny --locked check licenses bans sources
	shellcheck -x $$(git grep --untracked -lE '^(#!/bin/(ba)?sh|# shellcheck shell=bash)$$')

# The database comes from a git server that not every network reaches.
.PHONY: advisories
advisories: cargo-deny
	@if answer=$$(timeout 300 cargo deny fetch db 2>&1 </dev/null); then \
		cargo deny --locked check advisories; \
	else \
		printf 'SKIPPED: advisories: the RustSec database cannot be fetched: %s\n' "$$(grep . <<<"$$answer" | tail -n 1)"; \
	fi

.PHONY: schema
schema: ## write the JSON Schema of the mount spec anew
	UPDATE_SCHEMA=1 cargo test --release --locked --lib schema

.PHONY: tools
tools: ## install what the tests and lints need
	@missing=; for tool in mksquashfs:squashfs-tools jq:jq shellcheck:shellcheck buildah:buildah; do \
		command -v "$${tool%:*}" >/dev/null || missing="$$missing $${tool#*:}"; done; \
	if [ -n "$$missing" ]; then \
		$(SUDO) apt-get -q update && $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get -q -y install $$missing; fi

# Without optimization it is there in a fraction of the time, and it has little to do.
.PHONY: cargo-deny
cargo-deny:
	@cargo deny --version >/dev/null 2>&1 || cargo install --debug --locked cargo-deny
