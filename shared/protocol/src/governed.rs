//! The registry that follows from what the holders decided on the chain (protocol section 10). The contract keeps hashes
//! and limits; what they stand for (end tokens, the file's size, the price asked) is a model's card, a registry entry
//! that was published with the proposal and that anybody checks against the chain.

use crate::{
    bytes::Hash32,
    hash::keccak,
    registry::{Model, Registry},
};
use serde::{Deserialize, Serialize};

/// What the contract `ModelRegistry` holds of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelTerms {
    pub weights_root: Hash32,
    pub tokenizer_hash: Hash32,
    pub template_hash: Hash32,
    /// See [`end_tokens_hash`].
    pub end_tokens_hash: Hash32,
    pub vocab_size: u32,
    pub context_length: u32,
    pub similarity_threshold_millionths: u32,
    /// The most that a token may cost per replica, 10^-6 INFER.
    pub price_cap_micro: u64,
    /// Served; false for a model that was withdrawn, which stays listed.
    pub active: bool,
}

/// A model under the name that clients ask for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedModel {
    pub id: String,
    #[serde(flatten)]
    pub terms: ModelTerms,
}

/// The contract's whole state in one block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decided {
    pub models: Vec<ListedModel>,
    /// Approved releases of the node program.
    pub releases: Vec<Hash32>,
    /// [`crate::calibration::Calibration::hash`] of the calibration in force.
    pub calibration_hash: Hash32,
}

/// What was decided and can't be followed with what is known here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unmet {
    #[error(
        "model {id}: {reason}; publish its registry entry (`infera models --inspect FILE`) with the proposal"
    )]
    Card { id: String, reason: String },
    #[error("model {id}: {other} is served with the same weights; withdraw it, or this one")]
    SameWeights { id: String, other: String },
    #[error(
        "the calibration {decided} is in force, {known} is known here: update the registry's calibration"
    )]
    Calibration { decided: Hash32, known: Hash32 },
}

/// keccak-256 of the end tokens in ascending order, each as four big-endian bytes.
pub fn end_tokens_hash(end_tokens: &[u32]) -> Hash32 {
    let mut tokens = end_tokens.to_vec();
    tokens.sort_unstable();
    let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_be_bytes()).collect();
    keccak(&[&bytes])
}

impl ModelTerms {
    /// What a registry entry says, served.
    pub fn of(model: &Model) -> Self {
        Self {
            weights_root: model.weights_root,
            tokenizer_hash: model.tokenizer_hash,
            template_hash: model.template_hash,
            end_tokens_hash: end_tokens_hash(&model.end_tokens),
            vocab_size: model.vocab_size,
            context_length: model.context_length,
            similarity_threshold_millionths: model.similarity_threshold_millionths,
            price_cap_micro: model.price_micro,
            active: true,
        }
    }

    /// Whether `card` is of these weights and this tokenizer, whatever else was decided about them.
    ///
    /// # Errors
    /// The first field that differs.
    pub fn fits(&self, card: &Model) -> Result<(), &'static str> {
        let of_card = Self::of(card);
        for (field, fits) in [
            ("weights_root", self.weights_root == of_card.weights_root),
            ("tokenizer_hash", self.tokenizer_hash == of_card.tokenizer_hash),
            ("template_hash", self.template_hash == of_card.template_hash),
            ("end_tokens", self.end_tokens_hash == of_card.end_tokens_hash),
            ("vocab_size", self.vocab_size == of_card.vocab_size),
            ("context_length", self.context_length == of_card.context_length),
        ] {
            if !fits {
                return Err(field);
            }
        }
        Ok(())
    }
}

impl ListedModel {
    /// The registry entry under the terms in force: the card's price, as far as the cap allows.
    fn entry(&self, card: &Model) -> Model {
        Model {
            id: self.id.clone(),
            similarity_threshold_millionths: self.terms.similarity_threshold_millionths,
            price_micro: card.price_micro.min(self.terms.price_cap_micro),
            ..card.clone()
        }
    }
}

