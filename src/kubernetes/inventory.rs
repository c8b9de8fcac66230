//! What a cluster has of the driver: its volumes, who uses them, and who else names an image.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet};
use k8s_openapi::api::batch::v1::{CronJob, Job};
use k8s_openapi::api::core::v1::{
    Node, PersistentVolume, PersistentVolumeClaim, Pod, PodTemplate, ReplicationController,
};
use k8s_openapi::api::storage::v1::{CSIDriver, CSINode, StorageClass};
use kube::api::{ApiResource, DynamicObject, ListParams};
use kube::{Api, Resource};
use serde::Serialize;
use serde_json::Value;

use super::api::ApiServer;
use crate::error::Result;
use crate::spec::location::{Location, relative};
use crate::spec::source::Source;
use crate::spec::{parameters, template};

/// How many objects the API server gives at a time.
const PAGE: u32 = 500;

/// All that names images of one driver, at one moment.
#[derive(Clone, Debug, Default)]
pub struct Inventory {
    /// By their names.
    pub volumes: Vec<Volume>,
    pub references: Vec<Reference>,
    /// The nodes of the cluster.
    pub nodes: Vec<ClusterNode>,
    /// Claims of the driver's classes that are not bound.
    pub pending: Vec<String>,
    /// The driver is known to the cluster (CSIDriver): to all, where there are several.
    pub is_installed: bool,
}

impl Inventory {
    /// Who names something that nobody did `before`, if anybody does.
    pub fn names_beside(&self, before: &Inventory) -> Option<&str> {
        let named = |inventory: &Inventory| {
            let locations = inventory.references.iter().flat_map(|reference| reference.locations.iter().flatten());
            locations.cloned().collect::<Vec<_>>()
        };
        let known = named(before);
        let is_new =
            |reference: &&Reference| reference.locations.iter().flatten().any(|location| !known.contains(location));
        self.references.iter().find(is_new).map(|reference| reference.object.as_str())
    }
}

/// A PersistentVolume, or an inline volume of a pod.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Volume {
    pub name: String,
    /// `namespace/name` of the claim that it is bound to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub claim: Option<String>,
    pub images: Vec<String>,
    /// `namespace/name` of those that use it, each with its node, where it has one.
    pub pods: BTreeMap<String, Option<String>>,
}

/// An object that names images, by where they lie.
#[derive(Clone, Debug)]
pub struct Reference {
    /// Its kind and name, as people write it: `PersistentVolume tools`, `Pod team/a`.
    pub object: String,
    /// Or why what it says cannot be read.
    pub locations: std::result::Result<Vec<Location>, String>,
}

/// A node of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterNode {
    pub name: String,
    /// The kubelet there knows the driver.
    pub registered: bool,
    /// How many pods there use volumes of the driver, and how many volumes.
    pub pods: usize,
    pub volumes: usize,
}

/// Looks at the clusters of these contexts of a KUBECONFIG, all together; at the current one, or that of the pod that this process runs in,
/// where there are none. Needs the verb `list`, in all namespaces, of what is listed here.
pub async fn look(driver_name: &str, contexts: &[String]) -> Result<Inventory> {
    if contexts.is_empty() {
        return Inspector(ApiServer::new(None)).look(driver_name).await;
    }
    let mut all = Inventory { is_installed: true, ..Inventory::default() };
    for context in contexts {
        let looked = Inspector(ApiServer::new(Some(context.clone()))).look(driver_name).await;
        let Inventory { volumes, references, nodes, pending, is_installed } =
            looked.map_err(|error| error.about(&format!("context {context}")))?;
        all.volumes.extend(volumes);
        all.references.extend(references);
        all.nodes.extend(nodes);
        all.pending.extend(pending);
        all.is_installed &= is_installed;
    }
    Ok(all)
}

struct Inspector(ApiServer);

impl Inspector {
    async fn look(&self, driver_name: &str) -> Result<Inventory> {
        let mut looking = Looking::new(driver_name);
        looking.drivers(&self.all::<CSIDriver>().await?);
        looking.classes(&self.all::<StorageClass>().await?);
        looking.volumes(&self.all::<PersistentVolume>().await?);
        looking.claims(&self.all::<PersistentVolumeClaim>().await?);
        looking.pods(&self.all::<Pod>().await?);
        looking.templates("Deployment", &self.all::<Deployment>().await?);
        looking.templates("ReplicaSet", &self.all::<ReplicaSet>().await?);
        looking.templates("StatefulSet", &self.all::<StatefulSet>().await?);
        looking.templates("DaemonSet", &self.all::<DaemonSet>().await?);
        looking.templates("ReplicationController", &self.all::<ReplicationController>().await?);
        looking.templates("Job", &self.all::<Job>().await?);
        looking.templates("CronJob", &self.all::<CronJob>().await?);
        looking.templates("PodTemplate", &self.all::<PodTemplate>().await?);
        looking.nodes(&self.all::<Node>().await?, &self.all::<CSINode>().await?);
        Ok(looking.inventory)
    }

