//! API keys: JSON Web Tokens signed with Ed25519 (`alg: EdDSA`, no other).
//!
//! The gateway's key signs; every service that admits people checks with the public half, a JWKS file.
//! A token is `header.claims.signature` with the header `{"alg":"EdDSA","typ":"JWT","kid":"..."}`.

mod key;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use jsonwebtoken::errors::ErrorKind;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use uuid::Uuid;

use crate::clock;
use key::KeyPair;

/// The issuer of every token of this network.
pub const ISSUER: &str = "infera";
/// The scope for reading receipts with their evidence, at the gateway and at settlement.
pub const SCOPE_RECEIPTS: &str = "receipts";
/// Longest token in bytes; longer ones are refused unread.
pub const MAX_TOKEN: usize = 4096;
/// Largest JWKS file in bytes.
const MAX_JWKS: usize = 64 * 1024;
/// Seconds that clocks of two machines may differ.
const LEEWAY_SECS: u64 = 5;

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claims {
    /// Always [`ISSUER`].
    pub iss: String,
    /// The service that the token is for, as `gateway`.
    pub aud: String,
    /// The account.
    pub sub: String,
    /// What the bearer may do; in the token one string with spaces between (RFC 8693).
    #[serde(serialize_with = "join", deserialize_with = "split", default)]
    pub scope: Vec<String>,
    /// When the token ends, in seconds since the Unix epoch.
    pub exp: i64,
    /// When it was issued, in seconds since the Unix epoch.
    pub iat: i64,
    /// The token's own id, for revocation and for logs.
    pub jti: String,
}

impl Claims {
    /// Claims issued now that last for `ttl_secs`.
    pub fn new(
        account: impl Into<String>,
        audience: impl Into<String>,
        scope: &[&str],
        ttl_secs: i64,
    ) -> Self {
        let iat = clock::now_secs();
        Self {
            iss: ISSUER.to_owned(),
            aud: audience.into(),
            sub: account.into(),
            scope: scope.iter().map(|&name| name.to_owned()).collect(),
            exp: iat.saturating_add(ttl_secs),
            iat,
            jti: Uuid::now_v7().to_string(),
        }
    }

    /// True when the bearer may do `scope`.
    pub fn allows(&self, scope: &str) -> bool {
        self.scope.iter().any(|name| name == scope)
    }
}

fn join<S: Serializer>(scope: &[String], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&scope.join(" "))
}

fn split<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    Ok(String::deserialize(deserializer)?.split_ascii_whitespace().map(str::to_owned).collect())
}

/// Why a token is refused. Messages are for clients: they tell nothing that a forger could use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JwtError {
    #[error("the api key is not a token of this network")]
    Malformed,
    #[error("the api key uses another algorithm than EdDSA")]
    Algorithm,
    #[error("the api key does not name the key that signed it (kid)")]
    MissingKid,
    #[error("the api key was signed with a key that this network does not know")]
    UnknownKid,
    #[error("the api key's signature is wrong")]
    Signature,
    #[error("the api key's claim `{0}` is missing or has the wrong form")]
    Claim(String),
    #[error("the api key comes from another issuer")]
    Issuer,
    #[error("the api key is for another service")]
    Audience,
    #[error("the api key is not valid yet")]
    NotYet,
    #[error("the api key has expired; create a new one")]
    Expired,
}

impl JwtError {
    /// The code in an OpenAI error body: `expired_api_key`, or `invalid_api_key` for all others.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Expired => "expired_api_key",
            _ => "invalid_api_key",
        }
    }
}

impl From<JwtError> for crate::http::ApiError {
    fn from(error: JwtError) -> Self {
        Self::unauthorized(error.code(), error.to_string())
    }
}

/// Why a key or a key set cannot be used; one sentence each.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("the file {} cannot be used: {source}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    #[error("the key {} can be read by others: run chmod 600 on it", path.display())]
    Exposed { path: PathBuf },
    #[error("{} holds no usable key: {reason}", path.display())]
    Content { path: PathBuf, reason: String },
    #[error("the token cannot be signed: {0}")]
    Sign(String),
}

/// Issues tokens.
pub struct Signer {
    key: EncodingKey,
    kid: String,
    public: [u8; 32],
}

impl Signer {
    /// Loads the PKCS8 PEM file `path` (as `openssl genpkey -algorithm ed25519` writes it), or creates it
    /// with mode 0600. Processes that create it at the same time end up with one key.
    ///
    /// # Errors
    /// [`KeyError`]; also when the file can be read by other users.
    pub fn load_or_create(path: &Path) -> Result<Self, KeyError> {
        KeyPair::load_or_create(path).map(|pair| Self::of(&pair))
    }

