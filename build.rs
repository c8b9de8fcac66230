//! Compiles the wire contracts in `proto/`.

use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto");
    let files = protox::compile(["csi/v1/csi.proto", "pluginregistration/v1/api.proto"], ["proto"])?;
    tonic_prost_build::configure().build_client(true).compile_fds(files)?;
    Ok(())
}
