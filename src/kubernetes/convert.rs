//! From a container of the Kraken ImageAPI to the objects that run the same in a cluster: a PersistentVolume with the container's
//! mount, a claim for it, and a Pod that runs the container's command with it as its root.

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::spec::policy::Policy;
use crate::spec::{MOUNT_SPEC, SpecError, json};

/// Where the pod sees the image.
const MOUNT_PATH: &str = "/image";

/// Where Debian and its like have programs. The driver's container image has none of these directories, and says so in its own PATH.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// systemd gives each service 90 seconds to stop; Kubernetes gives a pod 30.
const SYSTEMD_GRACE: i64 = 120;

/// What the container does not say.
pub struct Surroundings<'a> {
    pub driver_name: &'a str,
    pub namespace: &'a str,
    /// The driver's, whose `enter` makes the volume the command's root.
    pub container_image: &'a str,
}

/// The objects, and what of the container they do not show.
#[derive(Debug)]
pub struct Converted {
    /// YAML, ready for `kubectl apply`.
    pub documents: String,
    pub notes: Vec<String>,
}

/// A container of the ImageAPI, version 1 (its `swagger.yaml`).
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ImageApiContainer<'a> {
    name: Option<String>,
    command: String,
    #[serde(borrow)]
    mount: &'a RawValue,
    #[serde(default)]
    systemd: bool,
    state: Option<String>,
    namespaces: Option<Value>,
    // What the API adds when it is asked.
    #[serde(rename = "id")]
    _id: Option<Value>,
    #[serde(rename = "logfile")]
    _logfile: Option<Value>,
    #[serde(rename = "refs")]
    _refs: Option<Value>,
}

/// Reads the JSON of a container and writes the objects. The mount is checked as a volume with it would be, and taken over as it is.
pub fn convert(text: &str, policy: &Policy, surroundings: &Surroundings) -> Result<Converted, SpecError> {
    let invalid = |message: String| SpecError::invalid("container", "", message);
    let container: ImageApiContainer =
        serde_json::from_str(text).map_err(|error| invalid(format!("no container of the ImageAPI: {error}")))?;
    let parsed = json::parse(container.mount.get())?;
    let mut notes = parsed.warnings().to_vec();
    let mount = parsed.allowed_by(policy, Some(surroundings.namespace))?;
    let command = shlex::split(&container.command)
        .filter(|words| !words.is_empty())
        .ok_or_else(|| invalid("command: is empty, or has a quote without its end".into()))?;
    let spec: Value = serde_json::from_str(container.mount.get()).map_err(|error| invalid(error.to_string()))?;

    notes.push(
        "command: the pod has the capability SYS_ADMIN to make the image its root, and the command has not; hooks, probes and 'kubectl exec' \
         have it. Pod Security Standards allow that in a namespace of the level privileged: trust who made the image as you trust who makes \
         such pods"
            .into(),
    );
    if container.systemd {
        notes.push(
            "systemd: the pod is stopped by 'systemctl poweroff' of the image, as systemd does not end at SIGTERM"
                .into(),
        );
    }
    if container.state.as_deref() == Some("created") {
        notes.push("state: a pod runs as soon as it is created".into());
    }
    if container.namespaces.is_some() {
        notes.push("namespaces: a pod has all of its own".into());
    }
    let objects = Objects {
        name: label(container.name.as_deref().unwrap_or_default()),
        mode: if mount.is_writable() { "ReadWriteMany" } else { "ReadOnlyMany" },
        // Pretty, because it is for people to read on.
        spec: format!("{spec:#}\n"),
        command,
        systemd: container.systemd,
        surroundings,
    };
    let documents = objects.yaml().map_err(|error| invalid(format!("write YAML: {error}")))?;
    Ok(Converted { documents, notes })
}

struct Objects<'a> {
    name: String,
    mode: &'static str,
    spec: String,
    command: Vec<String>,
    systemd: bool,
    surroundings: &'a Surroundings<'a>,
}

