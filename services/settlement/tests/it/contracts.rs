//! The contracts: their own tests, and that the artifacts in the repository are what the sources give.

#[tokio::test]
async fn artifacts_are_what_the_sources_give() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/contracts/build");
    let output = tokio::process::Command::new(script)
        .arg("--check")
        .env("INFERA_CACHE", infera_testkit::cache_dir())
        .output()
        .await
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
}
