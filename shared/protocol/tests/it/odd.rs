//! Attempts and receipts at the edges of the rules: what one checker might see otherwise than another.

use infera_protocol::{
    assignment::{ALWAYS_PPM, Eligible},
    bytes::{Address, Hash32, VrfKey},
    evidence::{Evidence, Similarity, SlotEvidence, SlotOutcome, SubjectReport},
    fingerprint::{Entry, Fingerprint},
    identity::sign,
    judgement::is_planted,
    receipt::Receipt,
    referee::{Report, TokenScore, report_digest},
    request::{Finish, Output},
    sampling::SamplingParams,
};

use crate::{
    DOMAIN,
    attempts::{EPOCH, drawn, everybody, request, results, sorted, start},
    key_of, output, referee,
};

/// An attempt of equal parameters, its slots filled.
fn attempt(k: u32, audit_ppm: u32, outputs: &[Output]) -> Evidence {
    let mut e = start(request(SamplingParams::greedy()), k, EPOCH, "exact", everybody(audit_ppm));
    results(&mut e, &outputs.iter().cloned().map(Ok).collect::<Vec<_>>());
    e
}

pub fn odd_attempts() -> Vec<(String, Evidence)> {
    let mut all = juries();
    all.extend(outputs());
    all.extend(near_ties());
    all.extend(sets());
    all.extend(slots());
    all.push(("a defect that nobody notices".into(), lazy()));
    all
}

/// Equal results of so many tokens, and what each referee finds at the first of them, 10^-6 logits.
fn juries() -> Vec<(String, Evidence)> {
    let votes: [(usize, &[u32]); 16] = [
        (3, &[]),
        (3, &[0]),
        // The mean of six is below its bound.
        (6, &[499_999]),
        (6, &[500_000]),
        (6, &[u32::MAX]),
        (3, &[150_000]),
        (3, &[150_001]),
        (3, &[200_000]),
        (3, &[0, 9_000_000]),
        (3, &[9_000_000, 0]),
        (3, &[9_000_000, 9_000_000]),
        (3, &[9_000_000, 0, 0]),
        (3, &[9_000_000, 9_000_000, 0]),
        (3, &[0, 0, 9_000_000]),
        (3, &[9_000_000, 0, 9_000_000, 0]),
        (3, &[9_000_000, 0, 9_000_000, 0, 0]),
    ];
    let jury = |(tokens, margins): &(usize, &[u32])| {
        let good = output(&[&[50, 51, 52, 53, 54][..tokens - 1], &[2]].concat());
        let mut e = attempt(3, ALWAYS_PPM, &[good.clone(), good.clone(), good]);
        for margin in *margins {
            let next = referee(&e, |_| *margin);
            e.referees.push(next);
        }
        (format!("jury {margins:?} on {tokens} tokens"), e)
    };
    votes.iter().map(jury).collect()
}

/// Equal results and one that may break the limits, properly committed to.
fn outputs() -> Vec<(String, Evidence)> {
    let good = output(&[50, 51, 2]);
    let finish = |tokens: &[u32], finish| Output { finish, ..output(tokens) };
    let print = |bytes: &[u8]| Output { fingerprints: bytes.to_vec(), ..output(&[2]) };
    let entry = |bits: u16| print(&[&[1, 0, 0, 0, 2][..], &bits.to_be_bytes()].concat());
    let mut odd = vec![
        finish(&[50, 51, 52], Finish::Length),
        finish(&[50; 8], Finish::Length),
        finish(&[50, 51, 52, 53, 54, 55, 56, 2], Finish::Length),
        finish(&[50, 51], Finish::Stop),
        finish(&[50, 51], Finish::Grammar),
        finish(&[50, 51], Finish::Eos),
        finish(&[50, 2, 51], Finish::Eos),
        finish(&[2, 2], Finish::Eos),
        finish(&[50, 51, 2], Finish::Stop),
        finish(&[], Finish::Eos),
        finish(&[50, 51, 52, 53, 54, 55, 56, 57, 2], Finish::Eos),
        output(&[2]),
        print(&[]),
        print(&[0]),
        print(&[9]),
        print(&[1, 0, 0, 0, 2]),
        print(&[1, 0, 0, 0, 2, 0, 0, 0]),
        print(&[2, 0, 0, 0, 2, 0, 0, 0, 0, 0, 2, 0, 0]),
        print(&[2, 0, 0, 0, 2, 0, 0, 0, 0, 0, 3, 0, 0]),
        print(&[1, 0, 0, 0, 2, 0, 0, 1, 0, 0, 0, 2, 0, 0]),
    ];
    odd.extend([0, 1, 0x8000, 0x8001, 0xfbff, 0xfc00, 0x7c00, 0x7e00, 0xfe00, 0x3c00].map(entry));
    let of = |(i, odd): (usize, Output)| {
        let mut revealed = attempt(3, 0, &[good.clone(), odd, good.clone()]);
        while !revealed.no_more_referees() {
            let next = referee(&revealed, |tokens| if tokens.first() == Some(&50) { 0 } else { 9_000_000 });
            revealed.referees.push(next);
        }
        let mut mismatch = revealed.clone();
        mismatch.slots[1].outcome = SlotOutcome::Mismatch;
        [(format!("output {i}"), revealed), (format!("output {i} as a mismatch"), mismatch)]
    };
    odd.into_iter().enumerate().flat_map(of).collect()
}

