//! Jobs that make images: one for each source and directory, by a template of the admin's.

use std::sync::Arc;

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ApiResource, DynamicObject, ListParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::api::ApiServer;
use crate::error::{Error, Kind, Result};
use crate::spec::template::Build;
use crate::spec::yaml_value;

/// The volume of a Job in which it makes images, and where its container has it.
const IMAGES: &str = "images";
const IMAGES_AT: &str = "/images";
/// Where a Job has the specification of its pod.
const POD: &str = "/spec/template/spec";
/// How many seconds a Job must be there after its end: as long as external-provisioner waits until it asks again, at the most.
const LASTING: u64 = 300;
/// The most bytes of what a Job said that are repeated.
const LAST_WORDS: usize = 500;

/// How Jobs are to be: what the driver adds is their name, what is to be made and, unless there is a volume `images`, that of the share. All
/// else stays as it is, also what this program does not know.
#[derive(Debug)]
pub struct JobTemplate {
    driver_name: String,
    job: DynamicObject,
    namespace: String,
    /// Of its text: with another template there is another Job.
    digest: Vec<u8>,
}

impl JobTemplate {
    /// Reads a Job (YAML), which must have a namespace and a container. `driver_name` is the domain of its annotations.
    pub fn parse(driver_name: &str, text: &str) -> std::result::Result<JobTemplate, String> {
        let job: DynamicObject =
            serde_path_to_error::deserialize(yaml_value(text)?).map_err(|error| error.to_string())?;
        let of = ApiResource::erase::<Job>(&());
        if !job.types.as_ref().is_some_and(|types| types.api_version == of.api_version && types.kind == of.kind) {
            return Err(format!("it is no {} of {}", of.kind, of.api_version));
        }
        let namespace = job.metadata.namespace.clone().ok_or("it has no metadata.namespace")?;
        let containers = job.data.pointer(&format!("{POD}/containers"));
        if !containers.and_then(|containers| containers.get(0)).is_some_and(Value::is_object) {
            return Err("it has no spec.template.spec.containers".into());
        }
        if let Some(seconds) = job.data["spec"]["ttlSecondsAfterFinished"].as_u64().filter(|seconds| *seconds < LASTING)
        {
            return Err(format!(
                "spec.ttlSecondsAfterFinished is {seconds}, and must be {LASTING} at least: external-provisioner asks again by then"
            ));
        }
        let digest = Sha256::digest(text).to_vec();
        Ok(JobTemplate { driver_name: driver_name.to_owned(), job, namespace, digest })
    }

    /// The Job that makes an image. It has the same name whoever asks.
    fn job(&self, build: &Build) -> DynamicObject {
        let Build { source, server, share, directory } = build;
        let mut job = self.job.clone();
        job.metadata.name = Some(self.name(build));
        let annotations = job.metadata.annotations.get_or_insert_default();
        let about = [("source", source.to_string()), ("server", server.clone()), ("share", share.clone())];
        annotations.extend(about.map(|(name, value)| (format!("{}/{name}", self.driver_name), value)));
        if let Some(pod) = job.data.pointer_mut(POD) {
            let volumes = list(pod, "volumes");
            if volumes.iter().all(|volume| volume["name"] != IMAGES) {
                volumes.push(json!({"name": IMAGES, "nfs": {"server": server, "path": share}}));
            }
            let container = &mut pod["containers"][0];
            let own = [source.to_string(), format!("--to={IMAGES_AT}"), format!("--name={}", source.image_name())];
            list(container, "args").splice(0..0, own.map(Value::from));
            let mut mount = json!({"name": IMAGES, "mountPath": IMAGES_AT});
            if !directory.is_empty() {
                // The kubelet follows symbolic links in it, and none that leads out of the share.
                mount["subPath"] = json!(directory);
            }
            list(container, "volumeMounts").push(mount);
        }
        job
    }

    fn name(&self, build: &Build) -> String {
        let Build { source, server, share, directory } = build;
        let mut digest = Sha256::new_with_prefix(&self.digest);
        for text in [&source.to_string(), server, share, directory] {
            digest.update((text.len() as u64).to_le_bytes());
            digest.update(text);
        }
        let digits: String = digest.finalize().iter().take(10).map(|byte| format!("{byte:02x}")).collect();
        format!("build-{digits}")
    }
}

/// A list of an object, which is made where there is none.
fn list<'a>(object: &'a mut Value, field: &str) -> &'a mut Vec<Value> {
    let list = &mut object[field];
    if !list.is_array() {
        *list = json!([]);
    }
    list.as_array_mut().expect("it is one now")
}

/// How far an image is.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    Made,
    /// This call has begun it, by this Job.
    Begun(String),
    /// By this Job, and what that waits for.
    UnderWay(String),
}

/// The Jobs that make images.
pub struct Builds {
    template: JobTemplate,
    server: Arc<ApiServer>,
}

impl Builds {
    pub(super) fn new(template: JobTemplate, server: Arc<ApiServer>) -> Self {
        Builds { template, server }
    }

