//! Answers that are not the model's, built from recordings. Each claims to be of the class `fast`, carries the
//! fingerprints that suit it best, and differs from what honest nodes of either class answer.

use infera_protocol::{
    fingerprint::Fingerprint,
    request::{Finish, Output},
    sampling::{gumbel, noise_bits},
};

use crate::{
    record::{Answer, MODES, Setup, WARM},
    sets::{Sets, certain, closest, greedy_gap, tie},
};

/// An answer to the request (prompt, mode).
pub struct Case {
    pub prompt: usize,
    pub mode: usize,
    pub output: Output,
}

/// An attack and its answers.
pub struct Attack {
    pub name: &'static str,
    pub cases: Vec<Case>,
}

struct Builder<'a> {
    setup: &'a Setup,
    sets: &'a Sets,
}

/// All attacks on the content of an answer.
///
/// # Errors
/// The model's vocabulary lacks a word that an attack needs.
pub fn build(setup: &Setup, sets: &Sets) -> Result<Vec<Attack>, String> {
    let b = Builder { setup, sets };
    let not = setup.prompt.tokenizer().encode(" not").map_err(|e| e.to_string())?;
    let not = *not.first().ok_or("the vocabulary lacks ` not`")?;
    let verbs =
        [" is", " are", " was", " were", " can", " will", " should", " do", " does", " has", " have", " I"];
    let verbs: Vec<u32> =
        verbs.iter().filter_map(|v| setup.prompt.tokenizer().encode(v).ok()?.first().copied()).collect();
    let attack = |name, cases: Vec<Option<Case>>| Attack { name, cases: b.differing(cases) };
    Ok(vec![
        attack("garbage", b.each(2, |p, m, i| b.garbage(p, m, i))),
        attack("echo", b.each(2, |p, m, i| b.echo(p, m, i))),
        attack("other_prompt", b.each(2, |p, m, i| b.own(p, m, b.fast(b.other(p, 1 + i), m)))),
        attack("truncated", b.each(2, |p, m, i| b.truncated(p, m, i))),
        attack("cheap_after_tie", b.each(2, |p, m, i| b.cheap_after_tie(p, m, i))),
        attack("planted_not", b.each(2, |p, m, i| b.planted(p, m, i, not, &verbs))),
        attack("other_model", b.each(2, |p, m, i| b.forged(p, m, &sets.other[2 * p + i]))),
        attack("wrong_seed", b.each(MODES - 2, |p, m, i| b.wrong_seed(p, m, i))),
        attack("wrong_temperature", b.each(MODES, |p, m, i| b.wrong_temperature(p, m, i))),
        attack("stale_cache", b.recorded(&sets.stale)),
        attack("prefill_forged", b.prefill_forged()),
        attack("round3bit", b.recorded(&sets.round3)),
        attack("round2bit", b.recorded(&sets.round2)),
    ])
}

