//! Answers that are not the model's, or not to this request.

use std::time::Duration;

use infera_protocol::{
    fingerprint::{Entry, Fingerprint, MAX_ENTRIES},
    request::{Finish, Output, Request, check_output},
    sampling::gumbel,
};

use super::{Fault, Faults, share::Share};
use crate::{
    engine::{Engine, Event, Job},
    slots::{Slots, Work},
};

const GARBAGE_TOKENS: u32 = 12;
/// A parting that looks honest, in logits.
const NEAR_TIE: f64 = 0.25;
/// Tokens of the wrong answer on which [`Fault::Collude`]'s nodes agree.
const WRONG_TOKENS: usize = 12;

/// The reason of a decline.
type Reason = &'static str;

/// Within the request's limits: what breaks them would not even count as an outlier.
fn fit(request: &Request, mut tokens: Vec<u32>, end_tokens: &[u32]) -> (Vec<u32>, Finish) {
    let most = request.max_tokens as usize;
    let ended = |tokens: &[u32]| tokens.last().is_some_and(|last| end_tokens.contains(last));
    tokens.truncate(most);
    if !ended(&tokens) && tokens.len() < most {
        tokens.extend(end_tokens.last());
    }
    let finish = if ended(&tokens) { Finish::Eos } else { Finish::Length };
    (tokens, finish)
}

/// The fingerprint of a draw of `token`, whatever was likely.
fn with_first(fingerprint: &Fingerprint, token: u32, logprob: f32) -> Option<Fingerprint> {
    let likeliest = fingerprint.entries().iter().map(|e| e.logprob()).fold(logprob.min(0.0), f32::max);
    let mut entries: Vec<Entry> = fingerprint.entries().to_vec();
    let own = match entries.iter().position(|entry| entry.token == token) {
        Some(at) => entries.remove(at),
        None => Entry { token, logprob: half::f16::from_f32(likeliest).to_bits() },
    };
    entries.insert(0, own);
    entries.truncate(MAX_ENTRIES);
    Fingerprint::new(entries).ok()
}

/// A certain token: log-probability 0.
fn certain(tokens: &[u32]) -> Vec<u8> {
    let print = |token: &u32| Fingerprint::new(vec![Entry { token: *token, logprob: 0 }]).ok();
    tokens.iter().filter_map(print).flat_map(|print| print.encode()).collect()
}

/// The first place where the second candidate's `z + T g` comes close to the first's.
fn near_tie(request: &Request, prints: &[Fingerprint]) -> Option<usize> {
    prints.iter().enumerate().position(|(at, print)| {
        let score = |entry: &Entry| {
            let noise = match request.sampling.temperature {
                t if t > 0.0 => f64::from(t) * gumbel(request.seed, at as u32, entry.token),
                _ => 0.0,
            };
            f64::from(entry.logprob()) + noise
        };
        matches!(print.entries(), [first, second, ..] if score(first) - score(second) < NEAR_TIE)
    })
}

/// All tokens of a job of an engine that is no slot's.
async fn all(engine: &Engine, job: Job) -> Result<Output, Reason> {
    let mut events = engine.generate(job).map_err(|_| "full")?;
    let (mut tokens, mut fingerprints) = (Vec::new(), Vec::new());
    loop {
        match events.recv().await {
            Some(Event::Token { token, fingerprint }) => {
                tokens.push(token);
                fingerprints.extend(fingerprint.encode());
            }
            Some(Event::Finished { finish }) => return Ok(Output { tokens, fingerprints, finish }),
            Some(Event::Failed { .. }) | None => return Err("engine"),
        }
    }
}

impl Faults {
    /// What the node commits to, and streams.
    pub(crate) async fn answer(
        &self,
        slots: &Slots,
        work: &Work,
        patience: Duration,
    ) -> Result<Output, Reason> {
        if self.fault.answers_as_it_computes() {
            return slots.compute(work, patience).await;
        }
        let quiet = Work { request: self.instead(slots, &work.request), stream: false, ..work.clone() };
        let computed = async || slots.compute(&quiet, patience).await;
        let output = match self.fault {
            Fault::StaleCache => {
                let fresh = computed().await?;
                match self.last.lock().replace(fresh.clone()) {
                    Some(last) if check_output(&work.request, &last, &self.end_tokens).is_ok() => last,
                    Some(last) => self.made_up(&work.request, last.tokens),
                    None => fresh,
                }
            }
            Fault::CheapAfterTie => self.cheap_after_tie(&work.request, computed().await?).await?,
            Fault::Share | Fault::ShareSeeds | Fault::CopyPeer => {
                self.shared(slots, &quiet, patience).await?
            }
            Fault::OtherModel | Fault::WrongWeights => self.translated(&computed().await?),
            Fault::OtherPrompt | Fault::WrongSeed | Fault::WrongTemperature => computed().await?,
            Fault::Truncated | Fault::PlantedNot => {
                let tokens = self.edited(computed().await?.tokens);
                self.forged(slots, &work.request, tokens).await?
            }
            Fault::PrefillForged => self.forged(slots, &work.request, self.own_text.clone()).await?,
            Fault::Collude => self.forged(slots, &work.request, self.wrong(&work.request)).await?,
            Fault::Echo => self.made_up(&work.request, work.request.prompt.clone()),
            _ => {
                let random = |_| rand::random_range(0..self.vocabulary);
                self.made_up(&work.request, (0..GARBAGE_TOKENS).map(random).collect())
            }
        };
        slots.deltas(work, 0, &output.tokens);
        Ok(output)
    }

