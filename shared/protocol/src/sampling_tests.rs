use super::*;
use proptest::prelude::*;
use serde_json::Value;

fn golden() -> Value {
    serde_json::from_str(include_str!("../tests/golden/sampling.json")).unwrap()
}

fn hex64(v: &Value) -> u64 {
    u64::from_str_radix(v.as_str().unwrap(), 16).unwrap()
}

#[test]
fn noise_matches_the_golden_vectors() {
    for row in golden()["noise"].as_array().unwrap() {
        let seed = hex64(&row["seed"]);
        let position = u32::try_from(row["position"].as_u64().unwrap()).unwrap();
        let token = u32::try_from(row["token"].as_u64().unwrap()).unwrap();
        assert_eq!(noise_bits(seed, position, token), hex64(&row["bits"]), "{row}");
        assert_eq!(gumbel(seed, position, token).to_bits(), hex64(&row["gumbel"]), "{row}");
    }
}

/// Logits that need no file: the sine of the golden vector's description, from integers.
fn logits_of(n: u32, salt: u64) -> Vec<f32> {
    (0..n).map(|i| ((noise_bits(salt, 0, i) >> 40) as f32) / 524_288.0 - 16.0).collect()
}

#[test]
fn draws_match_the_golden_vectors() {
    for row in golden()["draws"].as_array().unwrap() {
        let params: SamplingParams = serde_json::from_value(row["params"].clone()).unwrap();
        let counts: Counts = serde_json::from_value(row["counts"].clone()).unwrap();
        let n = u32::try_from(row["vocabulary"].as_u64().unwrap()).unwrap();
        let logits = logits_of(n, hex64(&row["salt"]));
        let seed = hex64(&row["seed"]);
        let mask = row.get("mask").map(|tokens| {
            let mut mask = Mask::none(logits.len());
            let tokens: Vec<u32> = serde_json::from_value(tokens.clone()).unwrap();
            tokens.into_iter().for_each(|token| mask.allow(token));
            mask
        });
        let cands = candidates(&logits, &params, &counts, mask.as_ref()).unwrap();
        let tokens: Vec<u32> = serde_json::from_value(row["tokens"].clone()).unwrap();
        let drawn: Vec<u32> = (0..tokens.len())
            .map(|p| choose(&cands, params.temperature, seed, p as u32).unwrap().token)
            .collect();
        assert_eq!(drawn, tokens, "{row}");
        assert_eq!(cands.len() as u64, row["candidates"].as_u64().unwrap());
        let logprobs: Vec<String> =
            cands.iter().take(8).map(|c| format!("{:08x}", c.raw_logprob.to_bits())).collect();
        assert_eq!(serde_json::json!(logprobs), row["logprobs"], "{row}");
    }
}

fn with_bias(bias: impl IntoIterator<Item = (u32, f32)>) -> SamplingParams {
    SamplingParams { logit_bias: bias.into_iter().collect(), ..SamplingParams::default() }
}

#[test]
fn errors_name_the_field() {
    let p = SamplingParams::default();
    for (params, text) in [
        (SamplingParams { temperature: 2.1, ..p.clone() }, "temperature must be from 0 to 2, got 2.1"),
        (SamplingParams { temperature: f32::NAN, ..p.clone() }, "temperature must be from 0 to 2, got NaN"),
        (SamplingParams { top_p: 0.0, ..p.clone() }, "top_p must be above 0 and at most 1, got 0"),
        (SamplingParams { top_k: 65, ..p.clone() }, "top_k must be from 1 to 64, got 65"),
        (SamplingParams { min_p: -0.1, ..p.clone() }, "min_p must be from 0 to 1, got -0.1"),
        (
            SamplingParams { frequency_penalty: 3.0, ..p.clone() },
            "frequency_penalty must be from -2 to 2, got 3",
        ),
        (
            SamplingParams { presence_penalty: f32::INFINITY, ..p.clone() },
            "presence_penalty must be from -2 to 2, got inf",
        ),
        (with_bias([(7, 100.5)]), "logit_bias must be from -100 to 100 for each token, got 100.5"),
        (with_bias([(7, f32::NAN)]), "logit_bias must be from -100 to 100 for each token, got NaN"),
        (with_bias((0..301).map(|t| (t, 1.0))), "logit_bias must be at most 300 tokens, got 301 tokens"),
    ] {
        assert_eq!(params.validate().unwrap_err().to_string(), text);
        assert!(matches!(candidates(&[0.0], &params, &Counts::new(), None), Err(SampleError::Param(_))));
    }
}

