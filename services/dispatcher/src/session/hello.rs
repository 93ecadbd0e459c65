//! Admission (protocol sections 1 and 2): who says hello, and may it.

use infera_protocol::bytes::Address;
use infera_protocol::identity::{
    Domain, HelloClaims, IdentityError, MAX_BINDING_MS, NodeBinding, hello_digest, verify,
};
use infera_protocol::registry::Registry;
use infera_protocol::stakes::Stakes;
use infera_wire::convert;
use infera_wire::v1;

/// The latest expiry of a binding that is accepted, ms from now: nodes' clocks may be an hour ahead.
pub const LONGEST_BINDING_MS: i64 = MAX_BINDING_MS + 3_600 * 1_000;

/// Why a session ends: what the node's operator reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub code: &'static str,
    pub reason: String,
}

impl Refusal {
    pub fn new(code: &'static str, reason: impl Into<String>) -> Self {
        Self { code, reason: reason.into() }
    }
}

/// Checks a hello against the nonce of this connection's challenge.
///
/// # Errors
/// The first thing that doesn't hold.
pub fn check(
    wire: &v1::Hello,
    nonce: &[u8; 32],
    domain: &Domain,
    registry: &Registry,
    stakes: &Stakes,
    now_ms: i64,
) -> Result<convert::Hello, Refusal> {
    let hello = convert::hello(wire).map_err(|e| Refusal::new("bad_hello", e.to_string()))?;
    let claims = &hello.claims;
    verify(&claims.node, &hello_digest(domain, nonce, claims), &hello.signature).map_err(|e| {
        Refusal::new("bad_signature", format!("{e}: sign this connection's challenge with the node's key"))
    })?;
    let signed = claims.binding.verify(domain, &claims.operator, &hello.binding_signature, now_ms);
    signed.map_err(unbound)?;
    if claims.binding.expiry_ms > now_ms.saturating_add(LONGEST_BINDING_MS) {
        return Err(Refusal::new(
            "bad_binding",
            format!(
                "`binding_expiry_ms` is {}, more than {} days from now: bind the node for that long at most, and set \
                 its clock",
                claims.binding.expiry_ms,
                MAX_BINDING_MS / (24 * 3_600 * 1_000)
            ),
        ));
    }
    has_stake(stakes, &claims.operator)?;
    if registry.by_root(&claims.weights_root).is_none() {
        return Err(Refusal::new(
            "unknown_model",
            format!("no model of the registry has the weights {}", claims.weights_root),
        ));
    }
    if !registry.releases.is_empty() && !registry.releases.contains(&claims.release_hash) {
        return Err(Refusal::new(
            "unknown_release",
            format!(
                "the executable {} is no release that the network approved: update the node",
                claims.release_hash
            ),
        ));
    }
    let class = &claims.class;
    if registry.calibration.bounds(class, class).is_none() {
        let known = registry.calibration.pairs.iter().filter(|pair| pair.classes[0] == pair.classes[1]);
        let known: Vec<&str> = known.map(|pair| pair.classes[0].as_str()).collect();
        return Err(Refusal::new(
            "unknown_class",
            format!(
                "the numerics class `{class}` is not calibrated in this network, which knows {}: start the node with \
                 --class and --device for one of them",
                known.join(", ")
            ),
        ));
    }
    Ok(hello)
}

fn unbound(error: IdentityError) -> Refusal {
    let code = match error {
        IdentityError::Expired { .. } => "binding_expired",
        _ => "bad_binding",
    };
    Refusal::new(code, error.to_string())
}

/// Whether what a session began with still holds: once the binding is over, what the node signs costs nobody's stake.
///
/// # Errors
/// [`Refusal`] that says what has changed.
pub fn goes_on(claims: &HelloClaims, stakes: &Stakes, now_ms: i64) -> Result<(), Refusal> {
    let NodeBinding { expiry_ms, .. } = claims.binding;
    if expiry_ms <= now_ms {
        return Err(unbound(IdentityError::Expired { expiry_ms }));
    }
    has_stake(stakes, &claims.operator)
}

/// Whether the operator has what holders ask of everybody who works.
fn has_stake(stakes: &Stakes, operator: &Address) -> Result<(), Refusal> {
    if stakes.is_enough(operator) {
        return Ok(());
    }
    let minimum = stakes.minimum_micro;
    Err(Refusal::new(
        "stake_too_low",
        format!(
            "the operator {operator} has less at stake than the {}.{:06} INFER that the network asks for: `infera \
             operator stake`",
            minimum / 1_000_000,
            minimum % 1_000_000
        ),
    ))
}