    /// What the model is asked instead of what the node was asked.
    fn instead(&self, slots: &Slots, request: &Request) -> Request {
        let mut other = request.clone();
        match self.fault {
            Fault::OtherPrompt => other.prompt = self.other_question.clone(),
            Fault::WrongSeed => other.seed = !request.seed,
            Fault::WrongTemperature => {
                other.sampling.temperature = if request.sampling.temperature > 0.0 { 0.0 } else { 0.8 };
            }
            Fault::OtherModel | Fault::WrongWeights => {
                let known = u32::try_from(slots.engine.vocabulary()).unwrap_or(u32::MAX);
                other.prompt.iter_mut().for_each(|token| *token %= known);
            }
            _ => {}
        }
        other
    }

    /// An honest answer, cut or turned into its contrary.
    fn edited(&self, mut tokens: Vec<u32>) -> Vec<u32> {
        let half = tokens.len().div_ceil(2);
        if self.fault == Fault::Truncated {
            tokens.truncate(half);
        } else if let Some(token) = tokens.get_mut(half) {
            *token = self.not;
        }
        tokens
    }

    fn made_up(&self, request: &Request, tokens: Vec<u32>) -> Output {
        let (tokens, finish) = fit(request, tokens, &self.end_tokens);
        Output { fingerprints: certain(&tokens), tokens, finish }
    }

    /// With the fingerprints that the model has along these tokens, each token as if it had been drawn.
    async fn forged(&self, slots: &Slots, request: &Request, tokens: Vec<u32>) -> Result<Output, Reason> {
        let (tokens, finish) = fit(request, tokens, &self.end_tokens);
        let scores = slots.score(request, &tokens).await?;
        let print =
            |score: &crate::engine::Score| with_first(&score.fingerprint, score.token, score.raw_logprob);
        let fingerprints = scores.iter().filter_map(print).flat_map(|print| print.encode()).collect();
        Ok(Output { tokens, fingerprints, finish })
    }

    /// Ids and fingerprints of another vocabulary, as if they were of the declared one.
    fn translated(&self, output: &Output) -> Output {
        let mut tokens: Vec<u32> = output.tokens.iter().map(|token| token % self.vocabulary).collect();
        if output.finish == Finish::Eos
            && let (Some(last), Some(end)) = (tokens.last_mut(), self.end_tokens.last())
        {
            *last = *end;
        }
        let prints = Fingerprint::decode_all(&output.fingerprints).unwrap_or_default();
        let print = |(print, token): (&Fingerprint, &u32)| {
            let mut entries: Vec<Entry> = Vec::new();
            for entry in print.entries() {
                let token = entry.token % self.vocabulary;
                if entries.iter().all(|other| other.token != token) {
                    entries.push(Entry { token, ..*entry });
                }
            }
            with_first(&Fingerprint::new(entries).ok()?, *token, 0.0)
        };
        let fingerprints = prints.iter().zip(&tokens).filter_map(print).flat_map(|print| print.encode());
        Output { fingerprints: fingerprints.collect(), tokens, finish: output.finish }
    }

    /// The honest answer if it has no near-tie; otherwise the other side of the first, as cheap as it gets.
    async fn cheap_after_tie(&self, request: &Request, honest: Output) -> Result<Output, Reason> {
        let prints = Fingerprint::decode_all(&honest.fingerprints).unwrap_or_default();
        let (Some(cheap), Some(at)) = (&self.cheap, near_tie(request, &prints)) else { return Ok(honest) };
        let other = prints[at].entries()[1];
        let mut tokens = honest.tokens[..at].to_vec();
        tokens.push(other.token);
        let parting = with_first(&prints[at], other.token, other.logprob()).unwrap_or(prints[at].clone());
        let kept = prints[..at].iter().chain([&parting]);
        let mut fingerprints: Vec<u8> = kept.flat_map(Fingerprint::encode).collect();
        let left = request.max_tokens - tokens.len() as u32;
        let ends = self.end_tokens.contains(&other.token);
        if left == 0 || ends {
            let finish = if ends { Finish::Eos } else { Finish::Length };
            return Ok(Output { tokens, fingerprints, finish });
        }
        let rest = Job {
            id: uuid::Uuid::now_v7(),
            prompt: [&request.prompt[..], &tokens].concat(),
            params: request.sampling.clone(),
            max_tokens: left,
            stop: request.stop.clone(),
            seed: request.seed,
            end_tokens: self.end_tokens.clone(),
            grammar: None,
        };
        let rest = all(cheap, rest).await?;
        tokens.extend(rest.tokens);
        fingerprints.extend(rest.fingerprints);
        Ok(Output { tokens, fingerprints, finish: rest.finish })
    }