    /// Sees to it that an image is made, and says how far that is; does not wait for it. Needs the verbs `get` and `create` of `jobs`, and
    /// `list` of `pods`, in the namespace of the template. An error is that of the API server, or why the Job has failed, which is so for as
    /// long as the Job is there.
    pub async fn make(&self, build: &Build) -> Result<Progress> {
        let (name, namespace) = (self.template.name(build), &self.template.namespace);
        let what = format!("Job {namespace}/{name}");
        let all = |client: Client, kind| Api::<DynamicObject>::namespaced_with(client, namespace, &kind);
        let jobs = |client| all(client, ApiResource::erase::<Job>(&()));
        let get = |client| async { jobs(client).get_opt(&name).await };
        let Some(job) = self.server.ask(&format!("look at {what}"), get).await? else {
            let job = self.template.job(build);
            let create = |client| async {
                match jobs(client).create(&PostParams::default(), &job).await {
                    // Another call was faster.
                    Err(kube::Error::Api(status)) if status.code == 409 => Ok(Progress::UnderWay(what.clone())),
                    created => created.map(|_| Progress::Begun(what.clone())),
                }
            };
            return self.server.ask(&format!("create {what}"), create).await;
        };
        if condition(&job.data["status"], "Complete", "True").is_some() {
            return Ok(Progress::Made);
        }
        let of_job = format!("batch.kubernetes.io/job-name={name}");
        let of_it = ListParams::default().labels(&of_job);
        let list = |client| async { all(client, ApiResource::erase::<Pod>(&())).list(&of_it).await };
        let pods = self.server.ask(&format!("list the pods of {what}"), list).await?.items;
        let pods: Vec<_> = pods.iter().map(|pod| &pod.data["status"]).collect();
        match condition(&job.data["status"], "Failed", "True") {
            Some(failed) => {
                let why = last_words(&pods).or_else(|| text(&failed["message"])).unwrap_or_default();
                let again = match job.data["spec"]["ttlSecondsAfterFinished"].as_u64() {
                    Some(seconds) => {
                        format!("it is tried again when the Job is deleted, or by itself after {seconds} s")
                    }
                    None => "it is tried again when the Job is deleted".to_owned(),
                };
                Err(Error::new(Kind::FailedPrecondition, format!("{what} has failed: {why}: {again}")))
            }
            None => Ok(Progress::UnderWay(match waits_for(&pods) {
                Some(why) => {
                    format!(
                        "{what}, whose pod waits: {why}: see 'kubectl describe pod --namespace {namespace} --selector {of_job}'"
                    )
                }
                None if pods.is_empty() => {
                    format!("{what}, which has no pod yet: see 'kubectl describe job --namespace {namespace} {name}'")
                }
                None => what,
            })),
        }
    }
}

/// The condition of this type, of the status of an object, where it is so.
fn condition<'a>(status: &'a Value, name: &str, is: &str) -> Option<&'a Value> {
    let conditions = status["conditions"].as_array()?;
    conditions.iter().find(|condition| condition["type"] == name && condition["status"] == is)
}

/// The last line of the pod that ended last, of the statuses of all.
fn last_words(pods: &[&Value]) -> Option<String> {
    let ends = pods.iter().filter_map(|status| {
        let ended = &status["containerStatuses"][0]["state"]["terminated"];
        let line = ended["message"].as_str()?.lines().rfind(|line| !line.trim().is_empty())?;
        Some((ended["finishedAt"].as_str(), plain(line)))
    });
    ends.max_by_key(|(at, _)| *at).map(|(_, line)| line)
}

/// Why a pod does not run, where it is known.
fn waits_for(pods: &[&Value]) -> Option<String> {
    pods.iter().find_map(|status| {
        let unscheduled = condition(status, "PodScheduled", "False").and_then(|condition| text(&condition["message"]));
        let waiting = &status["containerStatuses"][0]["state"]["waiting"];
        unscheduled.or_else(|| text(&waiting["message"])).or_else(|| text(&waiting["reason"]))
    })
}

fn text(value: &Value) -> Option<String> {
    value.as_str().map(plain)
}

