//! What the commands do without a network: a folder, and a gateway in the test's hands.

use std::{
    fs,
    io::{Read, Write},
    net::TcpListener,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::mpsc,
};

use alloy::signers::local::PrivateKeySigner;
use clap::Parser;
use infera_protocol::{
    bytes::{Address, Hash32},
    identity::Domain,
    registry::Manifest,
};
use infera_runtime::{clock, network};
use infera_testkit::TempDir;

use super::session::SignIn;
use crate::cli::Cli;

/// A data folder and an account's folder in it.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let place = Self(TempDir::new().unwrap());
        let manifest = Manifest {
            network: "infera-test".into(),
            domain: Domain { chain_id: 31_337, contract: Address([1; 20]) },
            rpc_url: "http://127.0.0.1:1".into(),
            dispatchers: vec![],
            registry_hash: Hash32([2; 32]),
        };
        network::write_json(&place.path("network.json"), &manifest).unwrap();
        let contracts: serde_json::Map<_, _> =
            ["token", "timelock", "governor", "settlement", "staking", "registry"]
                .into_iter()
                .map(|name| (name.to_owned(), format!("0x{}", "11".repeat(20)).into()))
                .chain([("chain_id".to_owned(), 31_337.into())])
                .collect();
        network::write_json(&place.path("contracts.json"), &contracts).unwrap();
        place.key("wallet.key", 0o600);
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn key(&self, name: &str, mode: u32) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, format!("0x{}\n", "07".repeat(32))).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path
    }

    fn sign_in(&self, gateway: &str, expires_at: i64) {
        let (account, api_key) = ("0xabc".to_owned(), "the-key".to_owned());
        let known =
            SignIn { gateway: gateway.to_owned(), account, api_key, jti: "the-jti".into(), expires_at };
        network::write_json(&self.path("sign-in.json"), &known).unwrap();
    }

    /// `infera account ...` with this folder.
    fn run(&self, arguments: &[&str]) -> Result<(), String> {
        let folder = self.0.path().to_str().unwrap();
        let all = ["infera", "account"].iter().chain(arguments).copied();
        run(all.chain(["--account", folder, "--data", folder]))
    }

    /// What was signed, in 10^-6 INFER.
    fn signed(&self) -> Option<u64> {
        let mut files = fs::read_dir(self.0.path()).unwrap().map(|entry| entry.unwrap().path());
        let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with("voucher-");
        files.find(name).map(|path| fs::read_to_string(path).unwrap().parse().unwrap())
    }
}

fn run<'a>(arguments: impl Iterator<Item = &'a str>) -> Result<(), String> {
    crate::run(Cli::try_parse_from(arguments).unwrap().command).map(drop)
}

/// A gateway that gives these answers (status line and body), and what it heard.
fn gateway(answers: &[(&str, &str)]) -> (String, mpsc::Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let (sender, heard) = mpsc::channel();
    let answers: Vec<String> = answers
        .iter()
        .map(|(status, body)| {
            format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}", body.len())
        })
        .collect();
    std::thread::spawn(move || {
        for answer in answers {
            let (mut socket, _) = listener.accept().unwrap();
            let mut bytes = vec![0; 16 * 1024];
            let read = socket.read(&mut bytes).unwrap();
            sender.send(String::from_utf8_lossy(&bytes[..read]).into_owned()).unwrap();
            socket.write_all(answer.as_bytes()).unwrap();
        }
    });
    (url, heard)
}