    async fn all<K: Resource<DynamicType = ()>>(&self) -> Result<Vec<DynamicObject>> {
        let kind = ApiResource::erase::<K>(&());
        let (what, mut objects, mut page) = (format!("list {}", kind.plural), Vec::new(), ListParams::default());
        page.limit = Some(PAGE);
        loop {
            let list = |client| {
                let (all, page) = (Api::<DynamicObject>::all_with(client, &kind), &page);
                async move { all.list(page).await }
            };
            let list = self.0.ask(&what, list).await?;
            objects.extend(list.items);
            match list.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => page.continue_token = Some(token),
                None => return Ok(objects),
            }
        }
    }
}

/// Puts an inventory together, in the order in which one thing takes another to be understood.
struct Looking<'a> {
    driver_name: &'a str,
    inventory: Inventory,
    classes: BTreeSet<String>,
    /// From a claim's namespace and name to its volume.
    of_claims: BTreeMap<String, usize>,
}

impl<'a> Looking<'a> {
    fn new(driver_name: &'a str) -> Self {
        let (inventory, classes, of_claims) = Default::default();
        Looking { driver_name, inventory, classes, of_claims }
    }

    fn drivers(&mut self, drivers: &[DynamicObject]) {
        self.inventory.is_installed = drivers.iter().any(|driver| name(driver) == self.driver_name);
    }

    fn classes(&mut self, classes: &[DynamicObject]) {
        for class in classes {
            if class.data["provisioner"] != self.driver_name {
                continue;
            }
            self.classes.insert(name(class));
            let locations = template::locations(&strings(&class.data["parameters"]));
            self.refer(format!("StorageClass {}", name(class)), locations.map_err(|error| error.to_string()));
        }
    }

    fn volumes(&mut self, volumes: &[DynamicObject]) {
        for volume in volumes {
            let csi = &volume.data["spec"]["csi"];
            if csi["driver"] != self.driver_name {
                continue;
            }
            let of = &volume.data["spec"]["claimRef"];
            let claim =
                of["namespace"].as_str().zip(of["name"].as_str()).map(|(space, name)| format!("{space}/{name}"));
            let options: Vec<_> = list(&volume.data["spec"]["mountOptions"]).filter_map(Value::as_str).collect();
            let object = format!("PersistentVolume {}", name(volume));
            let images = self.named_by(&object, &csi["volumeAttributes"], &options);
            self.of_claims.extend(claim.clone().map(|claim| (claim, self.inventory.volumes.len())));
            self.inventory.volumes.push(Volume { name: name(volume), claim, images, pods: BTreeMap::new() });
        }
    }

    fn claims(&mut self, claims: &[DynamicObject]) {
        for claim in claims {
            let object = full_name(claim);
            let annotations = claim.metadata.annotations.clone().unwrap_or_default();
            self.annotated(&format!("PersistentVolumeClaim {object}"), |name| {
                annotations.get(name).map(String::as_str)
            });
            let class = claim.data["spec"]["storageClassName"].as_str();
            let is_mine = class.is_some_and(|class| self.classes.contains(class));
            if is_mine && claim.data["status"]["phase"] == "Pending" {
                self.inventory.pending.push(object);
            }
        }
    }

    fn pods(&mut self, pods: &[DynamicObject]) {
        for pod in pods {
            let (object, node) = (full_name(pod), pod.data["spec"]["nodeName"].as_str().map(str::to_owned));
            if matches!(pod.data["status"]["phase"].as_str(), Some("Succeeded" | "Failed")) {
                continue;
            }
            self.template(&format!("Pod {object}"), &pod.data);
            for volume in list(&pod.data["spec"]["volumes"]) {
                let of = volume["name"].as_str().unwrap_or_default();
                let of_pod = || pod.metadata.name.as_ref().map(|name| format!("{name}-{of}"));
                // The claim of a generic ephemeral volume has the names of both.
                let claim = volume["persistentVolumeClaim"]["claimName"].as_str().map(str::to_owned);
                let claim = claim.or_else(|| volume["ephemeral"].is_object().then(of_pod).flatten());
                let claim =
                    claim.map(|claim| format!("{}/{claim}", pod.metadata.namespace.as_deref().unwrap_or_default()));
                if let Some(&at) = claim.and_then(|claim| self.of_claims.get(&claim)).as_ref() {
                    self.inventory.volumes[*at].pods.insert(object.clone(), node.clone());
                }
                if volume["csi"]["driver"] == self.driver_name {
                    let images = images_of(&volume["csi"]["volumeAttributes"], &[]).0;
                    let pods = BTreeMap::from([(object.clone(), node.clone())]);
                    self.inventory.volumes.push(Volume { name: format!("{object}: {of}"), claim: None, images, pods });
                }
            }
        }
    }

