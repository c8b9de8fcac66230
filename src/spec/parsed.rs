//! A spec on its way from what a user wrote to what the admin allows: nothing is mounted that did not come this way.

use std::ops::Deref;

use super::error::SpecError;
use super::image_parameters::{ImageParameters, VERITY};
use super::policy::Policy;
use super::{HOST_PATH, MOUNT_SPEC, Mount, Symlinks};

/// A spec that was read, and what its author should know about it. Whether it is allowed is another question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parsed {
    mount: Mount,
    warnings: Vec<String>,
    form: Form,
}

/// How a user wrote a spec.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Json,
    /// By flat parameters.
    Flat,
}

impl Form {
    /// An error about a place of the JSON form, with the place in this one.
    pub(super) fn place(self, error: SpecError) -> SpecError {
        match self {
            Form::Flat if error.parameter == MOUNT_SPEC => {
                let parameter = flat_parameter(&error.pointer).to_owned();
                SpecError { parameter, pointer: String::new(), ..error }
            }
            Form::Json | Form::Flat => error,
        }
    }
}

impl Parsed {
    pub(super) fn new(mount: Mount, warnings: Vec<String>, form: Form) -> Parsed {
        Parsed { mount, warnings, form }
    }

    /// The same, where symlinks in paths are followed or not.
    pub(super) fn with_symlinks(mut self, symlinks: Symlinks) -> Parsed {
        self.mount.set_symlinks(symlinks);
        self
    }

    /// The same, with what is said of its images.
    pub(super) fn with_image_parameters(mut self, parameters: ImageParameters) -> Result<Parsed, SpecError> {
        parameters.apply(&mut self.mount)?;
        Ok(self)
    }

    /// To look at, not to mount.
    pub fn mount(&self) -> &Mount {
        &self.mount
    }

    /// What was ignored, one sentence each.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// [`Policy::check`], with errors that name the places of the form that the user wrote.
    pub fn allowed_by(self, policy: &Policy, namespace: Option<&str>) -> Result<Allowed, SpecError> {
        let form = self.form;
        Allowed::new(self.mount, policy, namespace).map_err(|error| form.place(error))
    }
}

/// A mount that the admin's policy allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allowed(Mount);

impl Allowed {
    /// Also of a mount that was allowed once, and written down.
    pub fn new(mount: Mount, policy: &Policy, namespace: Option<&str>) -> Result<Allowed, SpecError> {
        policy.check(&mount, namespace)?;
        Ok(Allowed(mount))
    }
}

impl Deref for Allowed {
    type Target = Mount;

    fn deref(&self) -> &Mount {
        &self.0
    }
}

/// The flat parameter that became the place with this JSON pointer.
fn flat_parameter(pointer: &str) -> &'static str {
    for (end, name) in [
        ("/host", "server"),
        ("/nfs/path", "share"),
        ("/nfs/version", "nfsVersion"),
        ("/fs_type", "fsType"),
        ("/loopback/verity", VERITY),
        ("/loopback/path", HOST_PATH),
        ("/upper/kind", "overlay"),
        ("/upper/size", "overlaySize"),
    ] {
        if pointer.ends_with(end) {
            return name;
        }
    }
    if pointer.contains("/nfs/options") { "nfsOptions" } else { "image" }
}
