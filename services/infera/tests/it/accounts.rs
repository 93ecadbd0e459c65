//! What a consumer does with an account, on a running network.

use std::{path::Path, process::Command, time::Duration};

use infera_testkit::eventually;
use serde_json::{Value, json};

use crate::network::{Network, infera, text};

/// `infera account` with a folder of its own: exit status and what it printed.
fn account(network: &Network, folder: &Path, arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(infera());
    command.arg("account").args(arguments).arg("--account").arg(folder).arg("--data").arg(network.data());
    let output = command.env_remove("INFERA_API_KEY").output().unwrap();
    (output.status.code(), text(&output))
}

/// Sign in, make a key, ask with it, sign out.
pub async fn wallets_have_accounts(network: &Network) {
    let folder = network.data().join("a-wallet");
    let run = |arguments: &[&str]| {
        let (status, printed) = account(network, &folder, arguments);
        assert_eq!(status, Some(0), "{arguments:?}: {printed}");
        printed
    };
    let (status, printed) = account(network, &folder, &["balance"]);
    assert!(status == Some(1) && printed.contains("infera account login"), "{printed}");
    let (status, printed) = account(network, &folder, &["login"]);
    assert!(status == Some(1) && printed.contains("--new"), "{printed}");
    let printed = run(&["login", "--new"]);
    assert!(printed.contains("signed in to http://127.0.0.1:"), "{printed}");
    let secret = std::fs::metadata(folder.join("sign-in.json")).unwrap();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&secret.permissions()) & 0o777, 0o600);
    let balance: Value = serde_json::from_str(&run(&["balance", "--json"])).unwrap();
    let name = balance["account"].as_str().unwrap();
    assert!(printed.contains(name) && name.len() == 42 && name.starts_with("0x"), "{balance}");
    assert_eq!(balance["available_micro"], 0);

    // A key of its own, which a wallet without money cannot use for much: the quote says what is missing.
    let quote: Value =
        serde_json::from_str(&run(&["quote", "--json", "What is the capital of France?"])).unwrap();
    let hold = quote["hold_micro"].as_u64().unwrap();
    assert!(hold > 0, "{quote}");
    let key = run(&["keys", "create", "laptop", "--days", "7", "--scope", "chat"]);
    let (status, refusal) = ask(network, key.trim()).await;
    assert_eq!((status, &refusal["error"]["code"]), (429, &json!("insufficient_quota")));
    assert!(refusal["error"]["message"].as_str().unwrap().contains(&format!(" {hold} ")), "{refusal}");
    let list = run(&["keys", "list"]);
    assert!(list.contains("laptop") && list.contains("this one") && list.lines().count() == 2, "{list}");
    let jti = list.lines().find(|line| line.contains("laptop")).unwrap().split(' ').next().unwrap();
    a_deposit_is_spent(network, &folder, &run, key.trim()).await;
    run(&["keys", "revoke", jti]);
    assert_eq!(ask(network, key.trim()).await.0, 401);
    run(&["logout"]);
    let (status, printed) = account(network, &folder, &["keys", "list"]);
    assert!(status == Some(1) && printed.contains("infera account login"), "{printed}");
}

async fn ask(network: &Network, key: &str) -> (u16, Value) {
    let messages = json!([{ "role": "user", "content": "What is the capital of France?" }]);
    let body = json!({ "model": network.url("model"), "messages": messages });
    let url = format!("{}/chat/completions", network.url("base_url"));
    let response = network.http.post(url).bearer_auth(key).json(&body).send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

/// Deposit, voucher, an answer, what it cost, and a part of the money back.
async fn a_deposit_is_spent(network: &Network, folder: &Path, run: &impl Fn(&[&str]) -> String, key: &str) {
    let fails = |arguments: &[&str], says: &str| {
        let (status, printed) = account(network, folder, arguments);
        assert!(status == Some(1) && printed.contains(says), "{arguments:?}: {printed}");
    };
    let balance = || -> Value { serde_json::from_str(&run(&["balance", "--json"])).unwrap() };
    fails(&["deposit", "2"], "--faucet");
    fails(&["deposit", "two", "--faucet"], "`two`");
    let printed = run(&["deposit", "2", "--faucet"]);
    assert!(printed.contains("deposited 2.000000 INFER"), "{printed}");
    eventually(Duration::from_secs(60), async || {
        let balance = balance();
        (balance["escrow"]["escrow_micro"] == 2_000_000).then_some(()).ok_or(balance)
    })
    .await;
    assert_eq!(balance()["available_micro"], 0, "nothing is spent without a voucher");
    run(&["voucher", "1.5"]);
    assert_eq!(balance()["available_micro"], 1_500_000);

    let (status, answer) = ask(network, key).await;
    assert_eq!((status, &answer["infera"]["verdict"]), (200, &json!("verified")), "{answer}");
    let tokens = answer["usage"]["total_tokens"].as_u64().unwrap();
    let receipt = answer["infera"]["receipt"].as_str().unwrap();
    // The client may have its answer before settlement has the verdict.
    let charged = eventually(Duration::from_secs(30), async || {
        let balance = balance();
        balance["charged_micro"].as_u64().filter(|charged| *charged > 0).ok_or(balance)
    })
    .await;
    let price =
        network.get(&format!("{}/models", network.url("base_url"))).await["data"][0]["infera"].clone();
    let (price, replicas) = (price["price_micro"].as_u64().unwrap(), price["replicas"].as_u64().unwrap());
    assert_eq!(charged, tokens * price * replicas);
    assert_eq!(balance()["available_micro"], 1_500_000 - charged);
    let used = run(&["usage"]);
    assert!(used.contains(receipt) && used.contains("settled"), "{used}");
    let csv = run(&["usage", "--csv", "--from", "2026-01-01T00:00:00Z"]);
    let lines: Vec<&str> = csv.lines().collect();
    assert!(lines[0].starts_with("request_id,model,"), "{csv}");
    assert!(lines.iter().any(|line| line.starts_with(receipt)), "{csv}");
    let statement = run(&["statement"]);
    assert!(
        ["opening", "deposit", "charge", "closing"].iter().all(|kind| statement.contains(kind)),
        "{statement}"
    );
    fails(&["usage", "--from", "yesterday"], "`from`");

    fails(&["voucher", "1"], "1.500000 INFER was signed before");
    run(&["voucher", "0.25", "--more"]);
    assert_eq!(balance()["escrow"]["voucher_micro"], 1_750_000);
    let printed = run(&["withdraw", "0.5"]);
    assert!(printed.contains("0.500000 INFER is on its way out"), "{printed}");
    fails(&["withdraw"], "too early");
    run(&["withdraw", "--cancel"]);
}
