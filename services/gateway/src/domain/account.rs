//! The bodies by which people sign in and make keys.

use infera_protocol::bytes::{Address, EvmSignature};
use infera_protocol::siwe::{self, Message, SiweError};
use serde_json::{Map, Value};

use super::Refusal;
use super::chat::{Fields, missing, object, unknown};

/// Longest name of a key, characters.
pub const MAX_NAME_CHARS: usize = 64;
/// Days that a new key lasts unless the body says otherwise.
const DAYS: u32 = 30;

/// `{"address"}`, or nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NonceBody {
    /// Who is going to sign: then the answer has the message to sign.
    pub address: Option<Address>,
}

/// `{"message", "signature"}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoginBody {
    /// As it was signed.
    pub text: String,
    pub message: Message,
    pub signature: EvmSignature,
}

/// `{"name", "days", "scopes"}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyBody {
    pub name: String,
    pub days: u32,
    /// In the order of [`KeyBody::parse`]'s `scopes`, at least one.
    pub scopes: Vec<&'static str>,
}

impl NonceBody {
    /// Reads a body; an empty one asks for a nonce alone.
    ///
    /// # Errors
    /// [`Refusal`]; the first field that is wrong.
    pub fn parse(body: &[u8]) -> Result<Self, Refusal> {
        if body.is_empty() {
            return Ok(Self { address: None });
        }
        let fields = object(body)?;
        only(&fields, &["address"])?;
        let address = Fields::of(&fields).text("address")?.map(|text| address(&text)).transpose()?;
        Ok(Self { address })
    }
}

impl LoginBody {
    /// Reads a body. Whom the message is for, and who signed it, is not looked at yet.
    ///
    /// # Errors
    /// [`Refusal`]; the first field that is wrong.
    pub fn parse(body: &[u8]) -> Result<Self, Refusal> {
        let fields = object(body)?;
        only(&fields, &["message", "signature"])?;
        let fields = Fields::of(&fields);
        let text = fields.text("message")?.ok_or_else(|| missing("message"))?;
        let signature = fields.text("signature")?.ok_or_else(|| missing("signature"))?;
        let message = Message::parse(&text)?;
        let signature = siwe::parse_signature(&signature)?;
        Ok(Self { text, message, signature })
    }
}

