//! The account's folder, and what is asked of a gateway.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use alloy::signers::local::PrivateKeySigner;
use infera_protocol::registry::Manifest;
use infera_runtime::{clock, network};
use infera_settlement::chain::parse_key;
use reqwest::{Method, Response, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::args::AccountWho;
use crate::{
    client::{UpFile, without_tls},
    contracts::secret,
    layout::{Layout, write_secret},
};

/// Overrides the API key of the sign-in: for accounts without a wallet.
const API_KEY: &str = "INFERA_API_KEY";

/// What a sign-in leaves in the account's folder.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SignIn {
    pub gateway: String,
    pub account: String,
    pub api_key: String,
    pub jti: String,
    /// Seconds since the Unix epoch.
    pub expires_at: i64,
}

impl SignIn {
    fn is_over(&self) -> bool {
        self.expires_at <= clock::now_secs()
    }
}

/// A folder and a gateway.
pub struct Session {
    who: AccountWho,
    gateway: String,
    http: reqwest::Client,
}

impl Session {
    pub fn open(who: &AccountWho) -> Result<Self, String> {
        let signed_in = read_sign_in(&sign_in_path(&who.account)).map(|known| known.gateway);
        let up = || {
            let layout = Layout::existing(&who.data.data).ok()?;
            UpFile::read(&layout).ok()?.base_url.strip_suffix("/v1").map(str::to_owned)
        };
        let gateway = who.gateway.clone().or_else(|| signed_in.ok()).or_else(up).ok_or(
            "no gateway is known: name one with --gateway http://HOST:PORT, or a running network's folder with --data",
        )?;
        let gateway = gateway.trim_end_matches('/').trim_end_matches("/v1").to_owned();
        without_tls(&gateway)?;
        let http = reqwest::Client::builder().no_proxy().build().map_err(|e| e.to_string())?;
        Ok(Self { who: who.clone(), gateway, http })
    }

    pub fn gateway(&self) -> &str {
        &self.gateway
    }

    /// The folder of the network's files.
    pub fn data(&self) -> &Path {
        &self.who.data.data
    }

    pub fn folder(&self) -> &Path {
        &self.who.account
    }

    pub fn key_path(&self) -> PathBuf {
        self.who.key.clone().unwrap_or_else(|| self.who.account.join("wallet.key"))
    }

    /// The wallet.
    pub fn wallet(&self) -> Result<PrivateKeySigner, String> {
        parse_key("the wallet's key", &self.wallet_key()?).map_err(|e| e.to_string())
    }

    /// Its key as the file has it.
    pub fn wallet_key(&self) -> Result<String, String> {
        let remedy = "name it with --key, or make one with `infera account login --new`";
        secret("the wallet's key", &self.key_path(), remedy)
    }

    /// The manifest in the data folder, if there is one.
    pub fn manifest(&self) -> Result<Option<Manifest>, String> {
        let path = self.who.data.data.join("network.json");
        if !path.exists() {
            return Ok(None);
        }
        network::manifest(&path).map(Some).map_err(|e| e.to_string())
    }

    /// The sign-in, if it is good still.
    pub fn sign_in(&self) -> Result<SignIn, String> {
        let known = self.known()?;
        if known.is_over() {
            return Err("the sign-in has expired: `infera account login` makes a new one".into());
        }
        Ok(known)
    }

    /// The sign-in at this gateway, expired or not.
    fn known(&self) -> Result<SignIn, String> {
        let known = read_sign_in(&sign_in_path(&self.who.account))?;
        if known.gateway != self.gateway {
            return Err(format!(
                "the sign-in is for {}: sign in to {} with `infera account login --gateway {}`",
                known.gateway, self.gateway, self.gateway
            ));
        }
        Ok(known)
    }

    /// Revokes the sign-in's key and forgets it. One that has expired, or that the gateway takes no more, is over already.
    pub async fn sign_out(&self) -> Result<SignIn, String> {
        let known = self.known()?;
        if !known.is_over() {
            let path = format!("/v1/keys/{}", known.jti);
            let response = self.send(Method::DELETE, &path, Some(&known.api_key), None).await?;
            if response.status() != StatusCode::UNAUTHORIZED {
                json_of(response).await?;
            }
        }
        let path = sign_in_path(&self.who.account);
        fs::remove_file(&path).map_err(|e| format!("cannot remove {}: {e}", path.display()))?;
        Ok(known)
    }

    pub fn keep(&self, sign_in: &SignIn) -> Result<PathBuf, String> {
        let path = sign_in_path(&self.who.account);
        let bytes = serde_json::to_vec_pretty(sign_in).map_err(|e| e.to_string())?;
        write_secret(&path, &bytes).map_err(|e| format!("cannot write {}: {e}", path.display()))?;
        Ok(path)
    }

    /// The key that requests are sent with.
    pub fn api_key(&self) -> Result<String, String> {
        match std::env::var(API_KEY) {
            Ok(key) if !key.is_empty() => Ok(key),
            _ => self.sign_in().map(|known| known.api_key),
        }
    }

    /// A request without a key.
    pub async fn open_ask(&self, method: Method, path: &str, body: &Value) -> Result<Value, String> {
        json_of(self.send(method, path, None, Some(body)).await?).await
    }

    /// A request with the account's key.
    pub async fn ask(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, String> {
        json_of(self.send(method, path, Some(&self.api_key()?), body).await?).await
    }

    /// Prints an answer as it comes.
    pub async fn pour(&self, path: &str) -> Result<(), String> {
        let mut response = self.send(Method::GET, path, Some(&self.api_key()?), None).await?;
        if !response.status().is_success() {
            return json_of(response).await.map(drop);
        }
        let mut out = std::io::stdout();
        while let Some(chunk) = response.chunk().await.map_err(|e| format!("the answer broke off: {e}"))? {
            match out.write_all(&chunk) {
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
                written => written.map_err(|e| format!("cannot print: {e}"))?,
            }
        }
        Ok(())
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        key: Option<&str>,
        body: Option<&Value>,
    ) -> Result<Response, String> {
        let mut request = self.http.request(method, format!("{}{path}", self.gateway));
        if let Some(key) = key {
            request = request.bearer_auth(key);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        request.send().await.map_err(|e| format!("the gateway {} does not answer: {e}", self.gateway))
    }
}

fn sign_in_path(folder: &Path) -> PathBuf {
    folder.join("sign-in.json")
}

fn read_sign_in(path: &Path) -> Result<SignIn, String> {
    let bytes = fs::read(path).map_err(|_| {
        format!(
            "nobody is signed in ({} is not there): `infera account login`, or set {API_KEY}",
            path.display()
        )
    })?;
    serde_json::from_slice(&bytes).map_err(|e| format!("{} is damaged ({e}): sign in again", path.display()))
}

async fn json_of(response: Response) -> Result<Value, String> {
    let status = response.status();
    let bytes = response.bytes().await.map_err(|e| format!("the answer broke off: {e}"))?;
    let body: Value = serde_json::from_slice(&bytes)
        .map_err(|_| format!("{status}: the answer is not JSON; is that the address of a gateway?"))?;
    if status.is_success() {
        return Ok(body);
    }
    Err(body.pointer("/error/message").and_then(Value::as_str).unwrap_or(status.as_str()).to_owned())
}