/// What others wrote, as an error may repeat it.
fn plain(text: &str) -> String {
    let first = text.char_indices().take_while(|(at, _)| *at < LAST_WORDS);
    first.map(|(_, letter)| if letter.is_control() { ' ' } else { letter }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::to_value;

    use crate::spec::source::Source;

    const TEMPLATE: &str = "
apiVersion: batch/v1
kind: Job
metadata: {namespace: builds, labels: {a: b}}
spec:
  ttlSecondsAfterFinished: 600
  fieldOfTheFuture: 1
  template:
    spec:
      containers:
        - {name: build, image: builder, args: [--flat], volumeMounts: [{name: work, mountPath: /tmp}]}
      volumes: [{name: work, emptyDir: {}}]
";

    fn build(digit: &str, directory: &str) -> Build {
        let source = Source::parse(&format!("oci://a.example/b@sha256:{}", digit.repeat(64))).unwrap();
        Build { source, server: "nfs".into(), share: "/images".into(), directory: directory.into() }
    }

    fn template(text: &str) -> JobTemplate {
        JobTemplate::parse("squashfs.csi.dev", text).unwrap()
    }

    #[test]
    fn a_job_is_the_admins_with_what_is_to_be_made() {
        let job = to_value(template(TEMPLATE).job(&build("0", "team/a"))).unwrap();
        let name = format!("sha256-{}", "0".repeat(64));
        let source = format!("oci://a.example/b@sha256:{}", "0".repeat(64));
        assert_eq!((&job["metadata"]["namespace"], &job["kind"]), (&json!("builds"), &json!("Job")));
        assert_eq!(job["spec"]["fieldOfTheFuture"], 1);
        assert_eq!(job["metadata"]["annotations"]["squashfs.csi.dev/source"], *source);
        let pod = &job["spec"]["template"]["spec"];
        let container = &pod["containers"][0];
        let arguments = [&*source, "--to=/images", &format!("--name={name}"), "--flat"];
        assert_eq!(container["args"], json!(arguments));
        let mount = json!({"name": "images", "mountPath": "/images", "subPath": "team/a"});
        assert_eq!(container["volumeMounts"][1], mount);
        assert_eq!(pod["volumes"][1], json!({"name": "images", "nfs": {"server": "nfs", "path": "/images"}}));
        let of_the_share = to_value(template(TEMPLATE).job(&build("0", ""))).unwrap();
        let container = &of_the_share["spec"]["template"]["spec"]["containers"][0];
        assert_eq!(container["volumeMounts"][1], json!({"name": "images", "mountPath": "/images"}));
    }

    #[test]
    fn an_admin_may_say_how_the_share_is_mounted() {
        let text =
            TEMPLATE.replace("name: work, emptyDir: {}", "name: images, persistentVolumeClaim: {claimName: share}");
        let job = to_value(template(&text).job(&build("0", ""))).unwrap();
        let expected = json!([{"name": "images", "persistentVolumeClaim": {"claimName": "share"}}]);
        assert_eq!(job["spec"]["template"]["spec"]["volumes"], expected);
    }

    #[test]
    fn who_wants_the_same_image_in_the_same_place_has_the_same_job() {
        let one = template(TEMPLATE);
        let name = one.name(&build("0", "a"));
        assert_eq!((name.len(), name.as_str()), ("build-".len() + 20, &*one.name(&build("0", "a"))));
        assert_ne!(name, one.name(&build("1", "a")));
        assert_ne!(name, one.name(&build("0", "b")));
        assert_ne!(name, template(&TEMPLATE.replace("600", "601")).name(&build("0", "a")));
    }

    #[test]
    fn a_template_that_is_no_job_is_refused() {
        for (old, new) in [
            ("namespace: builds, ", ""),
            ("containers:", "initContainers:"),
            ("spec:", "spec: ["),
            ("batch/v1", "v1"),
            ("kind: Job", "kind: Pod"),
            ("Finished: 600", "Finished: 60"),
        ] {
            JobTemplate::parse("squashfs.csi.dev", &TEMPLATE.replacen(old, new, 1)).unwrap_err();
        }
    }

    #[test]
    fn a_job_that_has_failed_says_so_in_the_last_words_of_its_last_pod() {
        let ended = |at: &str, message: Value| {
            let ended = json!({"exitCode": 1, "finishedAt": at, "message": message});
            json!({"containerStatuses": [{"name": "build", "state": {"terminated": ended}}]})
        };
        let early = ended("2026-01-01T00:00:00Z", json!("early"));
        let late = ended("2026-01-02T00:00:00Z", json!("a layer\nthe registry\u{1b} is silent\n\n"));
        let silent = ended("2026-01-01T00:00:00Z", Value::Null);
        assert_eq!(last_words(&[&late, &early]).unwrap(), "the registry  is silent");
        assert_eq!(last_words(&[&silent, &json!({})]), None);
        let long = ended("2026-01-01T00:00:00Z", json!("ä".repeat(400)));
        assert_eq!(last_words(&[&long]).unwrap().len(), LAST_WORDS);
    }

    #[test]
    fn a_job_whose_pod_cannot_run_says_why() {
        let unscheduled = json!([{"type": "PodScheduled", "status": "False", "message": "no node"}]);
        assert_eq!(waits_for(&[&json!({"conditions": unscheduled})]).unwrap(), "no node");
        let waiting = |waiting: Value| json!({"containerStatuses": [{"name": "build", "state": {"waiting": waiting}}]});
        let no_image = waiting(json!({"reason": "ErrImagePull", "message": "no image"}));
        assert_eq!(waits_for(&[&no_image]).unwrap(), "no image");
        assert_eq!(waits_for(&[&waiting(json!({"reason": "ContainerCreating"}))]).unwrap(), "ContainerCreating");
        assert_eq!(waits_for(&[&json!({})]), None);
    }
}
