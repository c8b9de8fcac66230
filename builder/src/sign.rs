//! Signatures in the format of minisign(1), by which nodes believe the root hashes of images.

use std::fs;
use std::io::Cursor;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use minisign::{PublicKey, SecretKey, SecretKeyBox, SignatureBox};

/// A secret key without a password.
pub struct Key {
    secret: SecretKey,
    public: PublicKey,
}

impl Key {
    /// Reads what `minisign -G -W` makes.
    pub fn read(path: &Path) -> Result<Key> {
        let read = || -> Result<Key> {
            let secret = SecretKeyBox::from_string(&fs::read_to_string(path)?)?;
            let secret =
                secret.into_unencrypted_secret_key().context("is it one without a password, by 'minisign -G -W'?")?;
            Ok(Key { public: PublicKey::from_secret_key(&secret)?, secret })
        };
        read().with_context(|| format!("read the secret key {}", path.display()))
    }

    /// The signature of a file with this name and content.
    pub fn sign(&self, name: &str, content: &[u8]) -> Result<String> {
        let about = format!("file:{name}");
        let signed = minisign::sign(Some(&self.public), &self.secret, Cursor::new(content), Some(&about), None);
        Ok(signed.with_context(|| format!("sign {name}"))?.into_string())
    }

    /// An error where it is not one of this content by this key.
    pub fn check(&self, signature: &str, content: &[u8]) -> Result<()> {
        let signature = SignatureBox::from_string(signature)?;
        ensure!(signature.is_prehashed(), "it is of an old format");
        Ok(minisign::verify(&self.public, &signature, Cursor::new(content), true, false, false)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(directory: &Path, name: &str) -> Key {
        let path = directory.join(name);
        let pair = minisign::KeyPair::generate_unencrypted_keypair().unwrap();
        fs::write(&path, pair.sk.to_box(None).unwrap().into_string()).unwrap();
        Key::read(&path).unwrap()
    }

    #[test]
    fn a_signature_is_that_of_one_content_by_one_key() {
        let directory = tempfile::tempdir().unwrap();
        let (one, other) = (key(directory.path(), "one"), key(directory.path(), "other"));
        let signature = one.sign("a.json", b"content").unwrap();
        one.check(&signature, b"content").unwrap();
        one.check(&signature, b"another").unwrap_err();
        other.check(&signature, b"content").unwrap_err();
        one.check("none", b"content").unwrap_err();
    }

    #[test]
    fn a_key_with_a_password_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        fs::write(&path, "untrusted comment: a\nRWRTY0IyAAAA").unwrap();
        assert!(format!("{:#}", Key::read(&path).err().unwrap()).contains("read the secret key"));
    }
}