    /// The same for a file that must be there: a service does not make up a key that nobody else knows.
    ///
    /// # Errors
    /// [`KeyError`]; also when the file can be read by other users.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        KeyPair::load(path).map(|pair| Self::of(&pair))
    }

    fn of(pair: &KeyPair) -> Self {
        Self { key: EncodingKey::from_ed_der(&pair.pkcs8()), kid: pair.kid(), public: pair.public() }
    }

    /// Signs `claims`.
    ///
    /// # Errors
    /// [`KeyError::Sign`].
    pub fn issue(&self, claims: &Claims) -> Result<String, KeyError> {
        let header = Header { kid: Some(self.kid.clone()), ..Header::new(Algorithm::EdDSA) };
        jsonwebtoken::encode(&header, claims, &self.key).map_err(|error| KeyError::Sign(error.to_string()))
    }

    /// The name of the key in tokens and in the key set.
    pub fn kid(&self) -> &str {
        &self.kid
    }

    /// The key set with the public half: `{"keys":[{"kty":"OKP","crv":"Ed25519",...}]}` (RFC 8037).
    pub fn jwks(&self) -> serde_json::Value {
        serde_json::json!({ "keys": [key::jwk(&self.kid, &self.public)] })
    }

    /// Writes [`Signer::jwks`] to `path`, as a whole or not at all.
    ///
    /// # Errors
    /// [`KeyError::File`].
    pub fn write_jwks(&self, path: &Path) -> Result<(), KeyError> {
        key::write_atomically(path, &format!("{:#}\n", self.jwks()), 0o644)
    }
}

/// Checks tokens; clones share the keys.
#[derive(Clone)]
pub struct Verifier {
    keys: std::sync::Arc<HashMap<String, DecodingKey>>,
}

impl Verifier {
    /// Reads the key set in `path`. All its keys must be Ed25519 and have a `kid`.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn from_jwks_file(path: &Path) -> Result<Self, KeyError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| KeyError::File { path: path.to_owned(), source })?;
        Self::from_jwks(&text).map_err(|reason| KeyError::Content { path: path.to_owned(), reason })
    }

    /// Reads the key set in `text`.
    ///
    /// # Errors
    /// A sentence that names the key and what is wrong with it.
    pub fn from_jwks(text: &str) -> Result<Self, String> {
        if text.len() > MAX_JWKS {
            return Err(format!("it is larger than {MAX_JWKS} bytes"));
        }
        let mut keys = HashMap::new();
        for (kid, public) in key::parse_jwks(text)? {
            if keys.insert(kid.clone(), DecodingKey::from_ed_der(&public)).is_some() {
                return Err(format!("two keys have the kid `{kid}`"));
            }
        }
        if keys.is_empty() {
            return Err("the list `keys` is empty".to_owned());
        }
        Ok(Self { keys: std::sync::Arc::new(keys) })
    }

    /// Checks signature, algorithm, `kid`, `iss`, `aud` and `exp` of `token`.
    ///
    /// # Errors
    /// [`JwtError`]; its `code()` is what a client gets.
    pub fn verify(&self, token: &str, audience: &str) -> Result<Claims, JwtError> {
        if token.len() > MAX_TOKEN {
            return Err(JwtError::Malformed);
        }
        // Before the algorithm is known to be ours, nothing of the token is used but its kid.
        let header = jsonwebtoken::decode_header(token).map_err(|error| refusal(&error))?;
        if header.alg != Algorithm::EdDSA {
            return Err(JwtError::Algorithm);
        }
        let kid = header.kid.ok_or(JwtError::MissingKid)?;
        let key = self.keys.get(&kid).ok_or(JwtError::UnknownKid)?;
        let mut validation = Validation::new(Algorithm::EdDSA);
        validation.set_required_spec_claims(&["exp", "aud", "iss"]);
        validation.set_audience(&[audience]);
        validation.set_issuer(&[ISSUER]);
        validation.validate_nbf = true;
        validation.leeway = LEEWAY_SECS;
        // First as any JSON, so that the checks above name the claim that is wrong.
        let claims = jsonwebtoken::decode::<serde_json::Value>(token, key, &validation)
            .map_err(|error| refusal(&error))?
            .claims;
        serde_json::from_value(claims).map_err(|_| JwtError::Malformed)
    }
}

fn refusal(error: &jsonwebtoken::errors::Error) -> JwtError {
    match error.kind() {
        ErrorKind::InvalidSignature => JwtError::Signature,
        ErrorKind::ExpiredSignature => JwtError::Expired,
        ErrorKind::ImmatureSignature => JwtError::NotYet,
        ErrorKind::InvalidIssuer => JwtError::Issuer,
        ErrorKind::InvalidAudience => JwtError::Audience,
        ErrorKind::MissingRequiredClaim(name) | ErrorKind::InvalidClaimFormat(name) => {
            JwtError::Claim(name.clone())
        }
        ErrorKind::InvalidAlgorithm
        | ErrorKind::InvalidAlgorithmName
        | ErrorKind::MissingAlgorithm
        | ErrorKind::UnsupportedAlgorithm => JwtError::Algorithm,
        _ => JwtError::Malformed,
    }
}
