//! From a container of the Kraken ImageAPI to the objects that run the same in a cluster: a PersistentVolume with the container's
//! mount, a claim for it, and a Pod that runs the container's command inside of it.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    CSIPersistentVolumeSource, Container, ObjectReference, PersistentVolume, PersistentVolumeClaim,
    PersistentVolumeClaimSpec, PersistentVolumeClaimVolumeSource, PersistentVolumeSpec, Pod, PodSpec, Volume,
    VolumeMount, VolumeResourceRequirements,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::api::ObjectMeta;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use crate::spec::policy::Policy;
use crate::spec::{MOUNT_SPEC, SpecError, json};

/// Where the pod sees the image.
const MOUNT_PATH: &str = "/image";

/// What the container does not say.
pub struct Surroundings<'a> {
    pub driver_name: &'a str,
    pub namespace: &'a str,
    /// The container image whose `chroot` starts the command.
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

    notes.push(format!("command: it runs in a chroot at {MOUNT_PATH}, without /proc, /dev and the pod's resolv.conf"));
    if container.systemd {
        notes
            .push("systemd: the pod runs the command as any other; systemd itself needs a privileged container".into());
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
    surroundings: &'a Surroundings<'a>,
}

impl Objects<'_> {
    fn yaml(&self) -> Result<String, serde_yaml_ng::Error> {
        let documents = [
            serde_yaml_ng::to_string(&self.volume())?,
            serde_yaml_ng::to_string(&self.claim())?,
            serde_yaml_ng::to_string(&self.pod())?,
        ];
        Ok(documents.join("---\n"))
    }

    fn metadata(&self) -> ObjectMeta {
        let namespace = Some(self.surroundings.namespace.to_owned());
        ObjectMeta { name: Some(self.name.clone()), namespace, ..Default::default() }
    }

    /// Kubernetes wants a size; the image has the size it has.
    fn size() -> Option<BTreeMap<String, Quantity>> {
        Some(BTreeMap::from([("storage".to_owned(), Quantity("1Gi".into()))]))
    }

    fn volume(&self) -> PersistentVolume {
        let csi = CSIPersistentVolumeSource {
            driver: self.surroundings.driver_name.to_owned(),
            volume_handle: format!("{}/{}", self.surroundings.namespace, self.name),
            volume_attributes: Some(BTreeMap::from([(MOUNT_SPEC.to_owned(), self.spec.clone())])),
            ..Default::default()
        };
        let claim = ObjectReference {
            namespace: Some(self.surroundings.namespace.to_owned()),
            name: Some(self.name.clone()),
            ..Default::default()
        };
        let spec = PersistentVolumeSpec {
            access_modes: Some(vec![self.mode.into()]),
            capacity: Self::size(),
            claim_ref: Some(claim),
            csi: Some(csi),
            persistent_volume_reclaim_policy: Some("Retain".into()),
            storage_class_name: Some(String::new()),
            ..Default::default()
        };
        let metadata = ObjectMeta { namespace: None, ..self.metadata() };
        PersistentVolume { metadata, spec: Some(spec), status: None }
    }

    fn claim(&self) -> PersistentVolumeClaim {
        let spec = PersistentVolumeClaimSpec {
            access_modes: Some(vec![self.mode.into()]),
            resources: Some(VolumeResourceRequirements { requests: Self::size(), limits: None }),
            storage_class_name: Some(String::new()),
            volume_name: Some(self.name.clone()),
            ..Default::default()
        };
        PersistentVolumeClaim { metadata: self.metadata(), spec: Some(spec), status: None }
    }

    fn pod(&self) -> Pod {
        let chroot = ["chroot", MOUNT_PATH].map(str::to_owned);
        let mount = VolumeMount { name: "image".into(), mount_path: MOUNT_PATH.into(), ..Default::default() };
        let container = Container {
            name: self.name.clone(),
            image: Some(self.surroundings.container_image.to_owned()),
            command: Some(chroot.into_iter().chain(self.command.iter().cloned()).collect()),
            volume_mounts: Some(vec![mount]),
            ..Default::default()
        };
        let claim = PersistentVolumeClaimVolumeSource { claim_name: self.name.clone(), ..Default::default() };
        let volume = Volume { name: "image".into(), persistent_volume_claim: Some(claim), ..Default::default() };
        let spec = PodSpec {
            containers: vec![container],
            restart_policy: Some("Never".into()),
            volumes: Some(vec![volume]),
            ..Default::default()
        };
        Pod { metadata: self.metadata(), spec: Some(spec), status: None }
    }
}

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

    const SURROUNDINGS: Surroundings =
        Surroundings { driver_name: "squashfs.csi.dev", namespace: "default", container_image: "busybox" };

    fn container(fields: &str) -> String {
        let mount = include_str!("../spec/testdata/nfs-loopback.json");
        format!(r#"{{"command": "/sbin/init --name 'a b'", "mount": {mount}{fields}}}"#)
    }

    #[test]
    fn the_container_of_the_image_api_becomes_a_volume_a_claim_and_a_pod() {
        let text = container(r#", "name": "image.sqsh", "state": "running", "systemd": true"#);
        let Converted { documents, notes } = convert(&text, &Policy::default(), &SURROUNDINGS).unwrap();
        assert_eq!(notes.len(), 2, "{notes:?}");
        let [volume, claim, pod] = &documents.split("---\n").collect::<Vec<_>>()[..] else { panic!("{documents}") };
        let volume: PersistentVolume = serde_yaml_ng::from_str(volume).unwrap();
        let claim: PersistentVolumeClaim = serde_yaml_ng::from_str(claim).unwrap();
        let pod: Pod = serde_yaml_ng::from_str(pod).unwrap();
        let attributes = volume.spec.unwrap().csi.unwrap().volume_attributes.unwrap();
        let given: Value = serde_json::from_str(include_str!("../spec/testdata/nfs-loopback.json")).unwrap();
        assert_eq!(serde_json::from_str::<Value>(&attributes["mountSpec"]).unwrap(), given);
        assert_eq!(claim.spec.unwrap().access_modes.unwrap(), ["ReadWriteMany"]);
        let container = &pod.spec.unwrap().containers[0];
        assert_eq!(container.command.as_ref().unwrap()[2..], ["/sbin/init", "--name", "a b"]);
        assert_eq!(container.name, "image-sqsh");
    }

    #[test]
    fn several_servers_of_an_image_stay_several() {
        let text = container("").replace("192.168.3.253", "a, b");
        let Converted { documents, .. } = convert(&text, &Policy::default(), &SURROUNDINGS).unwrap();
        let volume: PersistentVolume = serde_yaml_ng::from_str(documents.split("---\n").next().unwrap()).unwrap();
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
