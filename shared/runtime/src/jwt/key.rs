//! Ed25519 keys as files: PKCS8 PEM for the private half, JWK for the public half.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use ed25519_dalek::{SigningKey, VerifyingKey};
use serde::Deserialize;
use uuid::Uuid;

use super::KeyError;

/// What stands before the 32 bytes of a seed in a PKCS8 version 1 document (RFC 8410, section 7).
const PKCS8_HEAD: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];
const PEM_BEGIN: &str = "-----BEGIN PRIVATE KEY-----";
const PEM_END: &str = "-----END PRIVATE KEY-----";
/// A key file has about 120 bytes.
const MAX_FILE: u64 = 4096;

pub(super) struct KeyPair(SigningKey);

impl KeyPair {
    pub(super) fn load_or_create(path: &Path) -> Result<Self, KeyError> {
        if !path.try_exists().map_err(file_error(path))? {
            Self(SigningKey::from_bytes(&rand::random())).create(path)?;
        }
        Self::load(path)
    }

    pub(super) fn load(path: &Path) -> Result<Self, KeyError> {
        let meta = fs::metadata(path).map_err(file_error(path))?;
        if meta.permissions().mode() & 0o077 != 0 {
            return Err(KeyError::Exposed { path: path.to_owned() });
        }
        let content = |reason: &str| KeyError::Content { path: path.to_owned(), reason: reason.to_owned() };
        if meta.len() > MAX_FILE {
            return Err(content("it is too large for a key"));
        }
        let text = fs::read_to_string(path).map_err(file_error(path))?;
        let seed = seed_of_pem(&text).ok_or_else(|| {
            content("it must be a PKCS8 PEM of an Ed25519 key (openssl genpkey -algorithm ed25519)")
        })?;
        Ok(Self(SigningKey::from_bytes(&seed)))
    }

    /// Writes the key beside `path` and links it there: whoever comes second keeps the first one's key.
    fn create(&self, path: &Path) -> Result<(), KeyError> {
        let pem = format!("{PEM_BEGIN}\n{}\n{PEM_END}\n", STANDARD.encode(self.pkcs8()));
        let beside = write_beside(path, &pem, 0o600)?;
        let linked = fs::hard_link(&beside, path);
        // Left over it would only be a second copy; nothing depends on its removal.
        let _ = fs::remove_file(&beside);
        match linked {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(file_error(path)(error)),
            _ => Ok(()),
        }
    }

    pub(super) fn pkcs8(&self) -> Vec<u8> {
        [PKCS8_HEAD.as_slice(), self.0.as_bytes()].concat()
    }

    pub(super) fn public(&self) -> [u8; 32] {
        self.0.verifying_key().to_bytes()
    }

    /// The first half of the public key: as unique as the key, and the same wherever it is computed.
    pub(super) fn kid(&self) -> String {
        URL_SAFE_NO_PAD.encode(&self.public()[..16])
    }
}

fn seed_of_pem(text: &str) -> Option<[u8; 32]> {
    let inner = text.trim().strip_prefix(PEM_BEGIN)?.strip_suffix(PEM_END)?;
    let der = STANDARD.decode(inner.split_ascii_whitespace().collect::<String>()).ok()?;
    der.strip_prefix(PKCS8_HEAD.as_slice())?.try_into().ok()
}

pub(super) fn jwk(kid: &str, public: &[u8; 32]) -> serde_json::Value {
    serde_json::json!({
        "kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "kid": kid, "x": URL_SAFE_NO_PAD.encode(public),
    })
}

#[derive(Deserialize)]
struct Jwks {
    keys: Vec<Jwk>,
}

#[derive(Deserialize)]
struct Jwk {
    kty: String,
    crv: Option<String>,
    alg: Option<String>,
    kid: Option<String>,
    x: Option<String>,
}

