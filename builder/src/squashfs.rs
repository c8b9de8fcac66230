//! File systems, made by tar2sqfs(1) of squashfs-tools-ng: beside sqfstar(1) it takes as long and a thirtieth of the memory, and it gives
//! the root what the tar says.

use std::io::{BufWriter, Read, Seek, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// How data is compressed.
#[derive(Clone, Debug, clap::Args)]
pub struct Format {
    /// The compressor: the nodes' kernels must have it
    #[arg(long = "comp", value_name = "NAME", default_value = "zstd")]
    compressor: String,
    /// How much is compressed in one piece, such as 128K or 1M
    #[arg(long, value_name = "SIZE", default_value = "128K")]
    block_size: String,
}

impl Format {
    /// Makes a file system of the tar that `write` writes: the same for the same bytes.
    pub fn make(&self, image: &Path, write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
        let Format { compressor, block_size } = self;
        let directory = image.parent().unwrap_or(Path::new("/"));
        let disk = rustix::fs::statvfs(directory).with_context(|| format!("look at {}", directory.display()))?;
        let mut said = tempfile::tempfile().context("make a temporary file")?;
        let output = || said.try_clone().map(Stdio::from).context("open a temporary file");
        let mut child = Command::new("tar2sqfs")
            .args([
                "--quiet",
                "--force",
                "--no-skip",
                "--exportable",
                "--compressor",
                compressor,
                "--block-size",
                block_size,
            ])
            .arg(image)
            .stdin(Stdio::piped())
            .stdout(output()?)
            .stderr(output()?)
            .spawn()
            .context("start tar2sqfs: is squashfs-tools-ng installed?")?;
        let mut stdin = BufWriter::with_capacity(1 << 20, child.stdin.take().context("write to tar2sqfs")?);
        let written = write(&mut stdin).and_then(|()| Ok(stdin.flush()?));
        if written.is_err() {
            // It must not be told that the tar ends here.
            child.kill().context("end tar2sqfs")?;
        }
        drop(stdin);
        let status = child.wait().context("wait for tar2sqfs")?;
        let is_pipe = |error: &anyhow::Error| {
            let error = error.root_cause().downcast_ref::<std::io::Error>();
            error.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
        };
        match written {
            Ok(()) if status.success() => return Ok(()),
            // It says why it reads no more.
            Err(error) if !is_pipe(&error) => return Err(error),
            _ => {}
        }
        let mut text = Vec::new();
        said.rewind().and_then(|()| said.take(64 << 10).read_to_end(&mut text)).context("read a temporary file")?;
        // A full disk it tells from no other failure.
        let free = disk.f_bavail * disk.f_frsize;
        let said = String::from_utf8_lossy(&text);
        bail!("tar2sqfs {}, where {free} bytes were free: {status}: {}", image.display(), said.trim())
    }
}
