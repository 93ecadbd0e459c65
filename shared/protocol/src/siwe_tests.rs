use super::*;
use crate::identity::evm_address;
use proptest::prelude::*;

/// The first account of anvil and hardhat.
fn key() -> EvmKey {
    let key = hex::decode("ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80").unwrap();
    EvmKey::from_slice(&key).unwrap()
}

/// The ERC's own example.
const EXAMPLE: &str = "example.com wants you to sign in with your Ethereum account:
0xC02aaA39b223FE8D0A0e5C4F27eAD9083C756Cc2

I accept the ExampleOrg Terms of Service: https://example.com/tos

URI: https://example.com/login
Version: 1
Chain ID: 1
Nonce: 32891756
Issued At: 2021-09-30T16:25:24Z
Resources:
- ipfs://bafybeiemxf5abjwjbikoz4mc3a3dla6ual3jsgpdr4cjr3oz3evfyavhwq/
- https://example.com/my-web2-claim.json";

fn message() -> Message {
    Message {
        scheme: None,
        domain: "127.0.0.1:8080".into(),
        address: evm_address(&key()),
        statement: Some("Sign in to Infera.".into()),
        uri: "http://127.0.0.1:8080/v1".into(),
        chain_id: 31_337,
        nonce: "abcDEF123456".into(),
        issued_at_ms: 1_790_000_000_000,
        expiration_ms: Some(1_790_000_300_000),
        not_before_ms: None,
        request_id: None,
        resources: Vec::new(),
    }
}

#[test]
fn the_ercs_example_is_read_and_written_back() {
    let message = Message::parse(EXAMPLE).unwrap();
    assert_eq!(message.domain, "example.com");
    assert_eq!(message.address.to_string(), "0xc02aaa39b223fe8d0a0e5c4f27ead9083c756cc2");
    assert_eq!(
        message.statement.as_deref(),
        Some("I accept the ExampleOrg Terms of Service: https://example.com/tos")
    );
    assert_eq!((message.chain_id, message.nonce.as_str()), (1, "32891756"));
    assert_eq!((message.issued_at_ms, message.resources.len()), (1_633_019_124_000, 2));
    assert_eq!(message.to_string().replace(":24.000Z", ":24Z"), EXAMPLE);
}

#[test]
fn checksums_are_those_of_the_eip() {
    // EIP-55's test cases.
    for text in [
        "0x52908400098527886E0F7030069857D2E4169EE7",
        "0x8617E340B3D01FA5F11F306F4090FD50E238070D",
        "0xde709f2102306220921060314715629080e2fb77",
        "0x27b1fdb04752bbc536007a920d24acb045561c26",
        "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed",
        "0xfB6916095ca1df60bB79Ce92cE3Ea74c37c5d359",
        "0xdbF03B407c01E7cD3CBea99509d93f8DDDC8C6FB",
        "0xD1220A0cf47c7B9Be7A2E6BA89F429762e7b9aDb",
    ] {
        let address = parse_checksummed(text).unwrap();
        assert_eq!(checksummed(&address), text);
    }
    assert_eq!(parse_checksummed("0x5aaeb6053f3e94c9b9a09f33669435e7ef1beaed"), None);
    assert_eq!(parse_checksummed("0X5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"), None);
}

#[test]
fn what_wallets_sign_is_known() {
    // eth-account 0.14.0: Account.sign_message(encode_defunct(text="hello"), the key above).
    let expected = "0xf16ea9a3478698f695fd1401bfe27e9e4a7e8e3da94aa72b021125e31fa899cc573c48ea3fe1d4ab61a9db10c19032026e3ed2dbccba5a178235ac27f94504311c";
    assert_eq!(sign("hello", &key()).unwrap().to_string(), expected);
    let hash = "0x50b2c43fd39106bafbba0da34fc430e1f91e3c96ea2acee2bc34119f92b37750";
    assert_eq!(digest("hello").to_string(), hash);
}

