//! What holders and reporters do on a running network, and what a stranger recomputes of it.

use std::{
    path::Path,
    process::Command,
    sync::{Arc, Mutex},
    time::Duration,
};

use infera_testkit::eventually;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

use crate::network::{Network, infera, text};

fn as_json(printed: &str) -> Value {
    serde_json::from_str(printed).unwrap_or_else(|error| panic!("{error}: {printed}"))
}

pub async fn holders_decide_and_strangers_check(network: &Network) {
    a_model_is_voted_in_and_out(network).await;
    batches_are_recomputed(network).await;
}

async fn a_model_is_voted_in_and_out(network: &Network) {
    let registry: Value = as_json(&std::fs::read_to_string(network.data().join("models.json")).unwrap());
    let mut entry = registry["models"][0].clone();
    entry["weights_root"] = json!(format!("0x{}", "22".repeat(32)));
    let file = network.data().join("entry.json");
    std::fs::write(&file, entry.to_string()).unwrap();
    let file = file.to_str().unwrap();
    let propose = ["govern", "propose", "admit-model", file, "--id", "voted", "--price-cap", "5"];
    let (status, printed) = network.command(&propose);
    assert!(status == Some(1) && printed.contains("infera govern delegate"), "{printed}");
    let printed = network.succeeds(&["govern", "delegate"]);
    assert!(printed.contains("vote by"), "{printed}");
    let (status, printed) = network.command(&[&propose[..], &["--node", "1"]].concat());
    assert!(status == Some(1) && printed.contains("leave out --key and --node"), "{printed}");
    let (status, printed) = network.command(&[&propose[..], &["--threshold", "1.5"]].concat());
    assert!(status == Some(1) && printed.contains("`1.5`"), "{printed}");

    let done = as_json(&network.succeeds(&[&propose[..], &["--json"]].concat()));
    let id = done["proposal"].as_str().unwrap().to_owned();
    let short = &id[..12];
    let (status, printed) = network.command(&["govern", "execute", short]);
    assert!(status == Some(1) && printed.contains("queue it first"), "{printed}");
    let printed = network.succeeds(&["govern", "vote", short, "for"]);
    assert!(printed.contains("Serve voted"), "{printed}");
    let (status, printed) = network.command(&["govern", "vote", short, "against"]);
    assert!(status == Some(1) && printed.contains("has voted already"), "{printed}");
    let printed = network.succeeds(&["govern", "queue", short]);
    assert!(printed.contains("the devnet's time moves"), "{printed}");
    let shown = as_json(&network.succeeds(&["govern", "show", short, "--json"]));
    assert_eq!((&shown["state"], &shown["actions"][0]["call"]), (&json!("queued"), &json!("admit_model")));
    assert_eq!(shown["entries"][0]["entry"]["end_tokens"], entry["end_tokens"], "{shown}");
    let printed = network.succeeds(&["govern", "execute", short]);
    assert!(printed.contains("in force: serve voted"), "{printed}");
    let (status, printed) = network.command(&["govern", "execute", short]);
    assert!(status == Some(1) && printed.contains("executed already"), "{printed}");
    let printed = network.succeeds(&["govern", "list"]);
    assert!(printed.contains("executed") && printed.lines().count() == 1, "{printed}");
    let registry = as_json(&network.succeeds(&["govern", "registry", "--json"]));
    assert_eq!(registry["models"][1]["id"], "voted", "{registry}");
    assert_eq!(registry["models"][1]["price_cap_micro"], 5, "{registry}");
    followed(network, true).await;

    let out = as_json(&network.succeeds(&["govern", "propose", "withdraw-model", "voted", "--json"]));
    let id = out["proposal"].as_str().unwrap();
    for step in [["vote", id, "for"].as_slice(), &["queue", id], &["execute", id]] {
        network.succeeds(&[&["govern"], step].concat());
    }
    let registry = as_json(&network.succeeds(&["govern", "registry", "--json"]));
    assert_eq!(registry["models"][1]["active"], false, "{registry}");
    followed(network, false).await;
}

