//! A directory becomes the root of a command. What stands for its container is a mount namespace of the test's own.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::harness::{binary, run};

/// A directory for a root and for what its pod has.
struct Pod {
    directory: tempfile::TempDir,
    /// What has been mounted when the driver is called, as a shell does it.
    set_up: String,
}

impl Pod {
    /// The root has this machine's programs, and nothing else.
    fn new() -> Self {
        let pod = Pod { directory: tempfile::tempdir().unwrap(), set_up: String::new() };
        fs::create_dir_all(pod.root().join("usr")).unwrap();
        for name in ["bin", "lib", "lib64", "sbin"] {
            symlink(Path::new("usr").join(name), pod.root().join(name)).unwrap();
        }
        let usr = format!("mount --bind /usr {}", pod.root().join("usr").display());
        pod.with(&usr)
    }

    fn with(mut self, set_up: &str) -> Self {
        self.set_up += &format!("{set_up}\n");
        self
    }

    /// With a resolv.conf of its own.
    fn with_resolv_conf(self) -> Self {
        fs::write(self.path("resolv.conf"), "the pod's").unwrap();
        let bind = format!("mount --bind {} /etc/resolv.conf", self.path("resolv.conf").display());
        self.with(&bind)
    }

    fn with_volume(self) -> Self {
        let volume = self.path("volume");
        fs::create_dir(&volume).unwrap();
        self.with(&format!("mount -t tmpfs volume {0}; echo data >{0}/file", volume.display()))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn root(&self) -> PathBuf {
        self.path("root")
    }

    /// What runs the script by `enter` with these flags.
    fn command(&self, flags: &[&str], script: &str) -> Command {
        let mut command = Command::new("unshare");
        let set_up = format!("{}exec \"$@\"", self.set_up);
        command.args(["--mount", "--propagation", "private", "sh", "-ec", &set_up, "sh"]);
        command.arg(binary()).arg("enter").args(flags).arg(self.root()).args(["--", "/bin/sh", "-ec", script]);
        command
    }

    fn run(&self, script: &str) -> Output {
        self.command(&[], script).output().unwrap()
    }

    /// What the script prints when all goes well.
    fn prints(&self, script: &str) -> String {
        let output = self.run(script);
        assert!(output.status.success() && output.stderr.is_empty(), "{}: {}", output.status, text(&output.stderr));
        text(&output.stdout)
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
#[ignore = "needs root: make test-host"]
fn the_command_is_the_process_and_its_end_is_the_process_s_end() {
    let pod = Pod::new();
    assert_eq!(pod.run("exit 7").status.code(), Some(7));
    assert_eq!(pod.run("kill -KILL $$").status.signal(), Some(9));
    let script = "trap 'exit 9' TERM; echo $$ $KEPT $LOG_LEVEL $PWD; while :; do sleep 0.1; done";
    let mut process = pod.command(&[], script);
    // Also what this program reads for itself otherwise, and would not take.
    process.env("KEPT", "kept").env("LOG_LEVEL", "all").env("DRIVER_NAME", "");
    let mut process = process.stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(process.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, format!("{} kept all /\n", process.id()));
    run("kill", &[&process.id().to_string()]);
    assert_eq!(process.wait().unwrap().code(), Some(9));
}

#[test]
#[ignore = "needs root: make test-host"]
fn the_command_sees_what_its_container_has_and_nothing_of_where_it_was() {
    let pod = Pod::new().with_resolv_conf().with_volume();
    assert_eq!(pod.prints("cat /etc/resolv.conf"), "the pod's");
    assert_eq!(pod.prints(&format!("cat {}/file", pod.path("volume").display())), "data\n");
    assert_eq!(pod.prints("cat /proc/$$/comm; echo a >/dev/null; echo b >/tmp/b; echo c >/run/c; ls /run"), "sh\nc\n");
    assert_eq!(pod.prints("stat -c '%a %n' /tmp /run"), "1777 /tmp\n755 /run\n");
    assert_eq!(pod.prints(&format!("ls -d {}/usr 2>&1 >/dev/null | wc -l", pod.root().display())), "1\n");
    // The old root does not lie on top of it.
    assert_eq!(pod.prints("grep -c '^[0-9]* [0-9]* [0-9:]* [^ ]* / ' /proc/self/mountinfo"), "1\n");
    // What the driver's runtime ignores for itself stays with it.
    assert_eq!(pod.prints("grep SigIgn /proc/self/status"), run("grep", &["SigIgn", "/proc/self/status"]));
}

#[test]
#[ignore = "needs root: make test-host"]
fn the_command_cannot_mount_unless_it_is_said_that_it_may() {
    let pod = Pod::new();
    let script = "mount -t tmpfs mine /tmp 2>&1 && echo mounted || true";
    assert!(pod.prints(script).contains("ermission denied"));
    let kept = pod.command(&["--keep-sys-admin"], script).output().unwrap();
    assert_eq!(text(&kept.stdout), "mounted\n");
}

#[test]
#[ignore = "needs root: make test-host"]
fn symlinks_of_the_image_lead_nowhere_but_into_the_image() {
    let pod = Pod::new().with_resolv_conf();
    fs::create_dir(pod.root().join("etc")).unwrap();
    let outside = pod.path("outside");
    fs::write(&outside, "untouched").unwrap();
    // As deep in the new root as it is on this machine.
    for link in [outside.clone(), Path::new("../../../../../../../..").join(outside.strip_prefix("/").unwrap())] {
        symlink(&link, pod.root().join("etc/resolv.conf")).unwrap();
        let pod_sees = pod.prints(&format!("cat /etc/resolv.conf; echo; cat {}", outside.display()));
        assert_eq!(pod_sees, "the pod's\nthe pod's", "{}", link.display());
        assert_eq!(fs::read_to_string(&outside).unwrap(), "untouched");
        fs::remove_file(pod.root().join("etc/resolv.conf")).unwrap();
    }
    // systemd-resolved's, whose directory is made when it starts.
    symlink("../run/systemd/resolve/stub-resolv.conf", pod.root().join("etc/resolv.conf")).unwrap();
    assert_eq!(pod.prints("cat /etc/resolv.conf"), "the pod's");
}

#[test]
#[ignore = "needs root: make test-host"]
fn an_image_without_a_place_is_entered_without_what_each_pod_has_and_not_without_a_volume() {
    let pod = Pod::new().with_resolv_conf().with_volume();
    // Each place is made where it can be.
    pod.prints("true");
    let root = pod.root();
    let pod = pod.with(&format!("mount --bind -o ro {0} {0}; mount --bind /usr {0}/usr", root.display()));
    // What a container has in memory, the directory of the volume among it, needs no place in the image.
    assert_eq!(pod.prints("cat /etc/resolv.conf"), "the pod's");
    fs::remove_file(root.join("etc/resolv.conf")).unwrap();
    let output = pod.run("! cat /etc/resolv.conf 2>&-");
    let said = text(&output.stderr);
    assert!(output.status.success(), "{said}");
    let expected =
        format!("csi-driver-squashfs: warning: mount the pod's /etc/resolv.conf at its place in {}: ", root.display());
    assert!(
        said.starts_with(&expected) && said.contains("read-only file system: the image has nothing there"),
        "{said}"
    );

    fs::create_dir("/enter-test-volume").unwrap();
    let pod = pod.with("mount -t tmpfs volume /enter-test-volume");
    let output = pod.run("true");
    fs::remove_dir("/enter-test-volume").unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{said}");
    assert!(said.contains("mount the pod's /enter-test-volume at its place in"), "{said}");
}

#[test]
#[ignore = "needs root: make test-host"]
fn an_image_with_a_directory_in_the_place_of_a_file_is_entered_without_it_and_says_why() {
    let pod = Pod::new().with_resolv_conf();
    fs::create_dir_all(pod.root().join("etc/resolv.conf")).unwrap();
    let output = pod.run("true");
    let said = text(&output.stderr);
    assert!(
        output.status.success() && said.contains("a file where a directory belongs, or the other way round"),
        "{said}"
    );
}

#[test]
#[ignore = "needs root: make test-host"]
fn what_cannot_be_entered_or_run_is_said_and_the_machine_has_its_mounts_as_before() {
    let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap();
    let before = mounts();
    let pod = Pod::new();
    let enter = |directory: &Path, command: &str| {
        let output = Command::new(binary()).arg("enter").arg(directory).args(["--", command]).output().unwrap();
        (output.status.code().unwrap(), text(&output.stderr))
    };
    for (directory, command, status, said) in [
        (pod.root(), "/bin/missing", 127, "run /bin/missing in "),
        (pod.root(), "/usr", 126, "permission denied: is it executable"),
        (pod.path("missing"), "/bin/sh", 125, "missing: no such file or directory"),
        ("/".into(), "/bin/sh", 125, "it is the root already"),
    ] {
        let (ended, text) = enter(&directory, command);
        assert_eq!(ended, status, "{text}");
        assert!(text.contains(said), "{text}");
    }
    assert_eq!(mounts(), before);
}
