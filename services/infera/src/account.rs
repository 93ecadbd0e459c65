//! `infera account`: a consumer's side: over the gateway sign in with a wallet, keys, balance, usage, statement, quotes
//! and vouchers; on the chain deposits and withdrawals.

use std::{fs, process::ExitCode};

use alloy::primitives::Address as EvmAddress;
use infera_protocol::{
    bytes::Address,
    rfc3339,
    siwe::{self, Message, Origin},
};
use reqwest::Method;
use serde_json::{Value, json};

mod args;
mod escrow;
mod session;
mod show;
#[cfg(test)]
#[path = "account/tests.rs"]
mod tests_without_a_network;

pub use args::AccountArgs;
use args::{AccountCommand, AccountKeysCommand, AccountWho, Period};
use session::{Session, SignIn};

use crate::{layout::write_secret, say};

/// What the message says to whoever signs it. The gateway's own words are not signed.
const STATEMENT: &str = "Sign in to Infera with the infera command. This moves no money.";
/// A nonce's answer is good for less than an hour; what says more is not believed.
const MAX_LIFE_MS: i64 = 3_600_000;

pub fn account(args: &AccountArgs) -> Result<ExitCode, String> {
    crate::block_on(run(&args.command))?.map(|()| ExitCode::SUCCESS)
}

async fn run(command: &AccountCommand) -> Result<(), String> {
    match command {
        AccountCommand::Login { who, new, origin } => login(who, *new, origin.as_deref()).await,
        AccountCommand::Logout { who } => logout(who).await,
        AccountCommand::Keys { command } => keys(command).await,
        AccountCommand::Balance { who, json } => {
            let balance = Session::open(who)?.ask(Method::GET, "/v1/balance", None).await?;
            if *json { show::json(&balance) } else { show::balance(&balance) }
        }
        AccountCommand::Usage { who, period, model, limit, cursor } => {
            let limit = limit.to_string();
            let more = [("model", model.as_deref()), ("limit", Some(&*limit)), ("cursor", cursor.as_deref())];
            table(who, "/v1/usage", period, &more, show::usage).await
        }
        AccountCommand::Statement { who, period, limit, cursor } => {
            let limit = limit.to_string();
            let more = [("limit", Some(&*limit)), ("cursor", cursor.as_deref())];
            table(who, "/v1/statement", period, &more, show::statement).await
        }
        AccountCommand::Quote { who, prompt, model, max_tokens, json } => {
            quote(who, prompt, model.as_deref(), *max_tokens, *json).await
        }
        AccountCommand::Deposit { who, chain, amount, faucet } => {
            escrow::deposit(who, chain, amount, *faucet).await
        }
        AccountCommand::Voucher { who, amount, more } => escrow::voucher(who, amount, *more).await,
        AccountCommand::Withdraw { who, chain, amount, cancel } => {
            escrow::withdraw(who, chain, amount.as_deref(), *cancel).await
        }
    }
}

async fn login(who: &AccountWho, new: bool, origin: Option<&str>) -> Result<(), String> {
    let session = Session::open(who)?;
    fs::create_dir_all(session.folder())
        .map_err(|e| format!("cannot make the folder {}: {e}", session.folder().display()))?;
    let key_path = session.key_path();
    if new && !key_path.exists() {
        let key: [u8; 32] = rand::random();
        write_secret(&key_path, format!("0x{}\n", hex::encode(key)).as_bytes())
            .map_err(|e| format!("cannot write {}: {e}", key_path.display()))?;
        say(format_args!("made a wallet key: {}; whoever has this file has the account", key_path.display()));
    }
    let wallet = session.wallet()?;
    let nonce = session.open_ask(Method::POST, "/v1/auth/nonce", &json!({})).await?;
    let chain_id = session.manifest()?.map(|manifest| manifest.domain.chain_id);
    let text =
        message(&nonce, origin.unwrap_or(session.gateway()), chain_id, of(wallet.address()))?.to_string();
    let signature = siwe::sign(&text, wallet.credential()).map_err(|e| e.to_string())?;
    let body = json!({ "message": text, "signature": signature });
    let answer = session.open_ask(Method::POST, "/v1/auth/login", &body).await?;
    let sign_in = SignIn {
        gateway: session.gateway().to_owned(),
        account: field(&answer, "account")?.to_owned(),
        api_key: field(&answer, "api_key")?.to_owned(),
        jti: field(&answer, "jti")?.to_owned(),
        expires_at: answer.get("expires_at").and_then(Value::as_i64).unwrap_or(0),
    };
    let path = session.keep(&sign_in)?;
    say(format_args!("signed in to {} as {}", sign_in.gateway, sign_in.account));
    say(format_args!(
        "the API key is in {}, until {}",
        path.display(),
        rfc3339::format_ms(sign_in.expires_at.saturating_mul(1_000))
    ));
    Ok(())
}

