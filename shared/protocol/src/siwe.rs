//! Sign-in with Ethereum: a text that says who signs in where, and whose signature recovers the address (ERC-4361 over
//! EIP-191, version `0x45`, "personal_sign").
//!
//! The text is read strictly by the grammar of the ERC: one form, lines that end with LF, an address with its EIP-55
//! checksum. What a signature covers is the text as it was sent, never what was read from it.

use crate::bytes::{Address, EvmSignature, Hash32};
use crate::hash::keccak;
use crate::identity::IdentityError;
use crate::{rfc3339, typed};
use k256::ecdsa::SigningKey as EvmKey;
use std::fmt;

/// Longest message, bytes.
pub const MAX_MESSAGE_BYTES: usize = 4096;
/// Most resources that a message may list.
pub const MAX_RESOURCES: usize = 16;
/// Letters and digits of a nonce: the ERC's least, and the most that is read.
pub const NONCE_CHARS: std::ops::RangeInclusive<usize> = 8..=64;
/// How far the clocks of signer and checker may differ, ms.
pub const MAX_SKEW_MS: i64 = 60_000;
/// The one version of the ERC.
pub const VERSION: &str = "1";

const ASKS: &str = " wants you to sign in with your Ethereum account:";

/// What a message says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// `https` where the text begins with `https://`; most leave it out.
    pub scheme: Option<String>,
    /// Host and port of the page or program that asks.
    pub domain: String,
    pub address: Address,
    /// One line for people.
    pub statement: Option<String>,
    /// What is signed in to.
    pub uri: String,
    pub chain_id: u64,
    pub nonce: String,
    pub issued_at_ms: i64,
    pub expiration_ms: Option<i64>,
    pub not_before_ms: Option<i64>,
    pub request_id: Option<String>,
    pub resources: Vec<String>,
}

/// Where people may sign in, as `https://api.example.org`: scheme, host and port, nothing behind them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    scheme: String,
    authority: String,
}

/// What a message must say to be good for one checker.
#[derive(Debug, Clone, Copy)]
pub struct Expected<'a> {
    /// At least one; a message is for one of them.
    pub origins: &'a [Origin],
    pub chain_id: u64,
    pub now_ms: i64,
    /// How long ago a message may have been issued.
    pub max_age_ms: i64,
}

/// Why a sign-in is refused; each names the field of the message and the remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SiweError {
    #[error("the message has {0} bytes, at most {MAX_MESSAGE_BYTES} are read; leave out resources")]
    TooLong(usize),
    #[error("the message's {field} must be {expected} (ERC-4361); build the text with a library for it")]
    Form { field: &'static str, expected: &'static str },
    #[error("the message is for the domain `{got}`, this network's is {expected}; sign a message for it")]
    Domain { got: String, expected: String },
    #[error("the message's URI must begin with {expected}; sign a message for it")]
    Uri { expected: String },
    #[error("the message is for chain {got}, this network is on chain {expected}; sign a message for it")]
    Chain { got: u64, expected: u64 },
    #[error(
        "the message's {field} lies in the future; set the clock, or take Issued At from the nonce's answer"
    )]
    NotYet { field: &'static str },
    #[error("the message has expired ({field}); ask for a new nonce and sign again")]
    Expired { field: &'static str },
    #[error(
        "`signature` must be 65 bytes in hex, 0x first, that sign the message as it was sent (personal_sign, low s); \
         contract wallets are not supported"
    )]
    Signature,
    #[error("the message was signed by {actual}, not by its address {expected}; sign with that account")]
    Signer { expected: String, actual: String },
}

impl SiweError {
    /// The line of the message that is wrong, in the words of the ERC's fields; `None` for the signature.
    pub fn field(&self) -> Option<&'static str> {
        match self {
            Self::TooLong(_) => Some("message"),
            Self::Form { field, .. } | Self::NotYet { field } | Self::Expired { field } => Some(field),
            Self::Domain { .. } => Some("domain"),
            Self::Uri { .. } => Some("URI"),
            Self::Chain { .. } => Some("Chain ID"),
            Self::Signature | Self::Signer { .. } => None,
        }
    }

    /// Machine-readable.
    pub fn code(&self) -> &'static str {
        match self {
            Self::TooLong(_) | Self::Form { .. } => "invalid_message",
            Self::Domain { .. } | Self::Uri { .. } => "wrong_domain",
            Self::Chain { .. } => "wrong_chain",
            Self::NotYet { .. } => "message_not_valid_yet",
            Self::Expired { .. } => "message_expired",
            Self::Signature | Self::Signer { .. } => "invalid_signature",
        }
    }
}