impl Builder<'_> {
    fn fast(&self, prompt: usize, mode: usize) -> &Answer {
        &self.sets.fast[prompt * MODES + mode]
    }

    fn exact(&self, prompt: usize, mode: usize) -> &Answer {
        &self.sets.exact[prompt * MODES + mode]
    }

    fn other(&self, prompt: usize, by: usize) -> usize {
        (prompt + by) % self.setup.prompts.len()
    }

    /// `variants` answers to every request.
    fn each(&self, variants: usize, make: impl Fn(usize, usize, usize) -> Option<Case>) -> Vec<Option<Case>> {
        let mut cases = Vec::new();
        for p in 0..self.setup.prompts.len() {
            for m in 0..MODES {
                cases.extend((0..variants).map(|i| make(p, m, i)));
            }
        }
        cases
    }

    /// What differs from both classes' honest answers and keeps to the request's limits.
    fn differing(&self, cases: Vec<Option<Case>>) -> Vec<Case> {
        let most = self.setup.max_tokens as usize;
        let differs = |case: &Case| {
            let same = |a: &Answer| a.tokens == case.output.tokens && a.finish == case.output.finish;
            let honest = same(self.fast(case.prompt, case.mode)) || same(self.exact(case.prompt, case.mode));
            !honest && !case.output.tokens.is_empty() && case.output.tokens.len() <= most
        };
        cases.into_iter().flatten().filter(differs).collect()
    }

    fn finish(&self, tokens: &[u32]) -> Finish {
        let ended = tokens.last().is_some_and(|t| self.setup.end_tokens().contains(t));
        if ended { Finish::Eos } else { Finish::Length }
    }

    /// Ends an answer that is neither ended nor as long as it may be.
    fn closed(&self, mut tokens: Vec<u32>) -> Vec<u32> {
        tokens.truncate(self.setup.max_tokens as usize);
        if tokens.len() < self.setup.max_tokens as usize && self.finish(&tokens) == Finish::Length {
            tokens.extend(self.setup.end_tokens().last());
        }
        tokens
    }

    /// An answer with the fingerprints that its maker saw.
    fn own(&self, prompt: usize, mode: usize, answer: &Answer) -> Option<Case> {
        Some(Case { prompt, mode, output: answer.output() })
    }

    /// Tokens with forged fingerprints: honest up to the parting, a tie claimed there, no choice from then on.
    fn with(&self, prompt: usize, mode: usize, tokens: Vec<u32>) -> Option<Case> {
        let honest = self.fast(prompt, mode);
        let parting = honest.tokens.iter().zip(&tokens).take_while(|(a, b)| a == b).count();
        let mut prints: Vec<Fingerprint> = Vec::with_capacity(tokens.len());
        for (at, token) in tokens.iter().enumerate() {
            prints.push(match honest.prints.get(at) {
                Some(print) if at < parting => print.clone(),
                Some(print) if at == parting => tie(print, *token),
                _ => certain(*token)?,
            });
        }
        let finish = self.finish(&tokens);
        let fingerprints = prints.iter().flat_map(Fingerprint::encode).collect();
        Some(Case { prompt, mode, output: Output { tokens, fingerprints, finish } })
    }

    fn forged(&self, prompt: usize, mode: usize, answer: &Answer) -> Option<Case> {
        self.with(prompt, mode, answer.tokens.clone())
    }

    fn random(&self, prompt: usize, mode: usize, at: usize, below: usize) -> usize {
        let seed = (prompt * MODES + mode) as u64;
        (noise_bits(seed, u32::try_from(at).unwrap_or(0), 77) % below.max(1) as u64) as usize
    }

    fn garbage(&self, p: usize, m: usize, i: usize) -> Option<Case> {
        let most = self.setup.prompt.vocab_size() - 3;
        let length = self.fast(p, m).tokens.len();
        let token = |at| 3 + self.random(p, m, 1_000 * (i + 1) + at, most) as u32;
        self.with(p, m, self.closed((0..length).map(token).collect()))
    }

    /// The user's words, or the whole prompt.
    fn echo(&self, p: usize, m: usize, i: usize) -> Option<Case> {
        let ends = self.setup.end_tokens();
        let prompt = self.setup.prompts[p].iter().copied().filter(|t| !ends.contains(t)).collect();
        self.with(p, m, self.closed(if i == 0 { self.setup.words[p].clone() } else { prompt }))
    }

    fn truncated(&self, p: usize, m: usize, i: usize) -> Option<Case> {
        let honest = self.fast(p, m);
        let left = 1 + self.random(p, m, 10 + i, honest.tokens.len().saturating_sub(2));
        self.with(p, m, self.closed(honest.tokens.get(..left)?.to_vec()))
    }

    /// Honest up to the closest call (or the second closest), the second choice there, and then a cheaper model's
    /// words: really continued where greedy, its tail of the same request where sampled.
    fn cheap_after_tie(&self, p: usize, m: usize, i: usize) -> Option<Case> {
        if m == 0 {
            return (i == 0).then(|| self.own(p, m, &self.sets.after_tie[p]))?;
        }
        let honest = self.fast(p, m);
        let (_, seed) = Setup::draw(p, m);
        let gap = |at: usize, print: &Fingerprint| {
            let score = |i: usize| {
                let entry = print.entries().get(i)?;
                let noise = gumbel(seed, u32::try_from(at).ok()?, entry.token);
                Some(f64::from(entry.logprob()) + f64::from(WARM) * noise)
            };
            greedy_gap(print).and(Some(score(0)? - score(1)?))
        };
        let (at, token) = *closest(honest, gap).get(i)?;
        let cheap = if i == 0 { &self.sets.round3 } else { &self.sets.round2 };
        let mut tokens = honest.tokens[..at].to_vec();
        tokens.push(token);
        tokens.extend(cheap[2 * p + 1].tokens.iter().skip(at + 1));
        self.with(p, m, self.closed(tokens))
    }

    /// A "not" after a verb; where there is none, anywhere. What follows is honest.
    fn planted(&self, p: usize, m: usize, i: usize, not: u32, verbs: &[u32]) -> Option<Case> {
        let honest = &self.fast(p, m).tokens;
        let after = |at: &usize| verbs.contains(&honest[*at]) && honest.get(at + 1) != Some(&not);
        let at = (0..honest.len().saturating_sub(1)).filter(after).nth(i);
        let at = at.unwrap_or_else(|| self.random(p, m, 20 + i, honest.len().saturating_sub(1)));
        let mut tokens = honest.get(..=at)?.to_vec();
        tokens.push(not);
        tokens.extend(&honest[at + 1..]);
        tokens.truncate(self.setup.max_tokens as usize);
        self.with(p, m, self.closed(tokens))
    }

    fn wrong_seed(&self, p: usize, m: usize, i: usize) -> Option<Case> {
        if m == 0 {
            return None;
        }
        let other = 1 + (m - 1 + 1 + i) % (MODES - 1);
        self.own(p, m, self.fast(p, other))
    }

    /// The right seed at temperature 1; greedy where asked for 0.8; 0.8 where asked for greedy.
    fn wrong_temperature(&self, p: usize, m: usize, i: usize) -> Option<Case> {
        match (m, i) {
            (1, 0) => self.own(p, m, &self.sets.hotter[p]),
            (0, 1..) => self.own(p, m, self.fast(p, i)),
            (1.., 1) => self.own(p, m, self.fast(p, 0)),
            _ => None,
        }
    }

    /// A recorded set of 2 modes, greedy and the first seed.
    fn recorded(&self, set: &[Answer]) -> Vec<Option<Case>> {
        set.iter().enumerate().map(|(i, answer)| self.own(i / 2, i % 2, answer)).collect()
    }

    /// A cheaper model's text with the fingerprints of one pass of the right model over it.
    fn prefill_forged(&self) -> Vec<Option<Case>> {
        let sets = [&self.sets.round2, &self.sets.round3];
        let forged = |set: &Vec<Answer>| -> Vec<Option<Case>> {
            set.iter().enumerate().map(|(i, answer)| self.forged(i / 2, i % 2, answer)).collect()
        };
        sets.into_iter().flat_map(forged).collect()
    }
}
