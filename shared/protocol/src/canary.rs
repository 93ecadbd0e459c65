//! Canaries (protocol section 8): beside the k nodes of an attempt, one more works on what looks like the same request and
//! has another seed, or, where no seed changes the answer, the prompt of an earlier request. Nobody waits for its answer; a referee scores it under the seed that it was given. Whoever passed a
//! peer's answer off as its own, or gave its own away, stands there with the answer to another question.
//!
//! Everything follows from the dispatcher's draw ([`crate::vrf`]), which nodes do not know before the reveals. Operators
//! that compare their whole requests, seeds and prompts included, before they share are not found by this.

use crate::{
    assignment::{ALWAYS_PPM, Eligible, draw, happens, number},
    bytes::{Address, Hash32},
    hash::keccak,
    request::Request,
    sampling::SamplingParams,
};

/// Share of jobs that are canaries (section 8), parts per million.
pub const CANARY_PPM: u32 = 20_000;
/// Operators beyond the k that an attempt with a canary needs: the canary's, and two that can still referee.
pub const SPARE_OPERATORS: usize = 3;
/// A share of the probability that the likeliest token nearly always has alone.
const LEAST_TOP_P: f32 = 0.01;

/// How often an attempt of `k` has a canary so that one of its jobs in `job_ppm` parts per million is one, 10^-6:
/// `k * p / (1 - p)`.
pub fn chance_ppm(k: u32, job_ppm: u32) -> u32 {
    let others = u64::from(ALWAYS_PPM.saturating_sub(job_ppm));
    let jobs = u64::from(k) * u64::from(job_ppm) * u64::from(ALWAYS_PPM);
    let chance = jobs.checked_div(others).unwrap_or(u64::MAX);
    u32::try_from(chance).unwrap_or(ALWAYS_PPM).min(ALWAYS_PPM)
}

/// Whether the attempt with this draw has a canary. `operators` are those of its eligible set.
pub fn is_due(beta: &Hash32, k: u32, operators: usize, job_ppm: u32) -> bool {
    operators >= (k as usize).saturating_add(SPARE_OPERATORS)
        && happens(&keyed(beta), "due", chance_ppm(k, job_ppm))
}

/// Whether the seed changes what is drawn.
pub fn follows_seed(sampling: &SamplingParams) -> bool {
    sampling.temperature > 0.0 && sampling.top_k > 1 && sampling.min_p < 1.0 && sampling.top_p > LEAST_TOP_P
}

/// What the canary is asked: the same, under a seed of its own.
pub fn request(beta: &Hash32, original: &Request) -> Request {
    Request { seed: number(&keyed(beta), b"seed", u64::MAX), ..original.clone() }
}

/// Which of `count` earlier prompts the canary has in place of the request's, where no seed changes the answer.
pub fn choice(beta: &Hash32, count: usize) -> usize {
    // Below `count`.
    number(&keyed(beta), b"prompt", count as u64) as usize
}

/// The order in which a node for the canary is looked for: weighted as every draw, so that it is the same share of
/// everybody's jobs.
pub fn order<'a>(
    beta: &Hash32,
    set: &'a [Eligible],
    excluded: impl Fn(&Address) -> bool,
) -> Vec<&'a Eligible> {
    let drawn = draw(&keyed(beta), set);
    drawn.into_iter().filter(|eligible| !excluded(&eligible.operator)).collect()
}

fn keyed(beta: &Hash32) -> Hash32 {
    keccak(&[b"infera.canary.v1", &beta.0])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bytes::NodeId;

    fn set(operators: u8) -> Vec<Eligible> {
        (1..=operators)
            .map(|n| Eligible {
                node: NodeId([n; 32]),
                operator: Address([n; 20]),
                class: "exact".into(),
                weight: u32::from(n),
                audit_ppm: 0,
                trusted: true,
            })
            .collect()
    }

    #[test]
    fn one_job_in_fifty_is_a_canary() {
        // 3 * 0.02 / 0.98
        assert_eq!(chance_ppm(3, CANARY_PPM), 61_224);
        assert_eq!(
            (chance_ppm(3, 0), chance_ppm(3, ALWAYS_PPM), chance_ppm(7, 500_000)),
            (0, 1_000_000, 1_000_000)
        );
        let draws = 40_000_u32;
        let due = (0..draws).filter(|i| is_due(&keccak(&[&i.to_be_bytes()]), 3, 6, CANARY_PPM)).count();
        // Expected 2,449; 5 standard deviations are 240.
        assert!((2_209..=2_689).contains(&due), "{due}");
        assert!(!(0..draws).any(|i| is_due(&keccak(&[&i.to_be_bytes()]), 3, 5, CANARY_PPM)));
    }

    #[test]
    fn a_canary_is_another_question_that_looks_the_same() {
        let original = Request {
            id: uuid::Uuid::from_u128(1),
            model_root: Hash32([2; 32]),
            prompt: vec![1, 2],
            sampling: SamplingParams::default(),
            max_tokens: 9,
            stop: vec!["x".into()],
            seed: 7,
            grammar: None,
        };
        for temperature in [1.0, 0.3, 0.0] {
            let sampling = SamplingParams { temperature, ..original.sampling.clone() };
            let original = Request { sampling, ..original.clone() };
            let canary = request(&Hash32([9; 32]), &original);
            assert_ne!(canary.seed, original.seed);
            assert_eq!(canary, Request { seed: canary.seed, ..original });
        }
        assert_ne!(request(&Hash32([8; 32]), &original).seed, request(&Hash32([9; 32]), &original).seed);
    }

    #[test]
    fn what_is_drawn_from_one_token_follows_no_seed() {
        let of = |change: fn(&mut SamplingParams)| {
            let mut params = SamplingParams::default();
            change(&mut params);
            follows_seed(&params)
        };
        assert!(of(|_| ()) && of(|p| p.temperature = 0.1) && of(|p| p.top_p = 0.9) && of(|p| p.min_p = 0.2));
        assert!(!of(|p| p.temperature = 0.0) && !of(|p| p.top_k = 1) && !of(|p| p.min_p = 1.0));
        assert!(!of(|p| p.top_p = 1e-6));
        let mut chosen: Vec<usize> = (0..100_u32).map(|i| choice(&keccak(&[&i.to_be_bytes()]), 3)).collect();
        chosen.sort_unstable();
        chosen.dedup();
        assert_eq!((chosen, choice(&Hash32::ZERO, 0)), (vec![0, 1, 2], 0));
    }

    #[test]
    fn nobody_of_the_attempt_is_its_canary() {
        let set = set(6);
        let beta = Hash32([5; 32]);
        let order = order(&beta, &set, |operator| operator.0[0] <= 3);
        let mut operators: Vec<u8> = order.iter().map(|e| e.operator.0[0]).collect();
        operators.sort_unstable();
        assert_eq!(operators, [4, 5, 6]);
        // Not the order in which the attempt itself replaces.
        let other = (0..100_u32).map(|i| keccak(&[&i.to_be_bytes()])).any(|beta| {
            draw(&beta, &set).first().map(|e| e.node)
                != super::order(&beta, &set, |_| false).first().map(|e| e.node)
        });
        assert!(other);
    }
}
