//! Container images in registries (distribution-spec).

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use docker_credential::{CredentialRetrievalError, DockerCredential, get_credential_from_reader};
use futures_util::StreamExt;
use oci_client::client::{Certificate, CertificateEncoding, Client, ClientConfig, ClientProtocol};
use oci_client::manifest::OciDescriptor;
use oci_client::secrets::RegistryAuth;
use oci_client::{Reference, RegistryOperation, manifest};
use tokio::runtime::Runtime;

use super::image::Blobs;
use super::progress;

/// How long a registry may say nothing.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often a layer is asked for whose bytes were cut short.
const TRIES: u32 = 4;

const MANIFESTS: &[&str] = &[
    manifest::OCI_IMAGE_MEDIA_TYPE,
    manifest::OCI_IMAGE_INDEX_MEDIA_TYPE,
    manifest::IMAGE_MANIFEST_MEDIA_TYPE,
    manifest::IMAGE_MANIFEST_LIST_MEDIA_TYPE,
];

/// How registries are asked.
#[derive(Debug, clap::Args)]
pub struct Access {
    /// A file with credentials, as `docker login` or a Secret of type kubernetes.io/dockerconfigjson has it
    #[arg(long, env = "REGISTRY_AUTH_FILE", value_name = "FILE")]
    authfile: Option<PathBuf>,
    /// Certificates of authorities to trust beside the system's, in PEM
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
    /// A registry HOST[:PORT] to ask without TLS
    #[arg(long, value_name = "REGISTRY")]
    plain_http: Vec<String>,
}

pub struct Registry {
    client: Client,
    reference: Reference,
    auth: RegistryAuth,
    runtime: Runtime,
}

impl Registry {
    pub fn new(image: &str, access: &Access) -> Result<Registry> {
        // The one of the driver. A second call finds it there.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let reference: Reference = image.parse().with_context(|| format!("{image:?} names no image"))?;
        let mut certificates = Vec::new();
        if let Some(path) = &access.ca_file {
            let data = fs::read(path).with_context(|| format!("read {}", path.display()))?;
            certificates.push(Certificate { encoding: CertificateEncoding::Pem, data });
        }
        let config = ClientConfig {
            protocol: ClientProtocol::HttpsExcept(access.plain_http.clone()),
            extra_root_certificates: certificates,
            read_timeout: Some(PATIENCE),
            connect_timeout: Some(PATIENCE),
            user_agent: concat!("csi-driver-squashfs-build/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        };
        let client = Client::try_from(config).context("prepare to ask registries")?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start")?;
        let auth = access.auth(reference.resolve_registry())?;
        Ok(Registry { client, reference, auth, runtime })
    }

    /// Beforehand, as the client makes of an answer that is none a request of nobody, and takes each token for one.
    fn log_in(&self) -> Result<()> {
        let registry = self.reference.resolve_registry();
        let token = self.client.auth(&self.reference, &self.auth, RegistryOperation::Pull);
        let token = self.runtime.block_on(token).with_context(|| format!("ask {registry} for access"))?;
        let is_one = token.is_none_or(|token| token.bytes().all(|byte| byte.is_ascii_graphic()));
        ensure!(is_one, "ask {registry} for access: the token that it gives is none");
        Ok(())
    }

    fn pull(&self, reference: &Reference) -> Result<Vec<u8>> {
        let pull = self.client.pull_manifest_raw(reference, &self.auth, MANIFESTS);
        let (bytes, _) = self.runtime.block_on(pull).with_context(|| format!("ask for {reference}"))?;
        Ok(bytes.into())
    }

    async fn write(&self, layer: &OciDescriptor, mut file: File) -> Result<()> {
        let mut stream = self.client.pull_blob_stream(&self.reference, layer).await?;
        let (mut size, bar) = (0, progress::bar(&layer.digest, u64::try_from(layer.size).ok()));
        while let Some(bytes) = stream.next().await {
            // The digest is that of the layer, or the last read fails.
            let bytes = bytes?;
            size += bytes.len() as i64;
            ensure!(size <= layer.size, "it has more than the {} bytes that the manifest says", layer.size);
            file.write_all(&bytes)?;
            bar.inc(bytes.len() as u64);
        }
        ensure!(size == layer.size, "it has {size} bytes, and not {}", layer.size);
        Ok(())
    }
}

impl Access {
    fn auth(&self, registry: &str) -> Result<RegistryAuth> {
        let Some(path) = &self.authfile else { return Ok(RegistryAuth::Anonymous) };
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        match get_credential_from_reader(file, registry) {
            Ok(DockerCredential::UsernamePassword(user, password)) => Ok(RegistryAuth::Basic(user, password)),
            Ok(DockerCredential::IdentityToken(_)) => {
                bail!(
                    "{} has an identity token for {registry}, and a user and a password or access token is needed",
                    path.display()
                )
            }
            Err(CredentialRetrievalError::NoCredentialConfigured) => Ok(RegistryAuth::Anonymous),
            Err(error) => bail!("read {}: {error}", path.display()),
        }
    }
}

impl Blobs for Registry {
    /// The last part of its name, and its tag.
    fn name(&self) -> String {
        let name = self.reference.repository().rsplit('/').next().unwrap_or_default();
        self.reference.tag().map_or_else(|| name.to_owned(), |tag| format!("{name}-{tag}"))
    }

    fn by_digest(&self, digest: &str) -> String {
        format!("oci://{}/{}@{digest}", self.reference.registry(), self.reference.repository())
    }

    fn named(&self) -> Result<Vec<u8>> {
        self.log_in()?;
        self.pull(&self.reference)
    }

    fn manifest(&self, digest: &str) -> Result<Vec<u8>> {
        self.pull(&self.reference.clone_with_digest(digest.to_owned()))
    }

    fn fetch(&self, layer: &OciDescriptor, into: &Path) -> Result<()> {
        for attempt in 1.. {
            let file = File::create(into).with_context(|| format!("write {}", into.display()))?;
            match self.runtime.block_on(self.write(layer, file)) {
                Ok(()) => break,
                Err(error) if attempt < TRIES => {
                    eprintln!("layer {}: {error:#}: once more", layer.digest);
                    std::thread::sleep(Duration::from_secs(1 << attempt));
                }
                Err(error) => return Err(error.context(format!("fetch layer {}", layer.digest))),
            }
        }
        Ok(())
    }

    fn look_for(&self, layer: &OciDescriptor) -> Result<()> {
        let look = self.runtime.block_on(self.client.blob_exists(&self.reference, &layer.digest));
        let is_there = look.with_context(|| format!("ask for layer {}", layer.digest))?;
        ensure!(is_there, "{} has no layer {}", self.reference.repository(), layer.digest);
        Ok(())
    }
}
