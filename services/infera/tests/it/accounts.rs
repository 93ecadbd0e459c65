//! What a consumer does with an account, on a running network.

use std::{path::Path, process::Command};

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
    let ask = async |key: &str| {
        let body = json!({ "model": network.url("model"),
            "messages": [{ "role": "user", "content": "What is the capital of France?" }] });
        let url = format!("{}/chat/completions", network.url("base_url"));
        let response = network.http.post(url).bearer_auth(key).json(&body).send().await.unwrap();
        (response.status().as_u16(), response.json::<Value>().await.unwrap())
    };
    let (status, refusal) = ask(key.trim()).await;
    assert_eq!((status, &refusal["error"]["code"]), (429, &json!("insufficient_quota")));
    assert!(refusal["error"]["message"].as_str().unwrap().contains(&format!(" {hold} ")), "{refusal}");
    let list = run(&["keys", "list"]);
    assert!(list.contains("laptop") && list.contains("this one") && list.lines().count() == 2, "{list}");
    let jti = list.lines().find(|line| line.contains("laptop")).unwrap().split(' ').next().unwrap();
    run(&["keys", "revoke", jti]);
    assert_eq!(ask(key.trim()).await.0, 401);
    run(&["logout"]);
    let (status, printed) = account(network, &folder, &["keys", "list"]);
    assert!(status == Some(1) && printed.contains("infera account login"), "{printed}");
}