#[test]
fn who_signed_is_recovered_from_the_text_as_sent() {
    let (key, message) = (key(), message());
    let text = message.to_string();
    let signature = sign(&text, &key).unwrap();
    assert_eq!(message.check_signature(&text, &signature), Ok(()));
    for altered in [text.replace("123456", "123457"), format!("{text} "), text.replace(".000Z", "Z")] {
        let error = message.check_signature(&altered, &signature).unwrap_err();
        assert_eq!(error.code(), "invalid_signature", "{altered}");
    }
    let other = Message { address: Address([7; 20]), ..message.clone() };
    let theirs = other.to_string();
    let signature = sign(&theirs, &key).unwrap();
    assert!(matches!(other.check_signature(&theirs, &signature), Err(SiweError::Signer { .. })));
}

#[test]
fn signatures_have_one_length_and_a_low_s() {
    let (key, message) = (key(), message());
    let text = message.to_string();
    let good = sign(&text, &key).unwrap();
    let hex = good.to_string();
    assert_eq!(parse_signature(&hex), Ok(good));
    assert_eq!(parse_signature(&format!("0x{}", hex[2..].to_uppercase())), Ok(good));
    let mut ledger = good;
    ledger.0[64] -= 27;
    assert_eq!(parse_signature(&ledger.to_string()), Ok(good));
    for bad in ["", "0x", &hex[..130], &hex[2..], &format!("{hex}00"), &hex.replace("0x", "0z"), "0x£"] {
        assert_eq!(parse_signature(bad), Err(SiweError::Signature), "{bad}");
    }
    let parsed = k256::ecdsa::Signature::from_slice(&good.0[..64]).unwrap();
    let (r, s) = parsed.split_scalars();
    let mut high = good;
    high.0[..64].copy_from_slice(&k256::ecdsa::Signature::from_scalars(r, -s).unwrap().to_bytes());
    high.0[64] = 27 + 28 - good.0[64];
    for (what, signature) in [
        ("high s", high),
        ("zero", EvmSignature([0; 65])),
        ("ones", EvmSignature([0xff; 65])),
        (
            "v",
            EvmSignature({
                let mut bytes = good.0;
                bytes[64] = 29;
                bytes
            }),
        ),
    ] {
        let error = message.check_signature(&text, &signature).unwrap_err();
        assert_eq!(error, SiweError::Signature, "{what}");
    }
}