#[test]
fn broken_logits_are_an_error() {
    let p = SamplingParams::default();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let got = candidates(&[0.0, bad], &p, &Counts::new(), None);
        assert!(matches!(got, Err(SampleError::NonFinite { token: 1, .. })), "{got:?}");
    }
    assert_eq!(candidates(&[], &p, &Counts::new(), None), Err(SampleError::Vocabulary(0)));
    assert_eq!(choose(&[], 1.0, 0, 0), Err(SampleError::NoCandidates));
}

#[test]
fn ties_go_to_the_lowest_id() {
    let cands =
        candidates(&[1.0, 3.0, -0.0, 3.0, 0.0], &SamplingParams::greedy(), &Counts::new(), None).unwrap();
    assert_eq!(cands.iter().map(|c| c.token).collect::<Vec<_>>(), [1, 3, 0, 2, 4]);
    let choice = choose(&cands, 0.0, 99, 5).unwrap();
    assert_eq!((choice.token, choice.margin), (1, 0.0));
}

#[test]
fn penalties_count_only_emitted_tokens() {
    let params =
        SamplingParams { frequency_penalty: 0.5, presence_penalty: 0.25, ..SamplingParams::greedy() };
    let cands = candidates(&[2.0, 1.5, 0.0], &params, &Counts::from([(0, 2), (2, 0)]), None).unwrap();
    let got: Vec<_> = cands.iter().map(|c| (c.token, c.logit)).collect();
    assert_eq!(got, [(1, 1.5), (0, 0.75), (2, 0.0)]);
    // The raw log-probability still belongs to the logit before penalties.
    assert!(cands[1].raw_logprob > cands[0].raw_logprob);
}

#[test]
fn bias_and_mask_table() {
    // Logits 3, 2, 1, 0, -1 of the tokens 0 to 4.
    let logits = [3.0, 2.0, 1.0, 0.0, -1.0];
    let all = [0, 1, 2, 3, 4];
    type Case<'a> = (&'a [(u32, f32)], Option<&'a [u32]>, &'a [u32]);
    let cases: &[Case<'_>] = &[
        (&[], None, &all),
        (&[], Some(&all), &all),
        (&[], Some(&[4, 2]), &[2, 4]),
        (&[(3, 100.0)], None, &[3, 0, 1, 2, 4]),
        (&[(0, -100.0)], None, &[1, 2, 3, 4, 0]),
        // A bias makes nothing allowed that is not, and a ban by bias is no mask.
        (&[(3, 100.0)], Some(&[0, 1]), &[0, 1]),
        (&[(2, -100.0)], Some(&[2]), &[2]),
        (&[(4, 5.0)], Some(&[0, 4]), &[4, 0]),
        // Equal after the bias: the lowest id. A token outside the vocabulary changes nothing.
        (&[(1, 1.0), (9, 50.0)], None, &[0, 1, 2, 3, 4]),
    ];
    for (bias, mask, expected) in cases {
        let params = with_bias(bias.iter().copied());
        let mask = mask.map(|tokens| {
            let mut mask = Mask::none(logits.len());
            tokens.iter().for_each(|token| mask.allow(*token));
            mask
        });
        let cands = candidates(&logits, &params, &Counts::new(), mask.as_ref()).unwrap();
        let tokens: Vec<u32> = cands.iter().map(|c| c.token).collect();
        assert_eq!(&tokens, expected, "{bias:?} {mask:?}");
        // The raw log-probabilities are the model's, whatever was biased or masked.
        let plain = candidates(&logits, &SamplingParams::default(), &Counts::new(), None).unwrap();
        for c in cands {
            let same = plain.iter().find(|p| p.token == c.token).unwrap();
            assert_eq!(c.raw_logprob.to_bits(), same.raw_logprob.to_bits());
        }
    }
}

#[test]
fn a_mask_that_allows_nothing_is_an_error() {
    for mask in [Mask::none(3), Mask::none(0), Mask::from_u32_words(&[0b1000], 4)] {
        let got = candidates(&[1.0, 2.0, 3.0], &SamplingParams::default(), &Counts::new(), Some(&mask));
        assert_eq!(got, Err(SampleError::NoCandidates), "{mask:?}");
    }
}

#[test]
fn bias_comes_before_the_penalties() {
    let params = SamplingParams {
        frequency_penalty: 0.5,
        presence_penalty: 0.25,
        logit_bias: [(0, 1.0), (1, -0.5)].into(),
        ..SamplingParams::greedy()
    };
    let cands = candidates(&[2.0, 1.5, 0.0], &params, &Counts::from([(0, 2)]), None).unwrap();
    let got: Vec<_> = cands.iter().map(|c| (c.token, c.logit)).collect();
    assert_eq!(got, [(0, 1.75), (1, 1.0), (2, 0.0)]);
}

