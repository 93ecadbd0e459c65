use std::os::unix::fs::PermissionsExt;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use infera_runtime::jwt::{Claims, JwtError, KeyError, Signer, Verifier};
use infera_testkit::TempDir;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};

struct Fixture {
    dir: TempDir,
    signer: Signer,
    verifier: Verifier,
}

impl Fixture {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let signer = Signer::load_or_create(&dir.path().join("keys/gateway.pem")).unwrap();
        let jwks = dir.path().join("jwks.json");
        signer.write_jwks(&jwks).unwrap();
        let verifier = Verifier::from_jwks_file(&jwks).unwrap();
        Self { dir, signer, verifier }
    }

    /// The private key itself, to sign what the signer would not.
    fn key(&self) -> EncodingKey {
        let pem = std::fs::read_to_string(self.dir.path().join("keys/gateway.pem")).unwrap();
        let der: String = pem.lines().filter(|line| !line.starts_with('-')).collect();
        EncodingKey::from_ed_der(&STANDARD.decode(der).unwrap())
    }

    fn header(&self) -> Header {
        Header { kid: Some(self.signer.kid().to_owned()), ..Header::new(Algorithm::EdDSA) }
    }

    fn claims(&self) -> Value {
        serde_json::to_value(Claims::new("acct", "gateway", &["chat", "models"], 3600)).unwrap()
    }

    /// A token with `claims`, signed as it should be.
    fn signed(&self, claims: &Value) -> String {
        jsonwebtoken::encode(&self.header(), claims, &self.key()).unwrap()
    }

    fn refused(&self, token: &str) -> JwtError {
        self.verifier.verify(token, "gateway").expect_err(token)
    }
}

#[test]
fn a_token_says_what_was_issued() {
    let it = Fixture::new();
    let claims = Claims::new("acct", "gateway", &["chat", "models"], 3600);
    let token = it.signer.issue(&claims).unwrap();
    assert_eq!(it.verifier.verify(&token, "gateway").unwrap(), claims);
    assert!(claims.allows("chat") && !claims.allows("cha") && !claims.allows("admin"));
    let middle = token.split('.').nth(1).unwrap();
    let json: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(middle).unwrap()).unwrap();
    assert_eq!(json["scope"], "chat models");
    assert_eq!(json["iss"], "infera");
}

#[test]
fn claims_that_do_not_hold_are_refused() {
    let it = Fixture::new();
    assert!(it.verifier.verify(&it.signed(&it.claims()), "gateway").is_ok(), "the fixture itself is fine");
    let with = |name: &str, value: Value| {
        let mut claims = it.claims();
        claims[name] = value;
        it.refused(&it.signed(&claims))
    };
    let without = |name: &str| {
        let mut claims = it.claims();
        claims.as_object_mut().unwrap().remove(name);
        it.refused(&it.signed(&claims))
    };
    assert_eq!(with("exp", json!(1_700_000_000)), JwtError::Expired);
    assert_eq!(with("exp", json!(1_700_000_000)).code(), "expired_api_key");
    assert_eq!(with("aud", json!("explorer")), JwtError::Audience);
    assert_eq!(with("iss", json!("somebody")), JwtError::Issuer);
    assert_eq!(with("nbf", json!(9_999_999_999_i64)), JwtError::NotYet);
    for name in ["exp", "aud", "iss"] {
        assert_eq!(without(name), JwtError::Claim(name.to_owned()));
    }
    for refused in [
        with("exp", json!("9999999999")),
        with("exp", json!(null)),
        with("exp", json!(-1)),
        with("exp", json!([9_999_999_999_i64])),
        with("sub", json!(7)),
        with("aud", json!(["gateway", "explorer"])),
        without("sub"),
        without("jti"),
        with("scope", json!(["chat"])),
    ] {
        assert_eq!(refused.code(), "invalid_api_key", "{refused:?}");
    }
}

