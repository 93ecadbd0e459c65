//! That the contracts' artifacts in the repository are what the sources give. Their own tests run in deploy/test.

#[tokio::test]
async fn artifacts_are_what_the_sources_give() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/contracts/build");
    let output = tokio::process::Command::new(script)
        .arg("--artifacts")
        .env("INFERA_CACHE", infera_testkit::cache_dir())
        .output()
        .await
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&said));
}