    /// What objects of this kind say of pods and claims to be, wherever they say it.
    fn templates(&mut self, kind: &str, objects: &[DynamicObject]) {
        for object in objects {
            let name = format!("{kind} {}", full_name(object));
            let annotations = object.metadata.annotations.clone().unwrap_or_default();
            self.annotated(&name, |name| annotations.get(name).map(String::as_str));
            self.template(&name, &object.data);
        }
    }

    fn template(&mut self, object: &str, value: &Value) {
        match value {
            Value::Object(fields) => {
                if value["csi"]["driver"] == self.driver_name {
                    self.named_by(object, &value["csi"]["volumeAttributes"], &[]);
                }
                let annotations = &value["metadata"]["annotations"];
                self.annotated(object, |name| annotations[name].as_str());
                fields.values().for_each(|field| self.template(object, field));
            }
            Value::Array(values) => values.iter().for_each(|value| self.template(object, value)),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }

    fn nodes(&mut self, nodes: &[DynamicObject], known: &[DynamicObject]) {
        let has = |node: &&DynamicObject| {
            list(&node.data["spec"]["drivers"]).any(|driver| driver["name"] == self.driver_name)
        };
        let registered: BTreeSet<_> = known.iter().filter(has).map(name).collect();
        for node in nodes {
            let name = name(node);
            let is_there = |at: &Option<String>| at.as_deref() == Some(&name);
            let here = || self.inventory.volumes.iter().filter(|volume| volume.pods.values().any(is_there));
            let pods = here().flat_map(|volume| volume.pods.iter().filter(|(_, at)| is_there(at)).map(|(pod, _)| pod));
            let (pods, volumes) = (pods.collect::<BTreeSet<_>>().len(), here().count());
            let registered = registered.contains(&name);
            self.inventory.nodes.push(ClusterNode { name, registered, pods, volumes });
        }
    }

    /// Notes what a volume's attributes name, and returns it in words.
    fn named_by(&mut self, object: &str, attributes: &Value, options: &[&str]) -> Vec<String> {
        let (images, locations) = images_of(attributes, options);
        self.refer(object.to_owned(), locations);
        images
    }

    /// Notes what a claim names, or one that is to be.
    fn annotated<'b>(&mut self, object: &str, annotation: impl Fn(&str) -> Option<&'b str>) {
        let of = |name: &str| annotation(&format!("{}/{name}", self.driver_name));
        // As the controller reads it.
        let image = of("image").map(|image| relative(image).unwrap_or_else(|_| image.to_owned()));
        let source = of("source").and_then(|source| Source::parse(source.trim()).ok()).map(|source| source.image());
        let locations: Vec<_> = image.into_iter().chain(source).map(|path| Location::of_file(&path)).collect();
        if !locations.is_empty() {
            self.refer(object.to_owned(), Ok(locations));
        }
    }

    fn refer(&mut self, object: String, locations: std::result::Result<Vec<Location>, String>) {
        self.inventory.references.push(Reference { object, locations });
    }
}

/// What a volume's attributes name: in words, and where that lies.
fn images_of(attributes: &Value, options: &[&str]) -> (Vec<String>, std::result::Result<Vec<Location>, String>) {
    let options: Vec<_> = options.iter().map(|&option| option.to_owned()).collect();
    match parameters::parse_attributes(&strings(attributes), &options) {
        Ok(parsed) => (parsed.mount().sources(), Ok(Location::of(parsed.mount()))),
        Err(error) => (Vec::new(), Err(error.to_string())),
    }
}

fn name(object: &DynamicObject) -> String {
    object.metadata.name.clone().unwrap_or_default()
}