#[test]
fn forged_tokens_are_refused() {
    let it = Fixture::new();
    let claims = it.claims();
    let good = it.signed(&claims);
    let (head, tail) = good.split_once('.').unwrap();
    let (body, signature) = tail.split_once('.').unwrap();
    let b64 = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());

    // Another key under the right name.
    let other = Fixture::new();
    let forged = jsonwebtoken::encode(&it.header(), &claims, &other.key()).unwrap();
    assert_eq!(it.refused(&forged), JwtError::Signature);
    // One claim changed after signing.
    let mut richer = claims.clone();
    richer["sub"] = json!("somebody-else");
    assert_eq!(it.refused(&format!("{head}.{}.{signature}", b64(&richer))), JwtError::Signature);
    // Every single byte of the signature counts.
    let mut bytes = URL_SAFE_NO_PAD.decode(signature).unwrap();
    for at in 0..bytes.len() {
        bytes[at] ^= 1;
        it.refused(&format!("{head}.{body}.{}", URL_SAFE_NO_PAD.encode(&bytes)));
        bytes[at] ^= 1;
    }

    let kid = it.signer.kid();
    for alg in ["none", "None", "NONE"] {
        let unsigned = b64(&json!({ "alg": alg, "typ": "JWT", "kid": kid }));
        for token in [format!("{unsigned}.{body}."), format!("{unsigned}.{body}.{signature}")] {
            assert_eq!(it.refused(&token).code(), "invalid_api_key");
        }
    }
    // The public key used as the secret of an HMAC.
    let public = URL_SAFE_NO_PAD.decode(it.signer.jwks()["keys"][0]["x"].as_str().unwrap()).unwrap();
    let header = Header { kid: Some(kid.to_owned()), ..Header::new(Algorithm::HS256) };
    let hmac = jsonwebtoken::encode(&header, &claims, &EncodingKey::from_secret(&public)).unwrap();
    assert_eq!(it.refused(&hmac), JwtError::Algorithm);

    let nameless = jsonwebtoken::encode(&Header::new(Algorithm::EdDSA), &claims, &it.key()).unwrap();
    assert_eq!(it.refused(&nameless), JwtError::MissingKid);
    let header = Header { kid: Some("other".to_owned()), ..Header::new(Algorithm::EdDSA) };
    assert_eq!(it.refused(&jsonwebtoken::encode(&header, &claims, &it.key()).unwrap()), JwtError::UnknownKid);
}

#[test]
fn nonsense_is_refused() {
    let it = Fixture::new();
    let good = it.signed(&it.claims());
    let (head, _) = good.split_once('.').unwrap();
    let too_long = format!("{good}{}", "A".repeat(5000));
    for token in [
        "",
        ".",
        "..",
        "...",
        "sk-1234",
        "\0",
        "ünï.cödé.x",
        head,
        &good[..good.len() - 1],
        &too_long,
        &format!("{good}.x"),
    ] {
        let error = it.refused(token);
        assert_eq!(error.code(), "invalid_api_key", "{token}: {error:?}");
    }
}

#[test]
fn an_error_becomes_a_401_with_its_code() {
    let error = infera_runtime::http::ApiError::from(JwtError::Expired);
    assert_eq!(error.status.as_u16(), 401);
    assert_eq!(error.body()["error"]["code"], "expired_api_key");
}

#[test]
fn the_key_file_is_private_and_stays() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("a/b.pem");
    // Services that start together agree on one key.
    let kids: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..8).map(|_| scope.spawn(|| Signer::load_or_create(&path).unwrap().kid().to_owned())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(kids.iter().all(|kid| *kid == kids[0]), "{kids:?}");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing is left over");

    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    let error = Signer::load_or_create(&path).err().unwrap();
    assert!(matches!(error, KeyError::Exposed { .. }) && error.to_string().contains("chmod 600"), "{error}");

    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::write(&path, "not a key").unwrap();
    let error = Signer::load_or_create(&path).err().unwrap();
    assert!(matches!(error, KeyError::Content { .. }), "{error}");
}

#[test]
fn a_key_set_must_be_there_and_usable() {
    let it = Fixture::new();
    let missing = Verifier::from_jwks_file(&it.dir.path().join("none.json")).err().unwrap().to_string();
    assert!(missing.contains("none.json"), "{missing}");
    for (text, names) in [("{}", "keys"), (r#"{"keys":[]}"#, "empty"), ("", "JSON")] {
        let error = Verifier::from_jwks(text).err().unwrap();
        assert!(error.contains(names), "{text}: {error}");
    }
    let key = it.signer.jwks()["keys"][0].clone();
    let twice = json!({ "keys": [key, key] }).to_string();
    assert!(Verifier::from_jwks(&twice).err().unwrap().contains(it.signer.kid()));

    // Two keys during a rotation: tokens of both are good.
    let other = Fixture::new();
    let both = json!({ "keys": [key, other.signer.jwks()["keys"][0]] }).to_string();
    let verifier = Verifier::from_jwks(&both).unwrap();
    for fixture in [&it, &other] {
        assert!(verifier.verify(&fixture.signed(&fixture.claims()), "gateway").is_ok());
    }
}