/// Tokens and their log-probabilities.
type Seen = Vec<(u32, f64)>;

/// Three texts that part at their second token. By text the log-probabilities that it saw of 60, 61 and 62, its own first;
/// and how alike 60 and 61, 60 and 62, 61 and 62 are.
fn near_ties() -> Vec<(String, Evidence)> {
    let all = [60, 61, 62].map(|token| (token, -1.0));
    let (equal, far) = ([all; 3].map(Vec::from), 400_000);
    let change = |text: usize, entries: Seen| {
        let mut prints = equal.clone();
        prints[text] = entries;
        prints
    };
    let table = [
        ("alike", equal.clone(), [900_000; 3]),
        ("one pair is not alike", equal.clone(), [900_000, 900_000, far]),
        ("another pair is not alike", equal.clone(), [far, 900_000, 900_000]),
        ("only one pair is alike", equal.clone(), [far, 500_000, 499_999]),
        ("the cut decides", change(0, vec![(60, -1.0), (62, -1.05)]), [900_000; 3]),
        ("the cut is far", change(0, vec![(60, -1.0), (62, -1.05), (70, -3.0)]), [900_000; 3]),
        ("its own token is missing", change(0, vec![(61, -1.0), (62, -1.0)]), [900_000; 3]),
        ("another distribution", change(1, vec![(60, -1.0), (61, -1.0), (62, -1.2)]), [900_000; 3]),
        ("nearly the same distribution", change(1, vec![(60, -1.0), (61, -1.0), (62, -1.09)]), [900_000; 3]),
        ("nothing is shared", change(2, vec![(62, -1.0), (99, -1.0)]), [900_000; 3]),
    ];
    let of = |(name, prints, alike): (&str, [Seen; 3], [u32; 3])| {
        let texts: Vec<Output> =
            prints.iter().enumerate().map(|(i, seen)| parted(60 + i as u32, seen)).collect();
        let mut e = attempt(3, 0, &texts);
        let pairs = [(0, 1), (0, 2), (1, 2)].into_iter().zip(alike);
        let similarity = |((a, b), millionths): ((usize, usize), u32)| {
            let (a, b): (&Output, &Output) = (&texts[a], &texts[b]);
            Similarity { answers: sorted(a.hash(), b.hash()), millionths }
        };
        e.similarities = pairs.map(similarity).collect();
        e.referees.push(referee(&e, |_| 0));
        (format!("near-ties: {name}"), e)
    };
    table.into_iter().map(of).collect()
}

fn parted(own: u32, seen: &[(u32, f64)]) -> Output {
    let entry = |(token, logprob): &(u32, f64)| Entry {
        token: *token,
        logprob: half::f16::from_f64(*logprob).to_bits(),
    };
    let alone = |token| Fingerprint::new(vec![Entry { token, logprob: 0 }]).unwrap().encode();
    let both = Fingerprint::new(seen.iter().map(entry).collect()).unwrap().encode();
    Output { fingerprints: [alone(50), both, alone(2)].concat(), ..output(&[50, own, 2]) }
}

/// Who counts, and how many are enough.
fn sets() -> Vec<(String, Evidence)> {
    let texts = [50, 60, 70, 80].map(|token| output(&[token, 2]));
    let of = |parts: &[usize]| parts.iter().map(|i| texts[*i].clone()).collect::<Vec<_>>();
    let few = |eligible: Vec<Eligible>| {
        eligible.into_iter().filter(|e| e.operator.0[0] < 5).collect::<Vec<Eligible>>()
    };
    let mut all = Vec::new();
    for (name, parts) in [
        ("two of four", vec![0, 0, 1, 2]),
        ("three of four", vec![0, 0, 0, 1]),
        ("two and two", vec![0, 0, 1, 1]),
        ("two of three", vec![0, 1, 0]),
    ] {
        // Nobody is left who could referee.
        let mut e = start(request(SamplingParams::greedy()), 3, EPOCH, "exact", few(everybody(0)));
        results(&mut e, &of(&parts).into_iter().map(Ok).collect::<Vec<_>>());
        all.push((name.into(), e));
    }
    // One alone does not decide.
    let mut denied = start(request(SamplingParams::greedy()), 3, EPOCH, "exact", few(everybody(ALWAYS_PPM)));
    results(&mut denied, &of(&[0, 0, 0]).into_iter().map(Ok).collect::<Vec<_>>());
    denied.referees.push(referee(&denied, |_| 9_000_000));
    all.push(("the only referee denies it".into(), denied));
    let mut unfit = attempt(3, 0, &of(&[0, 0, 0]));
    unfit.unfit = vec![unfit.slots[0].node];
    all.push(("an unfit result that nobody refereed".into(), unfit.clone()));
    unfit.unfit.clear();
    all.push(("equal results".into(), unfit));
    let mut rates = everybody(0);
    for e in rates.iter_mut().step_by(2) {
        e.audit_ppm = ALWAYS_PPM;
    }
    let mut mixed_rates = start(request(SamplingParams::greedy()), 3, EPOCH, "exact", rates);
    results(&mut mixed_rates, &of(&[0, 0, 0]).into_iter().map(Ok).collect::<Vec<_>>());
    all.push(("some call for an audit".into(), mixed_rates));
    all.push(("eight results".into(), attempt(7, 0, &of(&[0; 8]))));
    all.push(("seven results".into(), attempt(7, 0, &of(&[0; 7]))));
    let mut alone = start(request(SamplingParams::greedy()), 3, EPOCH, "fast", everybody(0));
    results(&mut alone, &of(&[0]).into_iter().map(Ok).collect::<Vec<_>>());
    all.push(("a class of one".into(), alone));
    all
}

