//! Compiles `proto/` with protox, so that no protoc is needed.
use std::io;

fn main() -> io::Result<()> {
    let root = "../../proto";
    println!("cargo:rerun-if-changed={root}");
    let files = ["common", "node", "events"].map(|name| format!("{root}/infera/v1/{name}.proto"));
    let descriptors = protox::compile(files, [root]).map_err(io::Error::other)?;
    prost_build::Config::new().compile_fds(descriptors)
}