#[test]
fn what_is_malformed_is_named() {
    let good = message().to_string();
    let line = |from: &str, to: &str| {
        assert!(good.contains(from), "{from}");
        good.replacen(from, to, 1)
    };
    for (text, field) in [
        (String::new(), "first line"),
        (good.replace('\n', "\r\n"), "first line"),
        (line(" wants you", " asks you"), "first line"),
        (line("127.0.0.1:8080 wants", "a@127.0.0.1:8080 wants"), "domain"),
        (line("127.0.0.1:8080 wants", " wants"), "domain"),
        (line("127.0.0.1:8080 wants", "1x://127.0.0.1:8080 wants"), "domain"),
        (line("127.0.0.1:8080 wants", "ex\u{430}mple.com wants"), "domain"),
        (good.replace("0xf39Fd6", "0xf39fd6"), "address"),
        (good.to_lowercase().replace("ethereum", "Ethereum"), "address"),
        (line("92266\n\n", "92266\n"), "line after the address"),
        (line("Infera.\n\n", "Infera.\n"), "line after the statement"),
        (line("Sign in to Infera.", "Sign in to \"Infera\"."), "statement"),
        (line("Sign in to Infera.", "Grüße"), "statement"),
        (line("URI: http", "URL: http"), "URI"),
        (line("URI: http://127.0.0.1:8080/v1", "URI: nonsense"), "URI"),
        (line("8080/v1", "8080/%zz"), "URI"),
        (line("8080/v1", "8080/a b"), "URI"),
        (line("Version: 1", "Version: 2"), "Version"),
        (line("Version: 1\n", ""), "Version"),
        (line("Chain ID: 31337", "Chain ID: 0x7a69"), "Chain ID"),
        (line("Chain ID: 31337", "Chain ID: 031337"), "Chain ID"),
        (line("Chain ID: 31337", "Chain ID: "), "Chain ID"),
        (line("Chain ID: 31337", "Chain ID: +31337"), "Chain ID"),
        (line("Chain ID: 31337", "Chain ID: 18446744073709551616"), "Chain ID"),
        (line("Nonce: abcDEF123456", "Nonce: abc"), "Nonce"),
        (line("Nonce: abcDEF123456", "Nonce: abc-DEF-123456"), "Nonce"),
        (line("Nonce: abcDEF", &format!("Nonce: {}", "a".repeat(60))), "Nonce"),
        (line("Issued At: 2", "Issued At: x"), "Issued At"),
        (line("\nIssued At: ", "\nissued at: "), "Issued At"),
        (line("Expiration Time: 2", "Expiration Time: x"), "Expiration Time"),
        (format!("{good}\nNot Before: soon"), "Not Before"),
        (format!("{good}\nRequest ID: a b"), "Request ID"),
        (format!("{good}\nResources: "), "Resources"),
        (format!("{good}\nResources:\n- nothing"), "Resources"),
        (format!("{good}\nResources:{}", "\n- a:b".repeat(17)), "Resources"),
        (format!("{good}\n"), "end"),
        (format!("{good}\nNonce: abcDEF123456"), "end"),
        (format!("{good}\nRequest ID: 1\nNot Before: 2026-11-23T04:10:00Z"), "end"),
        (format!("{good}\nResources:\n- a:b\n"), "end"),
        ("x".repeat(MAX_MESSAGE_BYTES + 1), "message"),
    ] {
        let error = Message::parse(&text).unwrap_err();
        assert_eq!(error.field(), Some(field), "{text}");
        assert!(error.to_string().contains(field), "{error}");
    }
}

#[test]
fn a_message_is_for_one_place_chain_and_time() {
    let origins =
        [Origin::of("http://127.0.0.1:8080/").unwrap(), Origin::of("https://app.example.org").unwrap()];
    let issued = message().issued_at_ms;
    let at = |now_ms| Expected { origins: &origins, chain_id: 31_337, now_ms, max_age_ms: 600_000 };
    let check = |change: fn(&mut Message), now_ms: i64| {
        let mut message = message();
        change(&mut message);
        message.check(&at(now_ms)).map_err(|error| (error.code(), error.field().unwrap_or_default()))
    };
    let skew = MAX_SKEW_MS;
    for (change, now_ms, expected) in [
        ((|_| {}) as fn(&mut Message), issued, Ok(())),
        (|m| m.scheme = Some("http".into()), issued, Ok(())),
        (|m| m.scheme = Some("https".into()), issued, Err(("wrong_domain", "domain"))),
        (|m| m.domain = "127.0.0.1".into(), issued, Err(("wrong_domain", "domain"))),
        (|m| m.domain = "127.0.0.1:8080.evil.org".into(), issued, Err(("wrong_domain", "domain"))),
        (|m| m.domain = "app.example.org".into(), issued, Ok(())),
        (|m| m.uri = "https://app.example.org?x".into(), issued, Ok(())),
        (|m| m.uri = "http://127.0.0.1:8080".into(), issued, Ok(())),
        (|m| m.uri = "http://127.0.0.1:80801/".into(), issued, Err(("wrong_domain", "URI"))),
        (|m| m.uri = "https://127.0.0.1:8080/".into(), issued, Err(("wrong_domain", "URI"))),
        (|m| m.uri = "http://evil.org/127.0.0.1:8080".into(), issued, Err(("wrong_domain", "URI"))),
        (|m| m.chain_id = 1, issued, Err(("wrong_chain", "Chain ID"))),
        (|_| {}, issued - skew, Ok(())),
        (|_| {}, issued - skew - 1, Err(("message_not_valid_yet", "Issued At"))),
        (|m| m.not_before_ms = Some(m.issued_at_ms + 1), issued - skew + 1, Ok(())),
        (
            |m| m.not_before_ms = Some(m.issued_at_ms + 2),
            issued - skew + 1,
            Err(("message_not_valid_yet", "Not Before")),
        ),
        (|_| {}, issued + 300_000 + skew - 1, Ok(())),
        (|_| {}, issued + 300_000 + skew, Err(("message_expired", "Expiration Time"))),
        (|m| m.expiration_ms = None, issued + 600_000 + skew, Ok(())),
        (|m| m.expiration_ms = None, issued + 600_001 + skew, Err(("message_expired", "Issued At"))),
        (|m| m.issued_at_ms = i64::MIN, i64::MAX, Err(("message_expired", "Expiration Time"))),
        (|m| m.issued_at_ms = i64::MAX, i64::MIN, Err(("message_not_valid_yet", "Issued At"))),
    ] {
        assert_eq!(check(change, now_ms), expected);
    }
}

