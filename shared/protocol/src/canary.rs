//! Canaries (protocol section 8): beside the k nodes of an attempt, one more works on what looks like the same request and
//! has another seed. Nobody waits for its answer; a referee scores it under the seed that it was given. Whoever passed a
//! peer's answer off as its own, or gave its own away, stands there with the answer to another question.
//!
//! Everything follows from the dispatcher's draw ([`crate::vrf`]), which nodes do not know before the reveals. Operators
//! that compare their whole requests, seeds included, before they share are not found by this.

use crate::{
    assignment::{ALWAYS_PPM, Eligible, draw, happens, number},
    bytes::{Address, Hash32},
    hash::keccak,
    request::Request,
};

/// Share of jobs that are canaries (section 8), parts per million.
pub const CANARY_PPM: u32 = 20_000;
/// Operators beyond the k that an attempt with a canary needs: the canary's, and two that can still referee.
pub const SPARE_OPERATORS: usize = 3;
/// Temperature of a canary whose request asks for the argmax, where a seed changes nothing.
pub const CANARY_TEMPERATURE: f32 = 0.8;

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

/// What the canary is asked: the same, under a seed of its own.
pub fn request(beta: &Hash32, original: &Request) -> Request {
    let mut canary = original.clone();
    canary.seed = number(&keyed(beta), b"seed", u64::MAX);
    if canary.sampling.temperature <= 0.0 {
        canary.sampling.temperature = CANARY_TEMPERATURE;
    }
    canary
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
            sampling: crate::sampling::SamplingParams::default(),
            max_tokens: 9,
            stop: vec!["x".into()],
            seed: 7,
            grammar: None,
        };
        let greedy = |temperature| Request {
            sampling: crate::sampling::SamplingParams { temperature, ..original.sampling.clone() },
            ..original.clone()
        };
        for (asked, expected) in [(1.0, 1.0), (0.3, 0.3), (0.0, CANARY_TEMPERATURE)] {
            let canary = request(&Hash32([9; 32]), &greedy(asked));
            assert_ne!(canary.seed, original.seed);
            assert_eq!(canary, Request { seed: canary.seed, ..greedy(expected) });
        }
        assert_ne!(request(&Hash32([8; 32]), &original).seed, request(&Hash32([9; 32]), &original).seed);
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