/// The `kid` and the 32 bytes of every key in a key set.
pub(super) fn parse_jwks(text: &str) -> Result<Vec<(String, [u8; 32])>, String> {
    let jwks: Jwks =
        serde_json::from_str(text).map_err(|error| format!("it is not a JSON Web Key Set: {error}"))?;
    jwks.keys.into_iter().map(public_of_jwk).collect()
}

fn public_of_jwk(jwk: Jwk) -> Result<(String, [u8; 32]), String> {
    let kid = jwk.kid.filter(|kid| !kid.is_empty()).ok_or("a key has no `kid`")?;
    if jwk.kty != "OKP" || jwk.crv.as_deref() != Some("Ed25519") {
        return Err(format!("the key `{kid}` is not an Ed25519 key (kty OKP, crv Ed25519)"));
    }
    if jwk.alg.as_deref().is_some_and(|alg| alg != "EdDSA") {
        return Err(format!("the key `{kid}` is for another algorithm than EdDSA"));
    }
    let public: [u8; 32] = jwk
        .x
        .and_then(|x| URL_SAFE_NO_PAD.decode(x).ok())
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or_else(|| format!("`x` of the key `{kid}` is not 32 bytes in base64url"))?;
    // A weak key verifies signatures that nobody made.
    match VerifyingKey::from_bytes(&public) {
        Ok(key) if !key.is_weak() => Ok((kid, public)),
        _ => Err(format!("`x` of the key `{kid}` is not a usable point of the curve")),
    }
}

/// Replaces `path` with `text`: a reader sees the old file or the new one, never a part.
pub(super) fn write_atomically(path: &Path, text: &str, mode: u32) -> Result<(), KeyError> {
    let beside = write_beside(path, text, mode)?;
    fs::rename(&beside, path).map_err(file_error(path))
}

fn write_beside(path: &Path, text: &str, mode: u32) -> Result<PathBuf, KeyError> {
    let error = file_error(path);
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        fs::create_dir_all(folder).map_err(&error)?;
    }
    let beside = path.with_extension(format!("{}.tmp", Uuid::now_v7().simple()));
    let write = || -> io::Result<()> {
        let mut file: File = OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(error)?;
    Ok(beside)
}

fn file_error(path: &Path) -> impl Fn(io::Error) -> KeyError {
    move |source| KeyError::File { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 8410, section 10.3.
    const RFC_PEM: &str = "-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEINTuctv5E1hK1bbY8fdp+K06/nwoy/HU++CXqI9EdVhC
-----END PRIVATE KEY-----
";

    #[test]
    fn reads_the_rfcs_key() {
        let seed = seed_of_pem(RFC_PEM).unwrap();
        let public = SigningKey::from_bytes(&seed).verifying_key().to_bytes();
        // RFC 8410, section 10.1: the public half of the same key.
        assert_eq!(STANDARD.encode(public), "Gb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=");
        assert!(seed_of_pem(&RFC_PEM.replace("MC4C", "MC8C")).is_none());
        assert!(seed_of_pem("").is_none());
    }

    #[test]
    fn refuses_key_sets_that_are_not_ours() {
        let x = "Gb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE";
        let good = format!(r#"{{"kty":"OKP","crv":"Ed25519","kid":"a","x":"{x}"}}"#);
        assert_eq!(parse_jwks(&format!(r#"{{"keys":[{good}]}}"#)).unwrap()[0].0, "a");
        for (bad, names) in [
            (good.replace("OKP", "RSA"), "`a`"),
            (good.replace("Ed25519", "X25519"), "`a`"),
            (good.replace(r#""kid":"a","#, ""), "`kid`"),
            (good.replace(x, &x[4..]), "`x`"),
            // The neutral element: anything is a valid signature under it.
            (good.replace(x, "AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"), "`x`"),
            (good.replace(r#""crv""#, r#""alg":"HS256","crv""#), "EdDSA"),
            ("7".to_owned(), "JSON Web Key Set"),
        ] {
            let error = parse_jwks(&format!(r#"{{"keys":[{bad}]}}"#)).unwrap_err();
            assert!(error.contains(names), "{bad}: {error}");
        }
    }
}
