//! `infera keys`: API keys are signed with the network's key, revocations are kept by the gateway.

use std::process::ExitCode;

use infera_gateway::keys::{AUDIENCE, KEY_SCOPES, MAX_ACCOUNT};
use infera_runtime::{
    db,
    jwt::{Claims, Signer, Verifier},
};

use crate::{
    cli::{KeysArgs, KeysCommand},
    layout::Layout,
    say,
};

/// File name of the signing key.
pub const SIGNER: &str = "api.pem";
const DAY_SECS: i64 = 86_400;

pub fn keys(args: KeysArgs) -> Result<ExitCode, String> {
    match args.command {
        KeysCommand::Create { data, account, days } => {
            let layout = Layout::existing(&data.data)?;
            let signer = Signer::load_or_create(&layout.key(SIGNER)).map_err(|e| e.to_string())?;
            say(create(&signer, &account, i64::from(days))?);
        }
        KeysCommand::Revoke { data, key } => {
            let layout = Layout::existing(&data.data)?;
            let jti = jti_of(&layout, &key)?;
            crate::block_on(revoke(&layout, &jti))??;
            say(format_args!("revoked {jti}"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A new key of `account` for so many days.
pub fn create(signer: &Signer, account: &str, days: i64) -> Result<String, String> {
    if account.is_empty() || account.len() > MAX_ACCOUNT {
        return Err(format!("--account must have 1 to {} bytes", MAX_ACCOUNT));
    }
    signer.issue(&Claims::new(account, AUDIENCE, &KEY_SCOPES, days * DAY_SECS)).map_err(|e| e.to_string())
}

fn jti_of(layout: &Layout, key: &str) -> Result<String, String> {
    if !key.contains('.') {
        return Ok(key.to_owned());
    }
    let verifier = Verifier::from_jwks_file(&layout.jwks()).map_err(|e| e.to_string())?;
    verifier
        .verify(key, AUDIENCE)
        .map(|claims| claims.jti)
        .map_err(|e| format!("that is not a key of this network: {e}"))
}

async fn revoke(layout: &Layout, jti: &str) -> Result<(), String> {
    let config = infera_gateway::Config::load(Some(&layout.config("gateway"))).map_err(|e| e.to_string())?;
    let db = db::connect(config.common.database_url.expose(), config.common.database_schema.as_deref())
        .await
        .map_err(|e| e.to_string())?;
    infera_gateway::keys::revoke(&db, jti).await.map_err(|e| e.to_string())
}
