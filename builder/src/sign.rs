//! Signatures in the format of minisign(1), by which nodes believe the root hashes of images.

use std::fs;
use std::io::Cursor;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use minisign::{PublicKey, SecretKey, SignatureBox};

/// A secret key without a password.
pub struct Key {
    secret: SecretKey,
    public: PublicKey,
}

impl Key {
    /// Reads what `minisign -G -W` makes.
    pub fn read(path: &Path) -> Result<Key> {
        let read = || -> Result<Key> {
            let text = fs::read_to_string(path)?;
            let line = text.lines().nth(1).context("it has no second line")?;
            // minisign(1) gives a key without a password no checksum, which this library's own reader would miss.
            let secret = SecretKey::from_bytes(&STANDARD.decode(line.trim())?)?;
            ensure!(!secret.is_encrypted(), "it has a password: make one without, by 'minisign -G -W'");
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
        let mut bytes = pair.sk.to_bytes();
        // As minisign(1) leaves it.
        let checksum = bytes.len() - 32;
        bytes[checksum..].fill(0);
        fs::write(&path, format!("untrusted comment: a\n{}\n", STANDARD.encode(bytes))).unwrap();
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
        let pair = minisign::KeyPair::generate_unencrypted_keypair().unwrap();
        let mut bytes = pair.sk.to_bytes();
        bytes[2..4].copy_from_slice(b"Sc");
        bytes[100] ^= 1;
        for (text, why) in [
            (format!("a\n{}\n", STANDARD.encode(bytes)), "it has a password"),
            ("a".to_owned(), "no second line"),
            ("a\nRWRTY0IyAAAA\n".to_owned(), "read the secret key"),
        ] {
            fs::write(&path, text).unwrap();
            let error = format!("{:#}", Key::read(&path).err().unwrap());
            assert!(error.contains(why), "{error}");
        }
    }
}
