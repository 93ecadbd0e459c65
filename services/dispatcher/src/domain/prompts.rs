//! Prompts of recent requests whose answers no seed changes. A canary of such a request is one of them
//! ([`infera_protocol::canary`]): it looks like any other, and a copied answer is the answer to another question.

use std::collections::{BTreeMap, VecDeque};

use infera_protocol::bytes::Hash32;
use infera_protocol::canary;

use super::{Offer, Rules};

/// Most prompts of a model, one for each account: nobody can fill them all.
const MAX_PROMPTS: usize = 32;
/// Most tokens of all prompts of a model: 1 MiB.
const MAX_TOKENS: usize = 1 << 18;

#[derive(Debug)]
struct Prompt {
    account: String,
    tokens: Vec<u32>,
}

/// By model, the oldest first.
#[derive(Debug, Default)]
pub struct Prompts {
    by_model: BTreeMap<Hash32, VecDeque<Prompt>>,
}

impl Prompts {
    /// Keeps the prompt of a request that does not depend on its seed.
    pub fn note(&mut self, offer: &Offer) {
        let submitted = &offer.funded.submitted;
        if canary::follows_seed(&submitted.request.sampling) {
            return;
        }
        let prompts = self.by_model.entry(offer.model()).or_default();
        prompts.retain(|prompt| prompt.account != submitted.account);
        let (account, tokens) = (submitted.account.clone(), submitted.request.prompt.clone());
        prompts.push_back(Prompt { account, tokens });
        let tokens = |prompts: &VecDeque<Prompt>| prompts.iter().map(|p| p.tokens.len()).sum::<usize>();
        while prompts.len() > MAX_PROMPTS || tokens(prompts) > MAX_TOKENS {
            prompts.pop_front();
        }
    }

    /// Another prompt for this request, chosen by `beta`: one of another account where there is one. `None`: none is known
    /// that leaves room for the answer.
    pub fn other(&self, beta: &Hash32, offer: &Offer, rules: &Rules) -> Option<&[u32]> {
        let submitted = &offer.funded.submitted;
        let context = rules.registry.by_root(&offer.model())?.context_length;
        let room = context.checked_sub(submitted.request.max_tokens)? as usize;
        let fits =
            |prompt: &&Prompt| prompt.tokens.len() <= room && prompt.tokens != submitted.request.prompt;
        let known: Vec<&Prompt> = self.by_model.get(&offer.model())?.iter().filter(fits).collect();
        let others: Vec<&Prompt> =
            known.iter().copied().filter(|prompt| prompt.account != submitted.account).collect();
        let from = if others.is_empty() { known } else { others };
        from.get(canary::choice(beta, from.len())).map(|prompt| prompt.tokens.as_slice())
    }
}