/// The services' registry has the model, or has it no more.
async fn followed(network: &Network, listed: bool) {
    eventually(Duration::from_secs(60), async || {
        let registry = std::fs::read_to_string(network.data().join("models.json")).unwrap();
        let models = as_json(&registry)["models"].clone();
        let has = models.as_array().unwrap().iter().any(|model| model["id"] == "voted");
        if has == listed { Ok(()) } else { Err(models) }
    })
    .await;
}

async fn batches_are_recomputed(network: &Network) {
    let printed = network.succeeds(&["verify", "--batches", "1.."]);
    assert!(printed.contains("every one holds") && printed.contains("batch 1:"), "{printed}");
    let found = as_json(&network.succeeds(&["verify", "--batches", "1..", "--json"]));
    let last = found.as_array().unwrap().len();
    if last > 1 {
        network.succeeds(&["verify", "--batches", &format!("{last}")]);
    }
    // Of a public network strangers reach the gateway alone.
    let base_url = network.url("base_url");
    let gateway = base_url.trim_end_matches("/v1");
    let printed = network.succeeds(&["verify", "--batches", "1..", "--settlement", gateway]);
    assert!(printed.contains("every one holds"), "{printed}");
    let (status, printed) = network.command(&["verify", "--batches", "999999"]);
    assert!(status == Some(2) && printed.contains("newest batch"), "{printed}");

    type Forge = fn(&mut Value);
    let forgeries: [(Forge, &str); 4] = [
        (|page| page["receipts"][0]["output_tokens"] = json!(1), "batch 1, receipts root"),
        (|page| drop(page["receipts"].as_array_mut().unwrap().pop()), "batch 1, count"),
        (
            |page| {
                let again = page["receipts"][0].clone();
                page["receipts"].as_array_mut().unwrap().push(again);
            },
            "batch 1, request ids",
        ),
        (
            |page| page["receipts"][0]["payments"][0]["amount_micro"] = json!(1_000_000),
            "batch 1, reward root",
        ),
    ];
    let forge: Arc<Mutex<Forge>> = Arc::new(Mutex::new(|_| {}));
    let liar = liar(network, forge.clone()).await;
    let verify = ["verify", "--batches", "1", "--settlement", &liar];
    let ask = async || {
        let (data, arguments) = (network.data().to_owned(), verify.map(str::to_owned));
        tokio::task::spawn_blocking(move || run(&data, &arguments)).await.unwrap()
    };
    assert_eq!(ask().await.0, Some(0), "what is passed on untouched holds");
    for (change, name) in forgeries {
        *forge.lock().unwrap() = change;
        let (status, printed) = ask().await;
        assert!(status == Some(1) && printed.contains(&format!("FAILED   {name}")), "{name}: {printed}");
    }
}

fn run(data: &Path, arguments: &[String]) -> (Option<i32>, String) {
    let output = Command::new(infera()).args(arguments).arg("--data").arg(data).output().unwrap();
    (output.status.code(), text(&output))
}

/// A settlement service that changes what the real one says about receipts.
async fn liar(network: &Network, forge: Arc<Mutex<fn(&mut Value)>>) -> String {
    let (real, http) = (network.url("settlement_url"), network.http.clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut head = vec![0; 4_096];
            let length = stream.read(&mut head).await.unwrap();
            let head = String::from_utf8_lossy(&head[..length]).into_owned();
            let path = head.split(' ').nth(1).unwrap();
            let mut page: Value =
                http.get(format!("{real}{path}")).send().await.unwrap().json().await.unwrap();
            if page.get("receipts").is_some() {
                let forge = *forge.lock().unwrap();
                forge(&mut page);
            }
            let body = page.to_string();
            let answer = format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                body.len()
            );
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    url
}