/// The message to sign. It is for the gateway that the user named, or there is none: another one could pass on its
/// own nonce for that of a third.
fn message(nonce: &Value, gateway: &str, chain_id: Option<u64>, address: Address) -> Result<Message, String> {
    let origin = Origin::of(gateway).ok_or_else(|| format!("{gateway} is not http://HOST:PORT"))?;
    let (domain, uri) = (field(nonce, "domain")?, field(nonce, "uri")?);
    if domain != origin.domain() || Origin::of(uri).as_ref() != Some(&origin) {
        return Err(format!(
            "{gateway} asks for a sign-in to {uri}, which is not itself: name the gateway with --gateway as it names \
             itself, behind a proxy of yours with --origin, or do not trust it"
        ));
    }
    let named = nonce.get("chain_id").and_then(Value::as_u64).ok_or("the gateway names no chain")?;
    if let Some(expected) = chain_id.filter(|expected| *expected != named) {
        return Err(format!(
            "{gateway} is on chain {named}, network.json in the data folder is of chain {expected}: name another with --data"
        ));
    }
    let issued_at_ms =
        rfc3339::parse_ms(field(nonce, "issued_at")?).ok_or("the gateway's issued_at is no time")?;
    let message = Message {
        scheme: None,
        domain: domain.to_owned(),
        address,
        statement: Some(STATEMENT.to_owned()),
        uri: uri.to_owned(),
        chain_id: named,
        nonce: field(nonce, "nonce")?.to_owned(),
        issued_at_ms,
        expiration_ms: Some(issued_at_ms.saturating_add(MAX_LIFE_MS)),
        not_before_ms: None,
        request_id: None,
        resources: Vec::new(),
    };
    // What the gateway sent might have lines of its own.
    match Message::parse(&message.to_string()) {
        Ok(read) if read == message => Ok(message),
        _ => Err("the gateway's nonce is not one that can be signed: do not trust it".to_owned()),
    }
}

async fn logout(who: &AccountWho) -> Result<(), String> {
    let known = Session::open(who)?.sign_out().await?;
    say(format_args!("signed out of {}", known.gateway));
    Ok(())
}

async fn keys(command: &AccountKeysCommand) -> Result<(), String> {
    match command {
        AccountKeysCommand::List { who } => {
            let list = Session::open(who)?.ask(Method::GET, "/v1/keys", None).await?;
            show::keys(&list)
        }
        AccountKeysCommand::Create { who, name, days, scopes } => {
            let scopes = (!scopes.is_empty()).then_some(scopes);
            let body = json!({ "name": name, "days": days, "scopes": scopes });
            let made = Session::open(who)?.ask(Method::POST, "/v1/keys", Some(&body)).await?;
            say(field(&made, "api_key")?);
            Ok(())
        }
        AccountKeysCommand::Revoke { who, jti } => {
            let escaped: String = jti.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').collect();
            if escaped != *jti || jti.is_empty() {
                return Err(format!("`{jti}` is no jti: `infera account keys list` shows them"));
            }
            Session::open(who)?.ask(Method::DELETE, &format!("/v1/keys/{jti}"), None).await?;
            say(format_args!("revoked {jti}"));
            Ok(())
        }
    }
}