impl Origin {
    /// Reads `SCHEME://HOST[:PORT]`; what stands behind the authority is cut off. `None` if there is none.
    pub fn of(url: &str) -> Option<Self> {
        let (scheme, rest) = url.split_once("://")?;
        let authority = rest.split(['/', '?', '#']).next()?;
        let origin = Self { scheme: scheme.to_owned(), authority: authority.to_owned() };
        (is_scheme(scheme) && is_authority(authority)).then_some(origin)
    }

    /// Host and port: the domain of a message.
    pub fn domain(&self) -> &str {
        &self.authority
    }

    fn holds(&self, uri: &str) -> bool {
        let rest = uri
            .strip_prefix(self.scheme.as_str())
            .and_then(|rest| rest.strip_prefix("://"))
            .and_then(|rest| rest.strip_prefix(self.authority.as_str()));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', '?', '#']))
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme, self.authority)
    }
}

impl Message {
    /// Reads the text of a message.
    ///
    /// # Errors
    /// [`SiweError::TooLong`] and [`SiweError::Form`].
    pub fn parse(text: &str) -> Result<Self, SiweError> {
        if text.len() > MAX_MESSAGE_BYTES {
            return Err(SiweError::TooLong(text.len()));
        }
        let mut lines = Lines::new(text);
        let (scheme, domain) = head(lines.next("first line")?)?;
        let address = address(lines.next("address")?)?;
        lines.blank("line after the address")?;
        let statement = statement(&mut lines)?;
        let uri = lines.field("URI", "URI: ")?;
        check(is_uri(uri), "URI", "an RFC 3986 URI")?;
        check(lines.field("Version", "Version: ")? == VERSION, "Version", "1")?;
        let chain_id = chain_id(lines.field("Chain ID", "Chain ID: ")?)?;
        let nonce = lines.field("Nonce", "Nonce: ")?;
        check(is_nonce(nonce), "Nonce", "8 to 64 letters and digits")?;
        let message = Self {
            scheme,
            domain,
            address,
            statement,
            uri: uri.to_owned(),
            chain_id,
            nonce: nonce.to_owned(),
            issued_at_ms: time("Issued At", lines.field("Issued At", "Issued At: ")?)?,
            expiration_ms: optional_time(&mut lines, "Expiration Time", "Expiration Time: ")?,
            not_before_ms: optional_time(&mut lines, "Not Before", "Not Before: ")?,
            request_id: lines.optional("Request ID: ").map(str::to_owned),
            resources: resources(&mut lines)?,
        };
        let request_id = message.request_id.as_deref();
        check(request_id.is_none_or(is_pchars), "Request ID", "path characters of RFC 3986")?;
        check(lines.is_done(), "end", "its last field, without a line feed")?;
        Ok(message)
    }

    /// Whether the message is for this checker, now. The nonce is the caller's to check: it must be one that it gave
    /// out, once.
    ///
    /// # Errors
    /// [`SiweError`]; the first rule that is broken.
    pub fn check(&self, expected: &Expected<'_>) -> Result<(), SiweError> {
        let Expected { origins, chain_id, now_ms, max_age_ms } = *expected;
        let here = |origin: &&Origin| {
            origin.authority == self.domain
                && self.scheme.as_ref().is_none_or(|scheme| *scheme == origin.scheme)
        };
        let all = |name: fn(&Origin) -> String| origins.iter().map(name).collect::<Vec<_>>().join(" or ");
        if !origins.iter().any(|origin| here(&origin)) {
            let got = match &self.scheme {
                Some(scheme) => format!("{scheme}://{}", self.domain),
                None => self.domain.clone(),
            };
            return Err(SiweError::Domain { got, expected: all(|origin| format!("`{}`", origin.authority)) });
        }
        if !origins.iter().any(|origin| origin.holds(&self.uri)) {
            return Err(SiweError::Uri { expected: all(|origin| origin.to_string()) });
        }
        if self.chain_id != chain_id {
            return Err(SiweError::Chain { got: self.chain_id, expected: chain_id });
        }
        let latest = now_ms.saturating_add(MAX_SKEW_MS);
        let earliest = now_ms.saturating_sub(MAX_SKEW_MS);
        if self.issued_at_ms > latest {
            return Err(SiweError::NotYet { field: "Issued At" });
        }
        if self.not_before_ms.is_some_and(|from| from > latest) {
            return Err(SiweError::NotYet { field: "Not Before" });
        }
        if self.expiration_ms.is_some_and(|until| until <= earliest) {
            return Err(SiweError::Expired { field: "Expiration Time" });
        }
        if self.issued_at_ms < earliest.saturating_sub(max_age_ms) {
            return Err(SiweError::Expired { field: "Issued At" });
        }
        Ok(())
    }