/// A node that refereed the attempt and is drawn afterwards.
fn slots() -> Vec<(String, Evidence)> {
    let good = output(&[50, 51, 2]);
    let mut e = attempt(3, ALWAYS_PPM, &[good.clone(), good.clone(), good]);
    let next = drawn(&e)[3].clone();
    let nobody = SlotEvidence {
        node: next.node,
        operator: next.operator,
        outcome: SlotOutcome::Refereed,
        commitment: None,
        reveal: None,
        decline: None,
    };
    while !e.no_more_referees() && e.referees.iter().all(|r| r.operator != next.operator) {
        let asked = referee(&e, |_| 0);
        e.referees.push(asked);
    }
    e.slots.push(nobody);
    let mut never = e.clone();
    never.referees.pop();
    vec![("refereed".into(), e), ("never refereed".into(), never)]
}

/// A referee that was asked about an answer and a defect, and confirms both.
fn lazy() -> Evidence {
    let good = output(&[50, 51, 2]);
    let at = |epoch| {
        let mut e = start(request(SamplingParams::greedy()), 3, epoch, "exact", everybody(ALWAYS_PPM));
        results(&mut e, &vec![Ok(good.clone()); 3]);
        e
    };
    let mut all = (EPOCH..EPOCH + 2_000).map(at);
    let mut e = all.find(|e| is_planted(&e.beta2(), &e.referee_order()[0].node)).expect("one in twenty");
    let mut both = referee(&e, |_| 0);
    let fingerprint = Fingerprint::new(vec![Entry { token: 1, logprob: 0 }]).unwrap();
    let scores = Report { scores: vec![TokenScore { margin_micro: 0, fingerprint }; 3] }.encode();
    let subject = good.hash();
    let digest = report_digest(&DOMAIN, &e.request_hash(), e.attempt, &both.node, &subject, &scores);
    both.reports.push(SubjectReport { subject, scores, signature: sign(&key_of(both.node), &digest) });
    e.referees.push(both);
    e
}

/// Receipts without evidence that are not what they should be.
pub fn odd_receipts(honest: &Receipt) -> Vec<Receipt> {
    type Change = fn(&mut Receipt);
    let changes: [Change; 24] = [
        |_| {},
        |r| r.verified.truncate(2),
        |r| r.verified.clear(),
        |r| r.verified[1].node = r.verified[0].node,
        |r| r.unpaid[0].operator = r.verified[0].operator,
        |r| r.payments.swap(0, 1),
        |r| {
            r.payments.pop();
        },
        |r| {
            r.payments[0].amount_micro -= 1;
            r.payments[1].amount_micro += 1;
        },
        |r| r.payments[0].amount_micro = u64::MAX,
        |r| r.asked_k = 2,
        |r| r.asked_k = 8,
        |r| r.k = 5,
        |r| r.output_tokens += 1,
        |r| r.price_micro = u64::MAX,
        |r| r.charged_micro = 0,
        |r| r.epoch -= 1,
        |r| r.submitted_at_ms = -5,
        |r| r.submitted_at_ms = i64::MIN,
        |r| r.decided_at_ms = i64::MAX,
        |r| r.submitted_at_ms += 86_400_000,
        |r| r.decided_at_ms += 86_400_000,
        |r| r.model_root = Hash32::ZERO,
        |r| r.dispatcher = VrfKey([0; 32]),
        |r| r.contract = Address([0xff; 20]),
    ];
    let changed = |change: &Change| {
        let mut receipt = honest.clone();
        change(&mut receipt);
        receipt
    };
    changes.iter().map(changed).collect()
}