impl KeyBody {
    /// Reads a body; a key may have all of `scopes` and lasts `max_days` at most.
    ///
    /// # Errors
    /// [`Refusal`]; the first field that is wrong.
    pub fn parse(body: &[u8], scopes: &[&'static str], max_days: u32) -> Result<Self, Refusal> {
        let fields = object(body)?;
        only(&fields, &["name", "days", "scopes"])?;
        let wanted = wanted(&fields, scopes)?;
        let fields = Fields::of(&fields);
        let name = fields.text("name")?.ok_or_else(|| missing("name"))?;
        let fits =
            (1..=MAX_NAME_CHARS).contains(&name.chars().count()) && !name.chars().any(char::is_control);
        if !fits {
            let message = format!("`name` must be 1 to {MAX_NAME_CHARS} characters of one line");
            return Err(Refusal::value("name", message));
        }
        Ok(Self { name, days: fields.count("days", max_days)?.unwrap_or(DAYS.min(max_days)), scopes: wanted })
    }
}

fn only(fields: &Map<String, Value>, known: &[&str]) -> Result<(), Refusal> {
    match fields.keys().find(|name| !known.contains(&name.as_str())) {
        Some(name) => Err(unknown(name)),
        None => Ok(()),
    }
}

/// One case all over, or the checksum of EIP-55.
fn address(text: &str) -> Result<Address, Refusal> {
    let digits = text.strip_prefix("0x").unwrap_or_default();
    let one_case = digits.to_lowercase() == digits || digits.to_uppercase() == digits;
    let address = if one_case { text.to_lowercase().parse().ok() } else { siwe::parse_checksummed(text) };
    address.ok_or_else(|| {
        let message = "`address` must be 0x and 40 hex digits; in mixed case with the checksum of EIP-55";
        Refusal::value("address", message)
    })
}

fn wanted(fields: &Map<String, Value>, scopes: &[&'static str]) -> Result<Vec<&'static str>, Refusal> {
    let Some(value) = fields.get("scopes").filter(|value| !value.is_null()) else {
        return Ok(scopes.to_vec());
    };
    let wrong = || {
        let message = format!("`scopes` must be a list of at least one of {}", scopes.join(", "));
        Refusal::value("scopes", message)
    };
    let names: Vec<&str> = value
        .as_array()
        .ok_or_else(wrong)?
        .iter()
        .map(Value::as_str)
        .collect::<Option<_>>()
        .ok_or_else(wrong)?;
    let known = names.iter().all(|name| scopes.contains(name));
    if names.is_empty() || !known {
        return Err(wrong());
    }
    Ok(scopes.iter().copied().filter(|scope| names.contains(scope)).collect())
}

impl From<SiweError> for Refusal {
    fn from(error: SiweError) -> Self {
        let param = if error.field().is_some() { "message" } else { "signature" };
        Self::new(error.code(), param, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SCOPES: [&str; 2] = ["chat", "receipts"];

    fn key(body: &Value) -> Result<KeyBody, Refusal> {
        KeyBody::parse(body.to_string().as_bytes(), &SCOPES, 365)
    }

    #[test]
    fn keys_have_a_name_a_term_and_scopes() {
        let usual = key(&json!({ "name": "ci" })).unwrap();
        assert_eq!(usual, KeyBody { name: "ci".into(), days: 30, scopes: vec!["chat", "receipts"] });
        let body = json!({ "name": "ci", "days": 365, "scopes": ["receipts", "chat", "chat"] });
        assert_eq!(key(&body).unwrap(), KeyBody { days: 365, ..usual.clone() });
        assert_eq!(key(&json!({ "name": "ci", "days": null, "scopes": null })).unwrap(), usual);
        assert_eq!(KeyBody::parse(br#"{"name":"a"}"#, &SCOPES, 7).unwrap().days, 7);
        for (body, param) in [
            (json!({}), "name"),
            (json!({ "name": "" }), "name"),
            (json!({ "name": 5 }), "name"),
            (json!({ "name": "a\nb" }), "name"),
            (json!({ "name": "x".repeat(65) }), "name"),
            (json!({ "name": "a", "days": 0 }), "days"),
            (json!({ "name": "a", "days": 366 }), "days"),
            (json!({ "name": "a", "days": -1 }), "days"),
            (json!({ "name": "a", "days": 1.5 }), "days"),
            (json!({ "name": "a", "days": "7" }), "days"),
            (json!({ "name": "a", "scopes": [] }), "scopes"),
            (json!({ "name": "a", "scopes": "chat" }), "scopes"),
            (json!({ "name": "a", "scopes": ["chat", 1] }), "scopes"),
            (json!({ "name": "a", "scopes": ["keys"] }), "scopes"),
            (json!({ "name": "a", "scope": ["chat"] }), "scope"),
        ] {
            let refusal = key(&body).unwrap_err();
            assert_eq!(refusal.param.as_deref(), Some(param), "{body}");
            assert!(refusal.message.contains(param), "{refusal}");
        }
    }

    #[test]
    fn a_nonce_may_be_asked_for_an_address() {
        let parse = |body: &str| NonceBody::parse(body.as_bytes()).map(|body| body.address);
        assert_eq!(parse(""), Ok(None));
        assert_eq!(parse("{}"), Ok(None));
        let address = "0xf39fd6e51aad88f6f4ce6ab8827279cfffb92266".parse().unwrap();
        for text in [
            "0xf39fd6e51aad88f6f4ce6ab8827279cfffb92266",
            "0xF39FD6E51AAD88F6F4CE6AB8827279CFFFB92266",
            "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266",
        ] {
            assert_eq!(parse(&json!({ "address": text }).to_string()), Ok(Some(address)), "{text}");
        }
        for bad in [
            "",
            "0x",
            "f39fd6e51aad88f6f4ce6ab8827279cfffb92266",
            "0xF39fd6e51aad88F6F4ce6aB8827279cffFb92266",
            "0x\u{f6}",
        ] {
            let refusal = parse(&json!({ "address": bad }).to_string()).unwrap_err();
            assert_eq!(refusal.param.as_deref(), Some("address"), "{bad}");
        }
    }

    #[test]
    fn a_sign_in_has_a_message_and_a_signature() {
        for (body, param) in [
            (json!({}), Some("message")),
            (json!({ "message": "hello" }), Some("signature")),
            (json!({ "message": "hello", "signature": "0x" }), Some("message")),
            (json!({ "message": 5, "signature": "0x" }), Some("message")),
            (json!({ "message": "hello", "signature": "0x", "nonce": "a" }), Some("nonce")),
            (json!([]), None),
        ] {
            let refusal = LoginBody::parse(body.to_string().as_bytes()).unwrap_err();
            assert_eq!(refusal.param.as_deref(), param, "{body}: {refusal}");
        }
    }
}