fn full_name(object: &DynamicObject) -> String {
    match &object.metadata.namespace {
        Some(namespace) => format!("{namespace}/{}", name(object)),
        None => name(object),
    }
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn strings(value: &Value) -> BTreeMap<String, String> {
    let fields = value.as_object().into_iter().flatten();
    fields.filter_map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn objects(values: Value) -> Vec<DynamicObject> {
        serde_json::from_value(values).unwrap()
    }

    fn looked() -> Inventory {
        let mut looking = Looking::new("squashfs.csi.dev");
        let volume = |image: &str| json!({"driver": "squashfs.csi.dev", "volumeAttributes": {"server": "a, b", "share": "/images", "image": image}});
        looking.drivers(&objects(json!([{"metadata": {"name": "squashfs.csi.dev"}}])));
        looking.classes(&objects(json!([
            {"metadata": {"name": "tools"}, "provisioner": "squashfs.csi.dev",
             "parameters": {"server": "a", "share": "/images", "image": "${pvc.metadata.namespace}/${pvc.metadata.name}.sqsh"}},
            {"metadata": {"name": "from-claims"}, "provisioner": "squashfs.csi.dev",
             "parameters": {"server": "a", "share": "/images", "imagesFromClaim": "*"}},
            {"metadata": {"name": "other"}, "provisioner": "nfs.csi.k8s.io", "parameters": {"server": "a"}},
        ])));
        looking.volumes(&objects(json!([
            {"metadata": {"name": "pv"}, "spec": {"csi": volume("pv.sqsh"), "claimRef": {"namespace": "team", "name": "pv"}}},
            {"metadata": {"name": "old"}, "spec": {"csi": volume("../x")}},
            {"metadata": {"name": "nfs"}, "spec": {"nfs": {"server": "a", "path": "/images"}}},
        ])));
        let digest = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";
        looking.claims(&objects(json!([
            {"metadata": {"name": "pv", "namespace": "team"}, "spec": {"storageClassName": ""}, "status": {"phase": "Bound"}},
            {"metadata": {"name": "waits", "namespace": "team",
                          "annotations": {"squashfs.csi.dev/source": format!("oci://a.example/b@sha256:{digest}")}},
             "spec": {"storageClassName": "from-claims"}, "status": {"phase": "Pending"}},
        ])));
        looking.pods(&objects(json!([
            {"metadata": {"name": "one", "namespace": "team"}, "status": {"phase": "Running"}, "spec": {"nodeName": "n", "volumes": [
                {"name": "a", "persistentVolumeClaim": {"claimName": "pv"}}, {"name": "b", "csi": volume("inline.sqsh")}]}},
            {"metadata": {"name": "done", "namespace": "team"}, "status": {"phase": "Succeeded"}, "spec": {"nodeName": "n",
                "volumes": [{"name": "a", "persistentVolumeClaim": {"claimName": "pv"}}]}},
        ])));
        looking.templates("Deployment", &objects(json!([
            {"metadata": {"name": "idle", "namespace": "team"}, "spec": {"replicas": 0, "template": {"spec": {"volumes": [
                {"name": "a", "csi": volume("idle.sqsh")},
                {"name": "b", "ephemeral": {"volumeClaimTemplate": {"metadata": {"annotations": {"squashfs.csi.dev/image": "x/y.sqsh"}}}}},
            ]}}}},
        ])));
        looking.nodes(
            &objects(json!([{"metadata": {"name": "n"}}, {"metadata": {"name": "m"}}])),
            &objects(json!([
                {"metadata": {"name": "n"}, "spec": {"drivers": [{"name": "squashfs.csi.dev"}]}},
                {"metadata": {"name": "m"}, "spec": {"drivers": [{"name": "nfs.csi.k8s.io"}]}},
            ])),
        );
        looking.inventory
    }

    #[test]
    fn everything_that_names_an_image_is_found_wherever_it_says_so() {
        let named: Vec<_> = looked()
            .references
            .iter()
            .flat_map(|reference| {
                let paths =
                    reference.locations.clone().map(|locations| locations.into_iter().map(|it| it.path).collect());
                let paths: Vec<String> = paths.unwrap_or_else(|_| vec!["?".into()]);
                paths.into_iter().map(|path| format!("{}: {path}", reference.object))
            })
            .collect();
        let expected = [
            "StorageClass tools: /images/*/*.sqsh",
            "PersistentVolume pv: /images/pv.sqsh",
            "PersistentVolume old: ?",
            "PersistentVolumeClaim team/waits: /sha256-9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08.json",
            "Pod team/one: /images/inline.sqsh",
            "Deployment team/idle: /images/idle.sqsh",
            "Deployment team/idle: /x/y.sqsh",
        ];
        assert_eq!(
            named.iter().collect::<std::collections::BTreeSet<_>>(),
            expected.iter().map(|it| it.to_string()).collect::<std::collections::BTreeSet<_>>().iter().collect()
        );
    }

    #[test]
    fn a_volume_has_its_claim_and_the_pods_that_run_with_it() {
        let Inventory { volumes, nodes, pending, is_installed, .. } = looked();
        let pods = BTreeMap::from([("team/one".to_owned(), Some("n".to_owned()))]);
        assert_eq!((&volumes[0].pods, volumes[0].claim.as_deref()), (&pods, Some("team/pv")));
        assert_eq!((volumes[2].name.as_str(), &volumes[2].pods), ("team/one: b", &pods));
        assert_eq!(volumes[0].images, ["pv.sqsh (squashfs) of a,b:/images (nfs 4.2)"]);
        let node = |name: &str, registered, pods, volumes| ClusterNode { name: name.into(), registered, pods, volumes };
        assert_eq!(nodes, [node("n", true, 1, 2), node("m", false, 0, 0)]);
        assert_eq!(pending, ["team/waits"]);
        assert!(is_installed);
    }
}