/// The registry that follows `current` by what was decided, and what could not be followed: of a model without its card
/// the entry in force stays, if there is one, and so does the calibration. `cards`: what was published with decisions that
/// were carried out, the newest first. The first one of a model's name and weights that fits is its entry; the entry in
/// force only where there is none, because its price may be a former cap. Of two names of the same weights the one that
/// is listed first is served: requests, verdicts and receipts name the weights alone.
pub fn registry(decided: &Decided, current: &Registry, cards: &[Model]) -> (Registry, Vec<Unmet>) {
    let mut unmet = Vec::new();
    let mut models: Vec<Model> = Vec::new();
    for listed in decided.models.iter().filter(|listed| listed.terms.active) {
        let known = || {
            cards
                .iter()
                .chain(&current.models)
                .filter(|card| card.id == listed.id && card.weights_root == listed.terms.weights_root)
        };
        let entry = match known().find(|card| listed.terms.fits(card).is_ok()) {
            Some(card) => Some(listed.entry(card)),
            None => {
                let reason = match known().next().map(|card| listed.terms.fits(card)) {
                    Some(Err(field)) => format!("`{field}` of what was published is not what was decided"),
                    _ => "nothing was published about these weights under this name".to_owned(),
                };
                unmet.push(Unmet::Card { id: listed.id.clone(), reason });
                current.by_id(&listed.id).cloned()
            }
        };
        let Some(entry) = entry else { continue };
        match models.iter().find(|other| other.weights_root == entry.weights_root) {
            Some(other) => unmet.push(Unmet::SameWeights { id: entry.id, other: other.id.clone() }),
            None => models.push(entry),
        }
    }
    let known = current.calibration.hash();
    if decided.calibration_hash != known {
        unmet.push(Unmet::Calibration { decided: decided.calibration_hash, known });
    }
    let releases = decided.releases.clone();
    (
        Registry { models, releases, calibration: current.calibration.clone(), replaces: current.replaces },
        unmet,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::calibration::Calibration;

    fn card(id: &str, n: u8) -> Model {
        Model {
            id: id.into(),
            weights_root: Hash32([n; 32]),
            weights_bytes: 9,
            tokenizer_hash: Hash32([n + 1; 32]),
            template_hash: Hash32([n + 2; 32]),
            end_tokens: vec![7, 2],
            vocab_size: 100,
            context_length: 64,
            similarity_threshold_millionths: 600_000,
            price_micro: 5,
            created_secs: 1,
        }
    }

    fn current() -> Registry {
        let calibration = Calibration { pairs: Vec::new() };
        Registry { models: vec![card("a", 10)], releases: Vec::new(), calibration, replaces: None }
    }

    fn listed(model: &Model) -> ListedModel {
        ListedModel { id: model.id.clone(), terms: ModelTerms::of(model) }
    }

    fn decided(models: Vec<ListedModel>) -> Decided {
        let calibration_hash = current().calibration.hash();
        Decided { models, releases: vec![Hash32([1; 32])], calibration_hash }
    }

    #[test]
    fn votes_become_the_registry() {
        let (a, b) = (card("a", 10), card("b", 20));
        let mut cheaper = listed(&a);
        cheaper.terms.similarity_threshold_millionths = 700_000;
        cheaper.terms.price_cap_micro = 3;
        let all = decided(vec![cheaper, listed(&b)]);
        let (registry, unmet) = registry(&all, &current(), &[card("c", 30), b.clone()]);
        assert_eq!(unmet, []);
        let a = Model { similarity_threshold_millionths: 700_000, price_micro: 3, ..a };
        assert_eq!((registry.models, registry.releases), (vec![a, b], vec![Hash32([1; 32])]));
        let mut withdrawn = listed(&card("a", 10));
        withdrawn.terms.active = false;
        assert!(super::registry(&decided(vec![withdrawn]), &current(), &[]).0.models.is_empty());
    }

    /// Prices and sizes in force after what was decided, with these cards.
    fn entries(current: &Registry, models: Vec<ListedModel>, cards: &[Model]) -> Vec<(u64, u64)> {
        let (registry, unmet) = registry(&decided(models), current, cards);
        assert_eq!(unmet, []);
        registry.models.iter().map(|model| (model.price_micro, model.weights_bytes)).collect()
    }

    #[test]
    fn the_newest_entry_under_its_own_name_counts() {
        let price = |model: Model, price_micro| Model { price_micro, ..model };
        let at_most = |model: &Model, price_cap_micro| {
            let terms = ModelTerms { price_cap_micro, ..ModelTerms::of(model) };
            ListedModel { id: model.id.clone(), terms }
        };
        let b = card("b", 20);
        let card_of_b = std::slice::from_ref(&b);
        // Admitted for 5, the cap lowered to 3 and raised to 5 again: the price is the entry's, as far as the cap allows.
        let (low, unmet) =
            registry(&decided(vec![listed(&card("a", 10)), at_most(&b, 3)]), &current(), card_of_b);
        assert_eq!((low.models[1].price_micro, unmet), (3, vec![]));
        assert_eq!(entries(&low, vec![at_most(&b, 5)], card_of_b), [(5, 9)]);
        assert_eq!(entries(&low, vec![at_most(&b, 50)], card_of_b), [(5, 9)], "no more than was asked");
        // Admitted again for 8 and with its true size: what was published before counts no more, nor does what is in force.
        let again = Model { weights_bytes: 10, ..price(b.clone(), 8) };
        assert_eq!(entries(&low, vec![at_most(&b, 8)], &[again, b.clone()]), [(8, 10)]);
        // Of two names of the same weights, each with its own price, the first is served until it is withdrawn.
        let other = price(Model { id: "c".into(), ..b.clone() }, 7);
        let both = |active| {
            let mut first = at_most(&other, 9);
            first.terms.active = active;
            vec![first, at_most(&b, 9)]
        };
        let in_force = Registry { models: vec![b.clone(), other.clone()], ..current() };
        for (current, cards) in [(current(), vec![b.clone(), other.clone()]), (in_force, vec![])] {
            let (served, unmet) = registry(&decided(both(true)), &current, &cards);
            assert_eq!(served.models, std::slice::from_ref(&other));
            assert_eq!(unmet, [Unmet::SameWeights { id: "b".into(), other: "c".into() }]);
            assert_eq!(entries(&served, both(false), card_of_b), [(5, 9)]);
        }
        // Another name's entry says nothing of the price.
        let (_, unmet) = registry(&decided(vec![at_most(&price(card("d", 20), 9), 9)]), &current(), &[b]);
        assert!(unmet[0].to_string().contains("under this name"), "{unmet:?}");
    }

    #[test]
    fn what_is_not_known_or_not_what_was_decided_is_not_followed() {
        let b = card("b", 20);
        let all = decided(vec![listed(&card("a", 10)), listed(&b)]);
        let (registry, unmet) = registry(&all, &current(), &[]);
        assert_eq!(registry.models, current().models);
        assert!(unmet[0].to_string().contains("nothing was published"), "{unmet:?}");
        type Forge = fn(&mut Model);
        let forged: [(Forge, &str); 5] = [
            (|m| m.tokenizer_hash.0[0] ^= 1, "tokenizer_hash"),
            (|m| m.template_hash.0[0] ^= 1, "template_hash"),
            (|m| m.end_tokens.push(1), "end_tokens"),
            (|m| m.vocab_size += 1, "vocab_size"),
            (|m| m.context_length += 1, "context_length"),
        ];
        for (forge, field) in forged {
            let mut forged = b.clone();
            forge(&mut forged);
            let (registry, unmet) = super::registry(&all, &current(), &[forged]);
            assert_eq!(registry.models.len(), 1);
            assert!(unmet[0].to_string().contains(field), "{unmet:?}");
        }
        // Nor is an entry that stays in force served beside another name of its weights.
        let same = Model { id: "d".into(), ..card("a", 10) };
        let moved = decided(vec![listed(&same), listed(&card("a", 30))]);
        let (registry, unmet) = super::registry(&moved, &current(), std::slice::from_ref(&same));
        assert_eq!((registry.models, unmet.len()), (vec![same], 2));
        let other = Decided { calibration_hash: Hash32::ZERO, ..decided(vec![listed(&card("a", 10))]) };
        let (registry, unmet) = super::registry(&other, &current(), &[]);
        assert_eq!(registry.calibration, current().calibration);
        assert!(matches!(unmet[..], [Unmet::Calibration { .. }]));
    }

    /// `ModelRegistry.sol` and `services/settlement/src/chain/deploy.rs` hash them so.
    #[test]
    fn end_tokens_are_hashed_in_ascending_order() {
        assert_eq!(end_tokens_hash(&[7, 2]), end_tokens_hash(&[2, 7]));
        assert_eq!(end_tokens_hash(&[1]), keccak(&[&[0, 0, 0, 1]]));
    }
}
