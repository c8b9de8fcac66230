//! Jobs that make images: one for each source and directory, by a template of the admin's.

use std::sync::Arc;

use k8s_openapi::api::batch::v1::{Job, JobCondition};
use k8s_openapi::api::core::v1::{Container, NFSVolumeSource, Pod, PodSpec, Volume, VolumeMount};
use kube::api::{ListParams, PostParams};
use kube::{Api, Client};
use sha2::{Digest, Sha256};

use super::api::ApiServer;
use crate::error::{Error, Kind, Result};
use crate::spec::template::Build;

/// The volume of a Job in which it makes images, and where its container has it.
const IMAGES: &str = "images";
const IMAGES_AT: &str = "/images";
/// The most bytes of what a Job said that are repeated.
const LAST_WORDS: usize = 500;

/// How Jobs are to be: what the driver adds is their name, what is to be made and, unless there is a volume `images`, that of the share.
#[derive(Debug)]
pub struct JobTemplate {
    driver_name: String,
    job: Job,
    namespace: String,
    /// Of its text: with another template there is another Job.
    digest: Vec<u8>,
}

impl JobTemplate {
    /// Reads a Job (YAML), which must have a namespace and a container. `driver_name` is the domain of its annotations.
    pub fn parse(driver_name: &str, text: &str) -> std::result::Result<JobTemplate, String> {
        let job: Job = serde_yaml_ng::from_str(text).map_err(|error| error.to_string())?;
        let namespace = job.metadata.namespace.clone().ok_or("it has no metadata.namespace")?;
        let pod = job.spec.as_ref().and_then(|spec| spec.template.spec.as_ref());
        if pod.is_none_or(|pod| pod.containers.is_empty()) {
            return Err("it has no spec.template.spec.containers".into());
        }
        Ok(JobTemplate { driver_name: driver_name.to_owned(), job, namespace, digest: Sha256::digest(text).to_vec() })
    }

    /// The Job that makes an image. It has the same name whoever asks.
    fn job(&self, build: &Build) -> Job {
        let Build { source, server, share, .. } = build;
        let mut job = self.job.clone();
        job.metadata.name = Some(self.name(build));
        let annotations = job.metadata.annotations.get_or_insert_default();
        let about = [("source", source.to_string()), ("server", server.clone()), ("share", share.clone())];
        annotations.extend(about.map(|(name, value)| (format!("{}/{name}", self.driver_name), value)));
        if let Some(pod) = job.spec.as_mut().and_then(|spec| spec.template.spec.as_mut()) {
            add_volume(pod, server, share);
            // There is one: see `parse`.
            if let Some(container) = pod.containers.first_mut() {
                add_arguments(container, build);
            }
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

fn add_volume(pod: &mut PodSpec, server: &str, share: &str) {
    let volumes = pod.volumes.get_or_insert_default();
    if volumes.iter().all(|volume| volume.name != IMAGES) {
        let nfs = NFSVolumeSource { server: server.to_owned(), path: share.to_owned(), read_only: None };
        volumes.push(Volume { name: IMAGES.into(), nfs: Some(nfs), ..Volume::default() });
    }
}

fn add_arguments(container: &mut Container, build: &Build) {
    let name = build.source.image_name();
    let own = [build.source.to_string(), format!("--to={IMAGES_AT}"), format!("--name={name}")];
    container.args.get_or_insert_default().splice(0..0, own);
    container.volume_mounts.get_or_insert_default().push(VolumeMount {
        name: IMAGES.into(),
        mount_path: IMAGES_AT.into(),
        // The kubelet follows no symbolic link there, which may be another's.
        sub_path: Some(build.directory.clone()).filter(|directory| !directory.is_empty()),
        ..VolumeMount::default()
    });
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
        let jobs = |client: Client| Api::<Job>::namespaced(client, namespace);
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
        if condition(&job, "Complete").is_some() {
            return Ok(Progress::Made);
        }
        let of_it = ListParams::default().labels(&format!("batch.kubernetes.io/job-name={name}"));
        let list = |client| async { Api::<Pod>::namespaced(client, namespace).list(&of_it).await };
        let pods = self.server.ask(&format!("list the pods of {what}"), list).await?.items;
        match condition(&job, "Failed") {
            Some(failed) => {
                let why = last_words(&pods).or_else(|| failed.message.clone()).unwrap_or_default();
                let again = match job.spec.and_then(|spec| spec.ttl_seconds_after_finished) {
                    Some(seconds) => {
                        format!("it is tried again when the Job is deleted, or by itself after {seconds} s")
                    }
                    None => "it is tried again when the Job is deleted".to_owned(),
                };
                Err(Error::new(Kind::FailedPrecondition, format!("{what} has failed: {why}: {again}")))
            }
            None => Ok(Progress::UnderWay(match waits_for(&pods) {
                Some(why) => format!("{what}, whose pod waits: {why}"),
                None => what,
            })),
        }
    }
}

fn condition<'a>(job: &'a Job, name: &str) -> Option<&'a JobCondition> {
    let conditions = job.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|condition| condition.type_ == name && condition.status == "True")
}

