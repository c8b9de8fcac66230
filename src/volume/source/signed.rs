//! Images whose root hash lies beside them, signed: the volume names no hash, the policy names the keys.

use std::os::fd::AsFd;

use minisign_verify::{PublicKey, Signature};

use super::layers;
use super::prepare::{Preparer, symlinks};
use super::prepared::PreparedBase;
use crate::error::{Error, Kind, Result};
use crate::kernel;
use crate::kernel::image::Image;
use crate::kernel::mount::Symlinks;
use crate::kernel::verity::RootHash;
use crate::spec::{Loopback, Verity};

/// What a root hash or a signature may have: each is a few lines.
const MAX: usize = 4096;

impl Preparer {
    /// By what the kernel is to verify an image on this base, `None` where the volume does not ask for it.
    pub(super) async fn root_hash(&self, spec: &Loopback, base: Option<&PreparedBase>) -> Result<Option<RootHash>> {
        match (spec.verity, base) {
            (None, _) => Ok(None),
            (Some(Verity::Root(root)), _) => Ok(Some(root)),
            (Some(Verity::Signed), Some(base)) => self.signed_root_hash(spec, base).await.map(Some),
            (Some(Verity::Signed), None) => {
                let message = format!(
                    "image {}: its signed root hash is on its server, which does not answer: a volume that names the hash itself \
                     begins with its copy",
                    spec.path
                );
                Err(Error::new(Kind::Unavailable, message))
            }
        }
    }

    async fn signed_root_hash(&self, spec: &Loopback, base: &PreparedBase) -> Result<RootHash> {
        let names = [format!("{}.root", spec.path), format!("{}.root.minisig", spec.path)];
        let (of, symlinks) = (names.clone(), symlinks(&spec.base, spec.symlinks));
        let step = format!("read {} and {}", names[0], names[1]);
        let read = move |base: &_| Ok([read(base, &of[0], symlinks)?, read(base, &of[1], symlinks)?]);
        let [root, signature] = self.below(base, step, read).await?;
        let refused = |why: &str| Error::new(Kind::PermissionDenied, format!("image {}: {why}", spec.path));
        let text = String::from_utf8_lossy(&signature);
        let signature = Signature::decode(&text)
            .map_err(|error| refused(&format!("{} is no signature of minisign(1): {error}", names[1])))?;
        let keys = self.policy().trusted_keys();
        let is_by =
            |key: &String| PublicKey::from_base64(key).is_ok_and(|key| key.verify(&root, &signature, false).is_ok());
        if !keys.iter().any(is_by) {
            let why = format!("{} is a signature of {} by none of the policy's trustedKeys", names[1], names[0]);
            return Err(refused(&why));
        }
        match Verity::parse(String::from_utf8_lossy(&root).trim()) {
            Ok(Verity::Root(root)) => Ok(root),
            Ok(Verity::Signed) | Err(_) => Err(refused(&format!("{} is no root hash, as 'seal' prints it", names[0]))),
        }
    }
}

/// A small file beside an image.
fn read(base: &impl AsFd, path: &str, symlinks: Symlinks) -> kernel::Result<Vec<u8>> {
    layers::read(&Image::open(base, path, symlinks)?, path, MAX)
}
