//! What needs no model.

use infera_protocol::{bytes::Hash32, request::Finish, sampling::SamplingParams};
use infera_runtime::clock;
use uuid::Uuid;

use super::*;

fn faults(fault: Fault, share: Option<&str>) -> Faults {
    Faults {
        fault,
        share: share.map(|path| Share::new(path.into())),
        vocabulary: 100,
        end_tokens: vec![0, 2],
        other_question: vec![1],
        not: 7,
        own_text: vec![8, 9],
        cheap: None,
        last: Mutex::new(None),
    }
}

fn request(prompt: Vec<u32>) -> Request {
    Request {
        id: Uuid::from_u128(1),
        model_root: Hash32([2; 32]),
        prompt,
        sampling: SamplingParams::greedy(),
        max_tokens: 16,
        stop: Vec::new(),
        seed: 42,
        grammar: None,
    }
}

#[test]
fn some_prompts_are_disliked_always() {
    let picky = faults(Fault::Declining, None);
    let disliked = |prompt: u32| picky.declines(&request(vec![prompt]));
    let count = (0..200).filter(|prompt| disliked(*prompt) == Some("full")).count();
    assert!((70..130).contains(&count), "{count} of 200");
    assert_eq!((0..200).map(disliked).collect::<Vec<_>>(), (0..200).map(disliked).collect::<Vec<_>>());
    assert!((0..200).all(|prompt| faults(Fault::Garbage, None).declines(&request(vec![prompt])).is_none()));
}

#[test]
fn an_equivocator_has_two_answers() {
    let first = Output { tokens: vec![5, 99], fingerprints: Vec::new(), finish: Finish::Length };
    assert_eq!(faults(Fault::Equivocating, None).second(&first).unwrap().tokens, vec![5, 0]);
    assert_eq!(faults(Fault::Garbage, None).second(&first), None);
}

#[test]
fn a_late_reveal_comes_after_the_deadline_whenever_that_is() {
    let late = faults(Fault::LateReveal, None);
    assert!(late.reveals_after(clock::now_ms() + 60_000).unwrap() > Duration::from_secs(50));
    assert_eq!(late.reveals_after(0), Some(LATE));
    assert_eq!(faults(Fault::Garbage, None).reveals_after(0), None);
}

#[test]
fn colluders_agree_without_a_word_and_others_cannot_tell() {
    let (one, two, other) = (
        faults(Fault::Collude, Some("gang")),
        faults(Fault::Collude, Some("gang")),
        faults(Fault::Collude, Some("others")),
    );
    let asked = request(vec![1, 2]);
    let wrong = one.wrong(&asked);
    assert_eq!((wrong.len(), wrong.last()), (13, Some(&2)));
    assert_eq!(wrong, two.wrong(&asked));
    assert_ne!(wrong, other.wrong(&asked));
    assert_ne!(wrong, one.wrong(&Request { id: Uuid::from_u128(2), ..asked.clone() }));
    // Canaries differ by their seed alone: the same wrong answer still.
    assert_eq!(wrong, one.wrong(&Request { seed: 43, ..asked.clone() }));
    assert_eq!(one.wrong(&Request { max_tokens: 3, ..asked }).len(), 3);
}

#[test]
fn modes_name_what_they_need() {
    let needing = |flag| Fault::value_variants().iter().filter(|fault| fault.needs() == Some(flag)).count();
    assert_eq!((needing("--fault-model"), needing("--fault-share")), (2, 4));
    assert_eq!(Fault::from_str("round3bit", false), Ok(Fault::Round3Bit));
    assert_eq!(Fault::from_str("cheap-after-tie", false), Ok(Fault::CheapAfterTie));
}

#[test]
fn a_mode_may_come_with_a_path() {
    assert_eq!(Fault::flags("garbage").unwrap(), ["--fault", "garbage"]);
    assert_eq!(
        Fault::flags("collude:/tmp/a:b").unwrap(),
        ["--fault", "collude", "--fault-share", "/tmp/a:b"]
    );
    assert_eq!(
        Fault::flags("other-model:m.gguf").unwrap(),
        ["--fault", "other-model", "--fault-model", "m.gguf"]
    );
    for (text, expected) in [
        ("lazy", "no mode is called lazy"),
        ("collude", "needs a path, as collude:PATH"),
        ("echo:/tmp", "echo takes no path"),
    ] {
        let error = Fault::flags(text).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}
