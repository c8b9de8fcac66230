//! Images whose root hash lies beside them, signed: the volume names no hash, the policy names the keys.

use minisign_verify::{PublicKey, Signature};

use super::layers;
use super::open_base::OpenBase;
use super::prepare::{Preparer, symlinks};
use super::prepared::PreparedBase;
use crate::blocking::OffThread;
use crate::error::{Error, Kind, Result};
use crate::kernel::verity::RootHash;
use crate::places::run_at;
use crate::spec::{Loopback, Verity};

/// What a root hash or a signature may have: each is a few lines.
const MAX: usize = 4096;

impl Preparer {
    /// By what the kernel is to verify an image, `None` where the volume does not ask for it. Where the image is a copy, as its server does not
    /// answer, it has no base.
    pub(super) async fn root_hash(&self, spec: &Loopback, base: Option<&PreparedBase>) -> Result<Option<RootHash>> {
        match spec.verity {
            None => Ok(None),
            Some(Verity::Root(root)) => Ok(Some(root)),
            Some(Verity::Signed) => self.signed_root_hash(spec, base).await.map(Some),
        }
    }

    async fn signed_root_hash(&self, spec: &Loopback, base: Option<&PreparedBase>) -> Result<RootHash> {
        let file = format!("{}.root", spec.path);
        let root = self.beside(spec, base, &file).await?;
        self.check_signed(spec, base, &file, &root).await?;
        match Verity::parse(String::from_utf8_lossy(&root).trim()) {
            Ok(Verity::Root(root)) => Ok(root),
            Ok(Verity::Signed) | Err(_) => Err(refused(spec, &format!("{file} is no root hash, as 'seal' prints it"))),
        }
    }

    /// Whether `FILE.minisig`, which lies beside the image, is a signature of what is in this file by a key of the policy's.
    /// `PERMISSION_DENIED` where it is not.
    pub(super) async fn check_signed(
        &self,
        spec: &Loopback,
        base: Option<&PreparedBase>,
        file: &str,
        content: &[u8],
    ) -> Result<()> {
        let beside = format!("{file}.minisig");
        let signature = self.beside(spec, base, &beside).await?;
        let signature = Signature::decode(&String::from_utf8_lossy(&signature))
            .map_err(|error| refused(spec, &format!("{beside} is no signature of minisign(1): {error}")))?;
        let is_by =
            |key: &String| PublicKey::from_base64(key).is_ok_and(|key| key.verify(content, &signature, false).is_ok());
        match self.policy().trusted_keys(spec.base.export()).iter().any(is_by) {
            true => Ok(()),
            false => {
                Err(refused(spec, &format!("{beside} is a signature of {file} by none of the policy's trustedKeys")))
            }
        }
    }

    /// A small file beside an image, which is copied to the node as the image is.
    async fn beside(&self, spec: &Loopback, base: Option<&PreparedBase>, file: &str) -> Result<Vec<u8>> {
        let small = Loopback { path: file.to_owned(), digest: None, verity: None, ..spec.clone() };
        let (path, copied) = (file.to_owned(), self.copied(&small)?);
        let Some(base) = base else {
            let copy = match &copied {
                Some(name) => self.cache.last_known(name, None).await?,
                None => None,
            };
            let Some((_, copy)) = copy else {
                let message = format!(
                    "image {}: {file} is on its server, which does not answer, and has no copy on this node: a volume that names the \
                     root hash itself begins without",
                    spec.path
                );
                return Err(Error::new(Kind::Unavailable, message));
            };
            return run_at(None, format!("read the copy of {file}"), move || layers::read(&copy, &path, MAX)).await;
        };
        let symlinks = symlinks(&spec.base, spec.symlinks);
        let read = move |base: &OpenBase| {
            let image = base.open_image(&path, symlinks)?;
            let text = layers::read(&image, &path, MAX)?;
            Ok((OffThread::new(image), text))
        };
        let found = self.below(base, format!("read {file}"), read).await;
        if let (Err(error), Some(name)) = (&found, &copied) {
            self.mark_gone(name, error).await;
        }
        let (image, text) = found?;
        if let Some(name) = copied.filter(|_| image.identity.size <= MAX as u64) {
            self.copy_small(name, &image, base).await?;
        }
        Ok(text)
    }
}

fn refused(spec: &Loopback, why: &str) -> Error {
    Error::new(Kind::PermissionDenied, format!("image {}: {why}", spec.path))
}