impl Objects<'_> {
    fn yaml(&self) -> Result<String, serde_saphyr::ser::Error> {
        let documents = [self.volume(), self.claim(), self.pod()].each_ref().map(serde_saphyr::to_string);
        Ok(documents.into_iter().collect::<Result<Vec<_>, _>>()?.join("---\n"))
    }

    fn volume(&self) -> Value {
        let (driver, namespace) = (self.surroundings.driver_name, self.surroundings.namespace);
        json!({
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": self.name},
            "spec": {
                "accessModes": [self.mode],
                "capacity": {"storage": SIZE},
                "claimRef": {"name": self.name, "namespace": namespace},
                "csi": {
                    "driver": driver,
                    "volumeAttributes": {MOUNT_SPEC: self.spec},
                    "volumeHandle": format!("{namespace}/{}", self.name),
                },
                "persistentVolumeReclaimPolicy": "Retain",
                "storageClassName": "",
            },
        })
    }

    fn claim(&self) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": self.metadata(),
            "spec": {
                "accessModes": [self.mode],
                "resources": {"requests": {"storage": SIZE}},
                "storageClassName": "",
                "volumeName": self.name,
            },
        })
    }

    fn pod(&self) -> Value {
        let mut spec = json!({
            "containers": [self.container()],
            "restartPolicy": "Never",
            "volumes": [{"name": "image", "persistentVolumeClaim": {"claimName": self.name}}],
        });
        if self.systemd {
            spec["terminationGracePeriodSeconds"] = SYSTEMD_GRACE.into();
        }
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": self.metadata(), "spec": spec})
    }

    fn metadata(&self) -> Value {
        json!({"name": self.name, "namespace": self.surroundings.namespace})
    }

    fn container(&self) -> Value {
        let enter = ["/csi-driver-squashfs", "enter"].into_iter().chain(self.systemd.then_some("--systemd"));
        let enter = enter.chain([MOUNT_PATH, "--"]).map(str::to_owned);
        // Kubernetes replaces $(NAME) in a command, and takes $$ for a dollar.
        let command = self.command.iter().map(|word| word.replace('$', "$$"));
        let mut container = json!({
            "name": self.name,
            "image": self.surroundings.container_image,
            "command": enter.chain(command).collect::<Vec<_>>(),
            "env": [{"name": "PATH", "value": PATH}],
            // What `enter` needs, which gives the first capability up. The runtime's seccomp profile lets who has it mount; its AppArmor
            // profile nobody.
            "securityContext": {
                "appArmorProfile": {"type": "Unconfined"},
                "capabilities": {"add": MOUNTING},
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "volumeMounts": [{"name": "image", "mountPath": MOUNT_PATH}],
        });
        if self.systemd {
            // In place of the SIGTERM by which Kubernetes stops a container, and which tells systemd to start itself anew.
            container["lifecycle"] = json!({"preStop": {"exec": {"command": ["systemctl", "poweroff"]}}});
        }
        container
    }
}

/// The capabilities to mount, to give that up, and to change the root; a runtime may give none of them by itself.
const MOUNTING: [&str; 3] = ["SYS_ADMIN", "SETPCAP", "SYS_CHROOT"];

/// Kubernetes wants one; the image has the size it has.
const SIZE: &str = "1Gi";