/// A list over a period: printed, or poured out as CSV.
async fn table(
    who: &AccountWho,
    path: &str,
    period: &Period,
    more: &[(&str, Option<&str>)],
    print: fn(&Value) -> Result<(), String>,
) -> Result<(), String> {
    let session = Session::open(who)?;
    let format = period.csv.then_some("csv");
    let own = [("from", period.from.as_deref()), ("to", period.to.as_deref()), ("format", format)];
    let given = own.iter().chain(more).filter_map(|(name, value)| value.map(|value| (*name, value)));
    // The host is a place holder: only the query is taken.
    let url = reqwest::Url::parse_with_params("http://gateway", given).map_err(|e| e.to_string())?;
    let target = match url.query() {
        Some(query) if !query.is_empty() => format!("{path}?{query}"),
        _ => path.to_owned(),
    };
    if period.csv {
        return session.pour(&target).await;
    }
    print(&session.ask(Method::GET, &target, None).await?)
}

async fn quote(
    who: &AccountWho,
    prompt: &str,
    model: Option<&str>,
    max_tokens: Option<u32>,
    json: bool,
) -> Result<(), String> {
    let session = Session::open(who)?;
    let model = match model {
        Some(model) => model.to_owned(),
        None => {
            let models = session.ask(Method::GET, "/v1/models", None).await?;
            let first = models.pointer("/data/0/id").and_then(Value::as_str);
            first.ok_or("the gateway serves no model")?.to_owned()
        }
    };
    let messages = json!([{ "role": "user", "content": prompt }]);
    let body = json!({ "model": model, "messages": messages, "max_tokens": max_tokens });
    let quote = session.ask(Method::POST, "/v1/quote", Some(&body)).await?;
    if json { show::json(&quote) } else { show::quote(&quote) }
}

fn of(address: EvmAddress) -> Address {
    Address(address.into_array())
}

fn field<'a>(body: &'a Value, name: &str) -> Result<&'a str, String> {
    body.get(name).and_then(Value::as_str).ok_or_else(|| format!("the gateway's answer has no `{name}`"))
}

#[cfg(test)]
mod tests {
    use alloy::signers::{SignerSync, local::PrivateKeySigner};

    use super::*;

    fn nonce() -> Value {
        json!({
            "nonce": "abcdefgh12345678",
            "domain": "127.0.0.1:8080",
            "uri": "http://127.0.0.1:8080",
            "chain_id": 31_337,
            "issued_at": "2026-11-23T04:10:00.000Z",
        })
    }

    fn with(name: &str, value: Value) -> Value {
        let mut nonce = nonce();
        nonce[name] = value;
        nonce
    }

    #[test]
    fn another_gateways_nonce_is_not_signed() {
        let (here, address) = ("http://127.0.0.1:8080", Address([7; 20]));
        let signed = message(&nonce(), here, Some(31_337), address).unwrap();
        assert_eq!((signed.address, signed.chain_id), (address, 31_337));
        assert!(message(&nonce(), here, None, address).is_ok());
        for (nonce, gateway, says) in [
            (nonce(), "http://127.0.0.1:9090", "not itself"),
            (nonce(), "https://127.0.0.1:8080", "not itself"),
            (with("domain", "bank.example.org".into()), here, "not itself"),
            (with("uri", "http://bank.example.org".into()), here, "not itself"),
            (with("chain_id", 1.into()), here, "chain 1"),
            (with("nonce", "abcdefgh\nChain ID: 1".into()), here, "do not trust it"),
            (with("nonce", "short".into()), here, "do not trust it"),
            (with("uri", "http://127.0.0.1:8080/\nVersion: 1".into()), here, "do not trust it"),
            (with("issued_at", "now".into()), here, "issued_at"),
            (json!({}), here, "`domain`"),
        ] {
            let error = message(&nonce, gateway, Some(31_337), address).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }

    #[test]
    fn a_signature_is_the_one_that_wallets_make() {
        let wallet: PrivateKeySigner =
            "0xac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80".parse().unwrap();
        let text =
            message(&nonce(), "http://127.0.0.1:8080", None, of(wallet.address())).unwrap().to_string();
        let ours = siwe::sign(&text, wallet.credential()).unwrap();
        let theirs = wallet.sign_message_sync(text.as_bytes()).unwrap();
        assert_eq!(ours.0, theirs.as_bytes());
        assert_eq!(siwe::digest("hello").0, alloy::primitives::eip191_hash_message("hello").0);
        assert_eq!(siwe::checksummed(&of(wallet.address())), wallet.address().to_checksum(None));
    }
}