/// The last line of the pod that ended last.
fn last_words(pods: &[Pod]) -> Option<String> {
    let ends = pods.iter().filter_map(|pod| {
        let container = pod.status.as_ref()?.container_statuses.as_ref()?.first()?;
        let ended = container.state.as_ref()?.terminated.as_ref()?;
        let line = ended.message.as_ref()?.lines().rfind(|line| !line.trim().is_empty())?;
        Some((ended.finished_at.clone(), plain(line)))
    });
    ends.max_by(|one, other| one.0.cmp(&other.0)).map(|(_, line)| line)
}

/// Why a pod does not run, where it is known.
fn waits_for(pods: &[Pod]) -> Option<String> {
    pods.iter().filter_map(|pod| pod.status.as_ref()).find_map(|status| {
        let of_container = || {
            let container = status.container_statuses.as_ref()?.first()?;
            let waiting = container.state.as_ref()?.waiting.as_ref()?;
            waiting.message.clone().or_else(|| waiting.reason.clone())
        };
        let conditions = || status.conditions.iter().flatten();
        let unscheduled =
            || conditions().find(|condition| condition.type_ == "PodScheduled" && condition.status == "False");
        unscheduled().and_then(|condition| condition.message.clone()).or_else(of_container).map(|why| plain(&why))
    })
}

/// What others wrote, as an error may repeat it.
fn plain(text: &str) -> String {
    let first = text.char_indices().take_while(|(at, _)| *at < LAST_WORDS);
    first.map(|(_, letter)| if letter.is_control() { ' ' } else { letter }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, from_value, json, to_value};

    use crate::spec::source::Source;

    const TEMPLATE: &str = "
apiVersion: batch/v1
kind: Job
metadata: {namespace: builds, labels: {a: b}}
spec:
  ttlSecondsAfterFinished: 600
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
        assert_eq!(job["metadata"]["namespace"], "builds");
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
        for (old, new) in
            [("namespace: builds, ", ""), ("containers:", "initContainers:"), ("spec:", "spec: ["), ("{}", "[]")]
        {
            JobTemplate::parse("squashfs.csi.dev", &TEMPLATE.replacen(old, new, 1)).unwrap_err();
        }
    }

    fn pod(status: Value) -> Pod {
        from_value(json!({"status": status})).unwrap()
    }

    #[test]
    fn a_job_that_has_failed_says_so_in_the_last_words_of_its_last_pod() {
        let ended = |at: &str, message: Value| {
            let ended = json!({"exitCode": 1, "finishedAt": at, "message": message});
            pod(json!({"containerStatuses": [
                {"name": "build", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": {"terminated": ended}}]}))
        };
        let early = ended("2026-01-01T00:00:00Z", json!("early"));
        let late = ended("2026-01-02T00:00:00Z", json!("a layer\nthe registry\u{1b} is silent\n\n"));
        let silent = ended("2026-01-01T00:00:00Z", Value::Null);
        assert_eq!(last_words(&[late, early]).unwrap(), "the registry  is silent");
        assert_eq!(last_words(&[silent, pod(json!({}))]), None);
        let long = ended("2026-01-01T00:00:00Z", json!("ä".repeat(400)));
        assert_eq!(last_words(&[long]).unwrap().len(), LAST_WORDS);
    }

    #[test]
    fn a_job_whose_pod_cannot_run_says_why() {
        let unscheduled = json!([{"type": "PodScheduled", "status": "False", "message": "no node"}]);
        assert_eq!(waits_for(&[pod(json!({"conditions": unscheduled}))]).unwrap(), "no node");
        let waiting = |waiting: Value| {
            pod(json!({"containerStatuses": [
                {"name": "build", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": {"waiting": waiting}}]}))
        };
        assert_eq!(
            waits_for(&[waiting(json!({"reason": "ErrImagePull", "message": "no image"}))]).unwrap(),
            "no image"
        );
        assert_eq!(waits_for(&[waiting(json!({"reason": "ContainerCreating"}))]).unwrap(), "ContainerCreating");
        assert_eq!(waits_for(&[pod(json!({}))]), None);
    }
}