    /// Whether `signature` is that of the message's address over `text`, from which the message was read.
    ///
    /// # Errors
    /// [`SiweError::Signature`] and [`SiweError::Signer`].
    pub fn check_signature(&self, text: &str, signature: &EvmSignature) -> Result<(), SiweError> {
        let actual = typed::recover(&digest(text), signature).map_err(|_| SiweError::Signature)?;
        if actual == self.address {
            return Ok(());
        }
        Err(SiweError::Signer { expected: checksummed(&self.address), actual: checksummed(&actual) })
    }
}

/// The text that is signed.
impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(scheme) = &self.scheme {
            write!(f, "{scheme}://")?;
        }
        write!(f, "{}{ASKS}\n{}\n\n", self.domain, checksummed(&self.address))?;
        if let Some(statement) = &self.statement {
            writeln!(f, "{statement}")?;
        }
        write!(f, "\nURI: {}\nVersion: {VERSION}\nChain ID: {}", self.uri, self.chain_id)?;
        write!(f, "\nNonce: {}\nIssued At: {}", self.nonce, rfc3339::format_ms(self.issued_at_ms))?;
        let times = [("Expiration Time", self.expiration_ms), ("Not Before", self.not_before_ms)];
        for (name, ms) in times {
            if let Some(ms) = ms {
                write!(f, "\n{name}: {}", rfc3339::format_ms(ms))?;
            }
        }
        if let Some(id) = &self.request_id {
            write!(f, "\nRequest ID: {id}")?;
        }
        if !self.resources.is_empty() {
            write!(f, "\nResources:")?;
            self.resources.iter().try_for_each(|resource| write!(f, "\n- {resource}"))?;
        }
        Ok(())
    }
}

/// What a wallet signs for a text (EIP-191, version `0x45`).
pub fn digest(text: &str) -> Hash32 {
    keccak(&[format!("\x19Ethereum Signed Message:\n{}", text.len()).as_bytes(), text.as_bytes()])
}

/// Signs a text as a wallet does.
///
/// # Errors
/// [`IdentityError::BadEvmSignature`] if the key cannot sign.
pub fn sign(text: &str, key: &EvmKey) -> Result<EvmSignature, IdentityError> {
    typed::sign(&digest(text), key)
}

/// A signature as wallets write it: 65 bytes in hex of either case. Hardware wallets write v as 0 or 1.
///
/// # Errors
/// [`SiweError::Signature`].
pub fn parse_signature(text: &str) -> Result<EvmSignature, SiweError> {
    let digits = text.strip_prefix("0x").filter(|digits| digits.len() == 2 * EvmSignature::LEN);
    let bytes = digits.and_then(|digits| hex::decode(digits).ok()).ok_or(SiweError::Signature)?;
    let mut signature = EvmSignature::try_from(bytes.as_slice()).map_err(|_| SiweError::Signature)?;
    if let Some(v) = signature.0.last_mut().filter(|v| **v <= 1) {
        *v += 27;
    }
    Ok(signature)
}

/// An address with the checksum in the case of its letters (EIP-55).
pub fn checksummed(address: &Address) -> String {
    let digits = hex::encode(address.0);
    let hash = keccak(&[digits.as_bytes()]).0;
    let cased = digits.bytes().enumerate().map(|(index, digit)| {
        let nibble = hash.get(index / 2).map_or(0, |byte| byte >> (4 * (1 - index % 2)) & 0xf);
        char::from(if nibble >= 8 { digit.to_ascii_uppercase() } else { digit })
    });
    std::iter::once("0x".to_owned()).chain(cased.map(String::from)).collect()
}

/// An address in its checksummed form only.
pub fn parse_checksummed(text: &str) -> Option<Address> {
    let address: Address = text.to_ascii_lowercase().parse().ok()?;
    (checksummed(&address) == text).then_some(address)
}

/// The lines of a message: only LF ends one.
struct Lines<'a> {
    rest: Option<&'a str>,
}

impl<'a> Lines<'a> {
    fn new(text: &'a str) -> Self {
        Self { rest: Some(text) }
    }

    fn take(&mut self) -> Option<&'a str> {
        let rest = self.rest?;
        let (line, rest) = match rest.split_once('\n') {
            Some((line, rest)) => (line, Some(rest)),
            None => (rest, None),
        };
        self.rest = rest;
        Some(line)
    }

    fn next(&mut self, field: &'static str) -> Result<&'a str, SiweError> {
        self.take().ok_or(SiweError::Form { field, expected: "there" })
    }

    fn blank(&mut self, field: &'static str) -> Result<(), SiweError> {
        check(self.next(field)?.is_empty(), field, "empty")
    }

    fn field(&mut self, field: &'static str, prefix: &str) -> Result<&'a str, SiweError> {
        self.optional(prefix).ok_or(SiweError::Form { field, expected: "there, in its place" })
    }

    /// The next line without `prefix`, if it has it.
    fn optional(&mut self, prefix: &str) -> Option<&'a str> {
        let before = self.rest;
        let value = self.take().and_then(|line| line.strip_prefix(prefix));
        if value.is_none() {
            self.rest = before;
        }
        value
    }

    fn is_done(&self) -> bool {
        self.rest.is_none()
    }
}