/// A name that every object and container may have (RFC 1123 label): `image.sqsh` becomes `image-sqsh`.
fn label(name: &str) -> String {
    let letter = |letter: char| if letter.is_ascii_alphanumeric() { letter.to_ascii_lowercase() } else { '-' };
    let name: String = name.chars().map(letter).collect::<String>().trim_matches('-').chars().take(63).collect();
    let name = name.trim_end_matches('-');
    if name.is_empty() { "container".into() } else { name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{Container, PersistentVolume, PersistentVolumeClaim, Pod};
    use serde::Serialize;
    use serde::de::DeserializeOwned;

    const SURROUNDINGS: Surroundings =
        Surroundings { driver_name: "squashfs.csi.dev", namespace: "default", container_image: "driver" };

    fn container(fields: &str) -> String {
        let mount = include_str!("../spec/testdata/nfs-loopback.json");
        format!(r#"{{"command": "/sbin/init --name 'a b'", "mount": {mount}{fields}}}"#)
    }

    /// As the API server reads it, which has each field by the name that it has here.
    fn object<T: DeserializeOwned + Serialize>(document: &str) -> T {
        let value: Value = serde_saphyr::from_str(document).unwrap();
        let object: T = serde_json::from_value(value.clone()).unwrap();
        assert_eq!(serde_json::to_value(&object).unwrap(), value);
        object
    }

    #[test]
    fn the_container_of_the_image_api_becomes_a_volume_a_claim_and_a_pod() {
        let text = container(r#", "name": "image.sqsh", "state": "running", "systemd": true"#);
        let Converted { documents, notes } = convert(&text, &Policy::default(), &SURROUNDINGS).unwrap();
        assert_eq!(notes.len(), 2, "{notes:?}");
        let [volume, claim, pod] = &documents.split("---\n").collect::<Vec<_>>()[..] else { panic!("{documents}") };
        let (volume, claim): (PersistentVolume, PersistentVolumeClaim) = (object(volume), object(claim));
        let pod: Pod = object(pod);
        let attributes = volume.spec.unwrap().csi.unwrap().volume_attributes.unwrap();
        let given: Value = serde_json::from_str(include_str!("../spec/testdata/nfs-loopback.json")).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&attributes["mountSpec"]).unwrap(), given);
        assert_eq!(claim.spec.unwrap().access_modes.unwrap(), ["ReadWriteMany"]);
        let spec = pod.spec.unwrap();
        let container = &spec.containers[0];
        let enter = ["/csi-driver-squashfs", "enter", "--systemd", "/image", "--"];
        let command = container.command.as_ref().unwrap();
        assert_eq!(
            (&command[..5], &command[5..]),
            (&enter.map(str::to_owned)[..], &["/sbin/init", "--name", "a b"].map(str::to_owned)[..])
        );
        assert_eq!((container.name.as_str(), container.image.as_deref()), ("image-sqsh", Some("driver")));
        assert_eq!(spec.termination_grace_period_seconds, Some(SYSTEMD_GRACE));
        let stop = container.lifecycle.as_ref().unwrap().pre_stop.as_ref().unwrap().exec.as_ref().unwrap();
        assert_eq!(stop.command.as_ref().unwrap()[..], ["systemctl", "poweroff"]);
    }

    fn container_of(text: &str) -> Container {
        let documents = convert(text, &Policy::default(), &SURROUNDINGS).unwrap().documents;
        let pod: Pod = object(documents.split("---\n").last().unwrap());
        pod.spec.unwrap().containers.remove(0)
    }

    #[test]
    fn no_pod_is_privileged_and_one_without_systemd_ends_as_others_do() {
        for (fields, stopped) in [(r#", "systemd": true"#, true), ("", false)] {
            let container = container_of(&self::container(fields));
            assert_eq!(container.lifecycle.is_some(), stopped);
            let security = container.security_context.unwrap();
            assert_eq!(security.privileged, None);
            assert_eq!(security.capabilities.unwrap().add.unwrap(), MOUNTING);
            assert_eq!(security.seccomp_profile.unwrap().type_, "RuntimeDefault");
        }
    }

    #[test]
    fn kubernetes_replaces_nothing_in_a_command() {
        let container = container_of(&container("").replace("/sbin/init --name 'a b'", "/bin/sh -c 'echo $$ $(HOME)'"));
        assert_eq!(container.command.unwrap().last().unwrap(), "echo $$$$ $$(HOME)");
    }

    #[test]
    fn several_servers_of_an_image_stay_several() {
        let text = container("").replace("192.168.3.253", "a, b");
        let Converted { documents, .. } = convert(&text, &Policy::default(), &SURROUNDINGS).unwrap();
        let volume: PersistentVolume = object(documents.split("---\n").next().unwrap());
        let attributes = volume.spec.unwrap().csi.unwrap().volume_attributes.unwrap();
        let read = json::parse(&attributes[MOUNT_SPEC]).unwrap();
        assert_eq!(read.mount().sources(), ["image.sqsh (squashfs) of a,b:/images (nfs 4.2)"]);
        let one = Policy::parse("servers: [{host: a}]").unwrap();
        assert!(convert(&text, &one, &SURROUNDINGS).unwrap_err().to_string().contains("server \"b\""));
    }

    #[test]
    fn what_is_no_container_is_refused() {
        for (text, message) in [
            ("{}", "missing field `command`"),
            (&container(r#", "comand": "a""#), "unknown field `comand`"),
            (r#"{"command": "'a", "mount": {"kind": "nfs", "nfs": {"host": "a", "path": "/b"}}}"#, "command: "),
            (r#"{"command": "a", "mount": {"kind": "nfs", "nfs": {"host": "a"}}}"#, "mountSpec/nfs"),
        ] {
            let error = convert(text, &Policy::default(), &SURROUNDINGS).unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
        }
    }

    #[test]
    fn every_name_becomes_a_label() {
        for (name, expected) in [("image.sqsh", "image-sqsh"), ("", "container"), ("-Ä_", "container"), ("A-b-", "a-b")]
        {
            assert_eq!(label(name), expected);
        }
        assert_eq!(label(&format!("{}-{}", "a".repeat(62), "b")), "a".repeat(62));
    }
}