#[test]
fn origins_are_scheme_host_and_port() {
    let origin = Origin::of("https://api.example.org:444/v1?x#y").unwrap();
    assert_eq!(
        (origin.to_string().as_str(), origin.domain()),
        ("https://api.example.org:444", "api.example.org:444")
    );
    for bad in ["", "api.example.org", "://x", "https://", "https://a@b", "https://a b"] {
        assert_eq!(Origin::of(bad), None, "{bad}");
    }
}

fn messages() -> impl Strategy<Value = Message> {
    let times = || proptest::option::of(0_i64..253_402_300_799_999);
    let text = (
        proptest::option::of("[a-z][a-z+.-]{0,9}"),
        "[a-z0-9][a-z0-9.-]{0,30}(:[0-9]{1,5})?",
        proptest::option::of("[A-Za-z0-9 ._~:/?#@!$&'()*+,;=-]{1,80}"),
        "[a-z]{1,8}:[A-Za-z0-9/?#._~-]{1,40}(%[0-9a-fA-F]{2})?",
    );
    let rest = (
        proptest::option::of("[A-Za-z0-9._~:@-]{0,30}"),
        proptest::collection::vec("[a-z]{1,8}:[A-Za-z0-9/._~-]{1,40}", 0..=MAX_RESOURCES),
        0_i64..253_402_300_799_999,
    );
    (text, any::<[u8; 20]>(), any::<u64>(), "[A-Za-z0-9]{8,64}", times(), times(), rest).prop_map(
        |((scheme, domain, statement, uri), address, chain_id, nonce, expiration_ms, not_before_ms, rest)| {
            let (request_id, resources, issued_at_ms) = rest;
            let address = Address(address);
            Message {
                scheme,
                domain,
                address,
                statement,
                uri,
                chain_id,
                nonce,
                issued_at_ms,
                expiration_ms,
                not_before_ms,
                request_id,
                resources,
            }
        },
    )
}

proptest! {
    #[test]
    fn what_is_written_is_read(message in messages()) {
        prop_assert_eq!(Message::parse(&message.to_string()), Ok(message));
    }

    #[test]
    fn a_text_says_one_thing(message in messages(), at in any::<proptest::sample::Index>(), byte in 0_u8..128) {
        // Another character anywhere is refused, or read as another message that is written as this text.
        let text = message.to_string();
        let mut bytes = text.clone().into_bytes();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let altered = String::from_utf8(bytes).unwrap();
        if let Ok(read) = Message::parse(&altered) {
            prop_assert!(read != message || altered.eq_ignore_ascii_case(&text), "{}", altered);
        }
    }

    #[test]
    fn garbage_is_refused_without_a_panic(text in "\\PC{0,300}", lines in proptest::collection::vec("(URI: |Nonce: |- |0x)?\\PC{0,20}", 0..12)) {
        let _ = Message::parse(&text);
        let _ = Message::parse(&lines.join("\n"));
        let _ = parse_signature(&text);
        let _ = parse_checksummed(&text);
        let _ = Origin::of(&text);
        if let Some(rest) = EXAMPLE.get(..text.len().min(EXAMPLE.len())) {
            let _ = Message::parse(&format!("{rest}{text}"));
        }
    }
}