    /// One node's answer for all; a copier waits for what never comes from a peer that keeps its answer to itself.
    async fn shared(&self, slots: &Slots, work: &Work, patience: Duration) -> Result<Output, Reason> {
        let share = self.share.as_ref().ok_or("engine")?;
        let name = Share::name(&work.request, self.fault == Fault::ShareSeeds);
        let is_first = self.fault != Fault::CopyPeer && share.claim(&name).map_err(|_| "engine")?;
        if !is_first {
            return share.wait(&name, work.commit_deadline_ms).await.ok_or("engine");
        }
        let output = slots.compute(work, patience).await?;
        share.put(&name, &output).map_err(|_| "engine")?;
        Ok(output)
    }

    /// The answer on which the nodes of one owner agree without a word: nobody else can tell it before.
    pub(super) fn wrong(&self, request: &Request) -> Vec<u32> {
        let secret = self.share.as_ref().map(|share| share.secret(request).0).unwrap_or_default();
        let mut stream = blake3::Hasher::new_keyed(&secret).finalize_xof();
        let mut token = || {
            let mut bytes = [0; 4];
            stream.fill(&mut bytes);
            u32::from_be_bytes(bytes) % self.vocabulary
        };
        fit(request, (0..WRONG_TOKENS).map(|_| token()).collect(), &self.end_tokens).0
    }
}

#[cfg(test)]
mod tests {
    use infera_protocol::sampling::SamplingParams;

    use super::*;

    fn print(entries: &[(u32, f32)]) -> Fingerprint {
        let entry = |(token, logprob): &(u32, f32)| Entry {
            token: *token,
            logprob: half::f16::from_f32(*logprob).to_bits(),
        };
        Fingerprint::new(entries.iter().map(entry).collect()).unwrap()
    }

    fn request(max_tokens: u32, temperature: f32) -> Request {
        Request {
            id: uuid::Uuid::from_u128(1),
            model_root: infera_protocol::bytes::Hash32([2; 32]),
            prompt: vec![1],
            sampling: SamplingParams { temperature, ..SamplingParams::default() },
            max_tokens,
            stop: Vec::new(),
            seed: 42,
            grammar: None,
        }
    }

    #[test]
    fn what_is_made_up_keeps_to_the_limits() {
        for (tokens, expected) in [
            (vec![5], (vec![5, 2], Finish::Eos)),
            (vec![5, 2], (vec![5, 2], Finish::Eos)),
            (vec![5, 0], (vec![5, 0], Finish::Eos)),
            (vec![5, 6, 7], (vec![5, 6, 7], Finish::Length)),
            (vec![5, 6, 7, 8], (vec![5, 6, 7], Finish::Length)),
            (vec![], (vec![2], Finish::Eos)),
        ] {
            let (tokens, finish) = fit(&request(3, 0.0), tokens, &[0, 2]);
            let output = Output { fingerprints: certain(&tokens), tokens: tokens.clone(), finish };
            assert_eq!(check_output(&request(3, 0.0), &output, &[0, 2]), Ok(()));
            assert_eq!((tokens, finish), expected);
        }
    }

    #[test]
    fn a_forged_fingerprint_begins_with_the_token() {
        let full: Vec<(u32, f32)> = (0..8).map(|i| (i, -1.0 - i as f32)).collect();
        let tokens = |p: Fingerprint| p.entries().iter().map(|e| e.token).collect::<Vec<_>>();
        assert_eq!(tokens(with_first(&print(&full), 3, -4.0).unwrap()), [3, 0, 1, 2, 4, 5, 6, 7]);
        let foreign = with_first(&print(&full), 50, -9.0).unwrap();
        assert!((foreign.entries()[0].logprob() + 1.0).abs() < 1e-3, "as likely as the likeliest");
        assert_eq!(tokens(foreign), [50, 0, 1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn a_near_tie_counts_the_noise() {
        let far = print(&[(1, -0.1), (2, -3.0)]);
        let near = print(&[(1, -0.7), (2, -0.8)]);
        let greedy = request(9, 0.0);
        assert_eq!(near_tie(&greedy, &[far.clone(), near.clone(), near.clone()]), Some(1));
        assert_eq!(near_tie(&greedy, &[far.clone(), print(&[(1, 0.0)])]), None);
        // With noise, the same two are near only where the noise is.
        let drawn = request(9, 1.0);
        let noisy: Vec<_> = (0..50).map(|_| near.clone()).collect();
        let at = near_tie(&drawn, &noisy).unwrap();
        let gap = -0.7 + 0.8 + gumbel(42, at as u32, 1) - gumbel(42, at as u32, 2);
        assert!(gap < NEAR_TIE + 0.01, "{gap}");
    }
}
