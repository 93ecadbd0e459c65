//! What people use: OpenAI's own Python client.

use std::process::Stdio;

use infera_testkit::cache_dir;

use crate::support::{Column, DEADLINE, MODEL, World, answer};

both!(the_stock_client_is_served);

const TEXT: &str = "Paris is the capital of France, of course.";

async fn the_stock_client_is_served(column: Column) {
    let mut world = World::new(column).await;
    let python = cache_dir().join("venv/bin/python");
    assert!(python.exists(), "{} is missing: run deploy/setup", python.display());
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/openai_client.py");
    let mut client = tokio::process::Command::new(python)
        .arg(script)
        .args([&world.url("/v1"), &world.key, MODEL, TEXT])
        .kill_on_drop(true)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let tokens = answer(TEXT);
    let ended = async {
        loop {
            tokio::select! {
                status = client.wait() => return status.unwrap(),
                submitted = world.net.next() => {
                    if submitted.stream {
                        for at in 0..tokens.len() {
                            let piece = &tokens[at..=at];
                            world.net.deltas(&submitted, &[(1, 1, at as u32, piece), (1, 2, at as u32, piece)]);
                            tokio::task::yield_now().await;
                        }
                    }
                    world.net.answer(&submitted, TEXT);
                }
            }
        }
    };
    let status = tokio::time::timeout(2 * DEADLINE, ended).await.expect("the client ends");
    let mut said = String::new();
    tokio::io::AsyncReadExt::read_to_string(&mut client.stderr.take().unwrap(), &mut said).await.unwrap();
    assert!(status.success(), "{said}");
}