fn check(holds: bool, field: &'static str, expected: &'static str) -> Result<(), SiweError> {
    if holds { Ok(()) } else { Err(SiweError::Form { field, expected }) }
}

fn head(line: &str) -> Result<(Option<String>, String), SiweError> {
    let wrong = SiweError::Form {
        field: "first line",
        expected: "DOMAIN wants you to sign in with your Ethereum account:",
    };
    let asks = line.strip_suffix(ASKS).ok_or(wrong)?;
    let (scheme, domain) = match asks.split_once("://") {
        Some((scheme, domain)) => (Some(scheme), domain),
        None => (None, asks),
    };
    check(scheme.is_none_or(is_scheme), "domain", "HOST:PORT, a scheme as https:// before it at most")?;
    check(is_authority(domain), "domain", "HOST:PORT, a scheme as https:// before it at most")?;
    Ok((scheme.map(str::to_owned), domain.to_owned()))
}

fn address(line: &str) -> Result<Address, SiweError> {
    let expected = "0x and 40 hex digits with the checksum of EIP-55 in their case";
    parse_checksummed(line).ok_or(SiweError::Form { field: "address", expected })
}

/// The grammar has an empty line before and after the statement, and both also where there is none.
fn statement(lines: &mut Lines<'_>) -> Result<Option<String>, SiweError> {
    let line = lines.next("statement")?;
    if line.is_empty() {
        return Ok(None);
    }
    let fits = line.bytes().all(|b| b == b' ' || is_unreserved(b) || is_reserved(b));
    check(fits, "statement", "letters, digits, spaces and -._~:/?#[]@!$&'()*+,;= in one line")?;
    lines.blank("line after the statement")?;
    Ok(Some(line.to_owned()))
}

fn chain_id(text: &str) -> Result<u64, SiweError> {
    let decimal = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    let id = text.parse().ok().filter(|_| decimal);
    id.ok_or(SiweError::Form { field: "Chain ID", expected: "a number without zeros in front, below 2^64" })
}

fn time(field: &'static str, text: &str) -> Result<i64, SiweError> {
    let expected = "a time of RFC 3339, as 2026-11-23T04:10:00Z";
    rfc3339::parse_ms(text).ok_or(SiweError::Form { field, expected })
}

fn optional_time(lines: &mut Lines<'_>, field: &'static str, prefix: &str) -> Result<Option<i64>, SiweError> {
    lines.optional(prefix).map(|text| time(field, text)).transpose()
}

fn resources(lines: &mut Lines<'_>) -> Result<Vec<String>, SiweError> {
    let mut resources = Vec::new();
    if let Some(rest) = lines.optional("Resources:") {
        check(rest.is_empty(), "Resources", "a line of its own, a URI on each line behind it")?;
        while let Some(uri) = lines.optional("- ") {
            check(is_uri(uri), "Resources", "a URI on each line")?;
            check(resources.len() < MAX_RESOURCES, "Resources", "16 at most")?;
            resources.push(uri.to_owned());
        }
    }
    Ok(resources)
}

fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)
}

fn is_reserved(byte: u8) -> bool {
    b":/?#[]@!$&'()*+,;=".contains(&byte)
}

fn is_nonce(text: &str) -> bool {
    NONCE_CHARS.contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric())
}

fn is_scheme(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.".contains(&b))
}

/// Host and port. Names before an `@` are refused: they are there to deceive.
fn is_authority(text: &str) -> bool {
    (1..=255).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._~:[]".contains(&b))
        && !text.starts_with(':')
}

fn is_uri(text: &str) -> bool {
    let Some((scheme, rest)) = text.split_once(':') else { return false };
    is_scheme(scheme) && !rest.is_empty() && escapes_hold(rest) && rest.bytes().all(is_uri_byte)
}

fn is_pchars(text: &str) -> bool {
    let pchar = |b: u8| is_unreserved(b) || b"%!$&'()*+,;=:@".contains(&b);
    escapes_hold(text) && text.bytes().all(pchar)
}

fn is_uri_byte(byte: u8) -> bool {
    is_unreserved(byte) || is_reserved(byte) || byte == b'%'
}

/// Two hex digits behind each percent sign.
fn escapes_hold(text: &str) -> bool {
    text.split('%')
        .skip(1)
        .all(|rest| rest.len() >= 2 && rest.as_bytes().iter().take(2).all(u8::is_ascii_hexdigit))
}

#[cfg(test)]
#[path = "siwe_tests.rs"]
mod tests;