#[test]
fn the_draw_follows_the_softmax() {
    // p = 0.5, 0.3, 0.2; 20,000 draws: 5 standard deviations are 0.018.
    let logits: Vec<f32> = [0.5f32, 0.3, 0.2].iter().map(|p| p.ln()).collect();
    let cands = candidates(&logits, &SamplingParams::default(), &Counts::new(), None).unwrap();
    let mut seen = [0u32; 3];
    for position in 0..20_000 {
        seen[choose(&cands, 1.0, 42, position).unwrap().token as usize] += 1;
    }
    for (n, p) in seen.iter().zip([0.5, 0.3, 0.2]) {
        assert!((f64::from(*n) / 20_000.0 - p).abs() < 0.018, "{seen:?}");
    }
}

fn params() -> impl Strategy<Value = SamplingParams> {
    (0.0f32..=2.0, 0.001f32..=1.0, 1u32..=64, 0.0f32..=1.0, -2.0f32..=2.0, -2.0f32..=2.0)
        .prop_map(|(t, p, k, m, f, q)| SamplingParams::new(t, p, k, m, f, q).unwrap())
}

proptest! {
    #[test]
    fn the_order_of_candidates_does_not_matter(
        logits in prop::collection::vec(-30.0f32..30.0, 1..200), p in params(), seed in any::<u64>(), at in any::<u32>(),
    ) {
        let mut cands = candidates(&logits, &p, &Counts::new(), None).unwrap();
        let forward = choose(&cands, p.temperature, seed, at).unwrap();
        cands.reverse();
        prop_assert_eq!(forward, choose(&cands, p.temperature, seed, at).unwrap());
    }

    #[test]
    fn temperature_zero_is_the_argmax(logits in prop::collection::vec(-30.0f32..30.0, 1..200), seed in any::<u64>()) {
        let cands = candidates(&logits, &SamplingParams::greedy(), &Counts::new(), None).unwrap();
        let choice = choose(&cands, 0.0, seed, 3).unwrap();
        let best = logits.iter().copied().fold(f32::MIN, f32::max);
        prop_assert_eq!(choice.token as usize, logits.iter().position(|z| *z == best).unwrap());
    }

    #[test]
    fn candidates_are_ordered_distinct_and_cut(
        logits in prop::collection::vec(-30.0f32..30.0, 1..300), p in params(),
        counts in prop::collection::btree_map(0u32..300, 0u32..5, 0..20),
    ) {
        let all = SamplingParams { top_p: 1.0, min_p: 0.0, ..p.clone() };
        let wide = candidates(&logits, &all, &counts, None).unwrap();
        let cut = candidates(&logits, &p, &counts, None).unwrap();
        prop_assert_eq!(wide.len(), logits.len().min(p.top_k as usize));
        prop_assert!(!cut.is_empty());
        prop_assert_eq!(&wide[..cut.len()], &cut[..]);
        for pair in wide.windows(2) {
            prop_assert!(pair[0].logit > pair[1].logit
                || (pair[0].logit == pair[1].logit && pair[0].token < pair[1].token));
        }
        let weight = |c: &Candidate| (f64::from(c.logit) - f64::from(wide[0].logit)).exp();
        let total: f64 = wide.iter().map(weight).sum();
        let kept: f64 = cut.iter().map(weight).sum();
        let without_last: f64 = cut[..cut.len() - 1].iter().map(weight).sum();
        // Either the nucleus is filled, or min_p cut the next one, or nothing was cut.
        let next = wide.get(cut.len()).map(weight);
        prop_assert!(kept / total >= f64::from(p.top_p) - 1e-9
            || next.is_none_or(|w| w < f64::from(p.min_p) + 1e-12));
        // Nothing more than needed.
        prop_assert!(cut.len() == 1 || without_last / total < f64::from(p.top_p) + 1e-9);
        prop_assert!(cut.len() == 1 || cut.iter().all(|c| weight(c) >= f64::from(p.min_p) - 1e-12));
        prop_assert!(cut.iter().all(|c| c.raw_logprob <= 0.0 && c.raw_logprob.is_finite()));
    }

    #[test]
    fn noise_is_finite(seed in any::<u64>(), position in any::<u32>(), token in any::<u32>()) {
        prop_assert!(gumbel(seed, position, token).is_finite());
    }

    #[test]
    fn only_validated_parameters_draw(t in any::<f32>(), p in any::<f32>(), k in any::<u32>(), m in any::<f32>()) {
        let built = SamplingParams::new(t, p, k, m, 0.0, 0.0);
        let raw = SamplingParams { temperature: t, top_p: p, top_k: k, min_p: m, ..SamplingParams::default() };
        prop_assert_eq!(candidates(&[1.0, 2.0], &raw, &Counts::new(), None).is_ok(), built.is_ok());
    }
}