/// What `GET /v1/balance` answers to the wallet's key.
fn balance() -> String {
    let wallet: PrivateKeySigner = "07".repeat(32).parse().unwrap();
    format!(r#"{{"account":"{}"}}"#, super::of(wallet.address()))
}

fn later() -> i64 {
    clock::now_secs() + 3_600
}

#[test]
fn a_key_that_others_can_read_is_refused_everywhere() {
    let place = Place::new();
    let folder = place.0.path().to_str().unwrap();
    let (open, closed) = (place.key("open.key", 0o640), place.key("closed.key", 0o600));
    fs::write(place.path("long.key"), "0".repeat(2_000)).unwrap();
    fs::set_permissions(place.path("long.key"), fs::Permissions::from_mode(0o600)).unwrap();
    let commands = |key: &Path| {
        let key = key.to_str().unwrap().to_owned();
        [
            &["operator", "stake", "1"][..],
            &["operator", "claim"],
            &["govern", "delegate"],
            &["govern", "vote", "0x1", "for"],
            &["account", "deposit", "1"],
            &["account", "withdraw"],
        ]
        .map(|command| {
            let gateway = ["--gateway", "http://127.0.0.1:1"];
            let more: &[&str] = if command[0] == "account" { &gateway } else { &[] };
            let all = [&["infera"], command, &["--data", folder, "--key", &key], more].concat();
            run(all.into_iter()).unwrap_err()
        })
    };
    for error in commands(&open) {
        assert!(error.contains("open.key can be read by others: run chmod 600"), "{error}");
    }
    for error in commands(&place.path("long.key")) {
        assert!(error.contains("long.key is too large for a key"), "{error}");
    }
    for error in commands(&place.path("none.key")) {
        assert!(error.contains("none.key") && error.contains("--key"), "{error}");
    }
    for error in commands(&closed) {
        assert!(error.contains("http://127.0.0.1:1"), "only the chain is missing: {error}");
    }
}
#[test]
fn a_voucher_that_cannot_be_brought_is_not_signed() {
    let place = Place::new();
    let error = place.run(&["voucher", "1.5", "--gateway", "http://127.0.0.1:1"]).unwrap_err();
    assert!(error.contains("infera account login"), "{error}");
    assert_eq!(place.signed(), None, "nobody is signed in");

    place.sign_in("http://127.0.0.1:1", later());
    let error = place.run(&["voucher", "1000000000001"]).unwrap_err();
    assert!(error.contains("1000000000000.000000 INFER"), "{error}");
    assert_eq!(place.signed(), None, "settlement takes no such amount");
}

#[test]
fn a_voucher_for_another_account_is_not_signed() {
    let place = Place::new();
    let dead = ("401 Unauthorized", r#"{"error":{"message":"the api key was revoked"}}"#);
    let (url, _heard) = gateway(&[("200 OK", r#"{"account":"demo"}"#), dead, ("200 OK", "{}")]);
    place.sign_in(&url, later());
    let error = place.run(&["voucher", "1.5"]).unwrap_err();
    let wallet = balance();
    let wallet = wallet.split('"').nth(3).unwrap();
    assert!(error.contains("account demo") && error.contains(wallet) && error.contains("--key"), "{error}");
    assert_eq!(place.run(&["voucher", "1.5"]), Err("the api key was revoked".to_owned()));
    let error = place.run(&["voucher", "1.5"]).unwrap_err();
    assert!(error.contains("`account`"), "{error}");
    assert_eq!(place.signed(), None);
}

#[test]
fn a_voucher_that_may_not_have_arrived_counts_as_signed() {
    let place = Place::new();
    let away = ("503 Service Unavailable", r#"{"error":{"message":"come again"}}"#);
    let (url, _heard) = gateway(&[("200 OK", &balance()), away]);
    place.sign_in(&url, later());
    let error = place.run(&["voucher", "1.5"]).unwrap_err();
    assert!(error.contains("come again"), "{error}");
    assert!(
        error.contains("counts as signed") && error.contains("infera account voucher 1.500000"),
        "{error}"
    );
    assert!(error.contains("without --more"), "{error}");
    assert_eq!(place.signed(), Some(1_500_000));
}

#[test]
fn a_voucher_is_what_the_gateway_kept() {
    let place = Place::new();
    let kept = r#"{"account":"0xabc","voucher_micro":2000000}"#;
    let balance = ("200 OK", &*balance());
    let (url, heard) = gateway(&[balance, ("200 OK", kept), balance, ("200 OK", "{}")]);
    place.sign_in(&url, later());
    place.run(&["voucher", "1.5"]).unwrap();
    assert!(heard.recv().unwrap().starts_with("GET /v1/balance "));
    assert!(heard.recv().unwrap().contains(r#""cumulative_micro":"1500000""#));
    let error = place.run(&["voucher", "1.5"]).unwrap_err();
    assert!(error.contains("`voucher_micro`"), "{error}");
    let kept = |micro: u64| super::escrow::kept(&serde_json::json!({ "voucher_micro": micro }), 1_500_000);
    assert_eq!(kept(2_000_000), Ok(2_000_000), "a higher one was brought before");
    assert!(kept(1_000_000).unwrap_err().contains("1.000000 INFER"), "less than was asked is no success");
}

#[test]
fn a_gateway_behind_tls_is_named_by_its_proxy() {
    let place = Place::new();
    for arguments in [&["login"][..], &["balance"], &["voucher", "1"]] {
        let with = [arguments, &["--gateway", "https://gateway.example.org/v1"]].concat();
        let error = place.run(&with).unwrap_err();
        assert!(error.contains("TLS") && error.contains("http://127.0.0.1:PORT"), "{error}");
    }
    assert_eq!(place.signed(), None);
}

#[test]
fn who_signs_out_is_signed_out() {
    let place = Place::new();
    let is_known = || place.path("sign-in.json").exists();
    let (url, heard) = gateway(&[
        ("200 OK", "{}"),
        ("401 Unauthorized", r#"{"error":{"message":"the api key was revoked"}}"#),
        ("503 Service Unavailable", r#"{"error":{"message":"come again"}}"#),
    ]);
    for _ in 0..2 {
        place.sign_in(&url, later());
        place.run(&["logout"]).unwrap();
        let asked = heard.recv().unwrap().to_lowercase();
        assert!(asked.starts_with("delete /v1/keys/the-jti ") && asked.contains("bearer the-key"), "{asked}");
        assert!(!is_known(), "revoked now, or before");
    }
    place.sign_in(&url, later());
    assert_eq!(place.run(&["logout"]), Err("come again".to_owned()));
    assert!(is_known(), "the key is good still");
    // Nobody needs to be asked about what has expired.
    place.sign_in("http://127.0.0.1:1", clock::now_secs() - 1);
    place.run(&["logout"]).unwrap();
    assert!(!is_known());
    let error = place.run(&["logout", "--gateway", &url]).unwrap_err();
    assert!(error.contains("nobody is signed in"), "{error}");
}
