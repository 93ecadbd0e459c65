//! Whether a checker that shares no code with this one (`golden/receipts.py`) says the same about every document.

use infera_protocol::{
    bytes::{Address, Hash32, NodeId, Signature},
    document::{Document, Status},
    evidence::{Evidence, RefereeOutcome, SlotOutcome},
    receipt::{Receipt, VerifiedNode},
    request::Finish,
};
use std::{
    path::PathBuf,
    process::{Command, Output},
};

use crate::{
    attempts::{agreed, audited, near_tie, registries, trusted},
    odd::{odd_attempts, odd_receipts},
    vectors::{DocumentCase, Vectors, case, documents, golden, text},
};

/// A folder of this test's own, gone afterwards.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("infera-receipts-{}-{name}", std::process::id()));
        std::fs::create_dir_all(path.join("registries")).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        std::fs::write(self.0.join(name), bytes).unwrap();
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn python(arguments: &[PathBuf]) -> Output {
    // -B: no compiled files beside the sources.
    Command::new("python3").arg("-B").arg(golden().join("receipts.py")).args(arguments).output().unwrap()
}

fn printed(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn a_stranger_recomputes_every_vector() {
    let output = python(&[golden().join("receipts.json")]);
    assert_eq!(output.status.code(), Some(0), "{}", printed(&output));
}

/// One figure of a vector changed: it is noticed.
#[test]
fn a_stranger_notices_a_changed_vector() {
    let committed = std::fs::read_to_string(golden().join("receipts.json")).unwrap();
    let folder = Folder::new("changed");
    for field in ["\"beta\": \"0x", "\"leaf\": \"0x", "\"root\": \"0x", "\"text\": \"", "\"holds\": "] {
        let at = committed.find(field).unwrap() + field.len();
        let mut changed = committed.clone().into_bytes();
        if field.ends_with(' ') {
            changed.splice(at..at + 4, *b"null");
        } else {
            changed[at] = if changed[at] == b'1' { b'2' } else { b'1' };
        }
        let output = python(&[folder.write("vectors.json", changed)]);
        assert_eq!(output.status.code(), Some(1), "{field}: {}", printed(&output));
    }
}

/// The receipt that a forger makes of its evidence, so that its hashes fit; where none follows, an honest one that claims
/// the most common answer to be verified.
fn forged(evidence: &Evidence, honest: &Receipt) -> Vec<u8> {
    let receipt = Receipt::build(evidence).unwrap_or_else(|_| claimed(evidence, honest));
    let document =
        Document { receipt, status: Status::Pending, anchor: None, evidence: Some(evidence.clone()) };
    document.canonical().unwrap()
}

fn claimed(evidence: &Evidence, honest: &Receipt) -> Receipt {
    let ballots: Vec<_> = evidence.ballots().into_iter().filter(|ballot| ballot.fit).collect();
    let same = |answer: Hash32| ballots.iter().filter(|ballot| ballot.answer == answer).count();
    let most = ballots.iter().map(|ballot| same(ballot.answer)).max();
    let verified = ballots.iter().filter(|ballot| Some(same(ballot.answer)) == most);
    let verified = verified.map(|ballot| VerifiedNode {
        node: ballot.node,
        operator: Address([1; 20]),
        output_hash: Hash32::ZERO,
    });
    Receipt { verified: verified.collect(), ..honest.clone() }
}

type Forgery = fn(&mut Evidence);

const FORGERIES: [Forgery; 37] = [
    |e| e.slots.swap(0, 1),
    |e| e.slots.truncate(5),
    |e| e.eligible[3].weight += 1,
    |e| e.eligible[3].operator = e.eligible[4].operator,
    |e| e.eligible[0].trusted = !e.eligible[0].trusted,
    |e| e.class = "fast".into(),
    |e| e.class = "mixed".into(),
    |e| e.k = 3,
    |e| e.k = 8,
    |e| e.attempt = 2,
    |e| e.epoch += 1,
    |e| e.post_slots -= 1,
    |e| e.post_slots += 1,
    |e| e.decided_at_ms += 20_000,
    |e| e.submitted_at_ms += 200_000_000,
    |e| e.decided_at_ms += 200_000_000,
    |e| e.price_micro = 4,
    |e| e.price_micro = u64::MAX,
    |e| e.terms.vocab_size = 99,
    |e| e.terms.end_tokens = vec![],
    |e| e.terms.calibration.pairs.truncate(0),
    |e| e.request.sampling.top_p = 0.0,
    |e| e.request.sampling.temperature = 1.0,
    |e| e.request.stop = vec![String::new()],
    |e| e.request.prompt.clear(),
    |e| e.request.max_tokens = 2,
    |e| e.domain.chain_id = 1,
    |e| e.account = "Zoë \"\u{1}\u{7f}\\/\u{2028}".into(),
    |e| e.salt = Hash32([1; 32]),
    |e| e.unfit = vec![e.slots.last().unwrap().node],
    |e| e.unfit = e.slots.iter().map(|slot| slot.node).collect(),
    |e| e.similarities.clear(),
    |e| {
        e.referees.pop();
    },
    |e| e.referees.clear(),
    |e| e.slots[0].decline = None,
    |e| e.slots[2].outcome = SlotOutcome::Declined,
    // Who looks up a class in a set that is not sorted may find it or not; here nobody does.
    |e| {
        if e.class == "exact" {
            e.eligible.swap(0, 1);
        }
    },
];

/// What may be done to a slot and to a referee that did what they were asked.
const SLOT_FORGERIES: [Forgery; 14] = [
    |e| slot(e).outcome = SlotOutcome::Mismatch,
    |e| slot(e).outcome = SlotOutcome::NoReveal,
    |e| slot(e).outcome = SlotOutcome::Refereed,
    |e| slot(e).reveal = None,
    |e| slot(e).commitment = None,
    |e| slot(e).commitment.as_mut().unwrap().signature = Signature([1; 64]),
    |e| slot(e).commitment.as_mut().unwrap().digest = Hash32::ZERO,
    |e| slot(e).operator = Address([9; 20]),
    |e| slot(e).node = NodeId([9; 32]),
    |e| slot(e).reveal.as_mut().unwrap().salt = Hash32([9; 32]),
    |e| slot(e).reveal.as_mut().unwrap().output.tokens.push(2),
    |e| slot(e).reveal.as_mut().unwrap().output.tokens[0] = 77,
    |e| slot(e).reveal.as_mut().unwrap().output.finish = Finish::Length,
    |e| slot(e).reveal.as_mut().unwrap().output.fingerprints[0] = 9,
];

const REFEREE_FORGERIES: [Forgery; 8] = [
    |e| e.referees.reverse(),
    |e| e.referees.last_mut().unwrap().outcome = RefereeOutcome::NoReport,
    |e| e.referees.last_mut().unwrap().node = e.slots[0].node,
    |e| e.referees.last_mut().unwrap().reports[0].scores[2] ^= 0x40,
    |e| e.referees.last_mut().unwrap().reports[0].scores.truncate(3),
    |e| e.referees.last_mut().unwrap().reports[0].subject.0[0] ^= 1,
    |e| e.referees.last_mut().unwrap().reports[0].signature = Signature([0; 64]),
    |e| {
        let again = e.referees.last().unwrap().reports[0].clone();
        e.referees.last_mut().unwrap().reports.push(again);
    },
];

/// The last one that revealed.
fn slot(e: &mut Evidence) -> &mut infera_protocol::evidence::SlotEvidence {
    e.slots.iter_mut().rev().find(|slot| slot.outcome == SlotOutcome::Revealed).unwrap()
}

/// Both checkers give the same outcome to every check of every forgery.
#[test]
fn a_stranger_says_the_same_of_forgeries() {
    let mut cases = Vec::new();
    for (name, honest) in [("agreed", agreed()), ("near-tie", near_tie(0.1)), ("audited", audited())] {
        let receipt = Receipt::build(&honest).unwrap();
        let all = FORGERIES.iter().chain(&SLOT_FORGERIES).chain(&REFEREE_FORGERIES);
        for (i, forge) in all.enumerate() {
            let mut evidence = honest.clone();
            forge(&mut evidence);
            cases.push(case(&format!("{name}, forgery {i}"), &forged(&evidence, &receipt)));
        }
    }
    // From where the parting is no near-tie any more.
    for step in -9..=9 {
        let gap = f64::from(step) * 0.05;
        let evidence = near_tie(gap);
        let honest = Receipt::build(&near_tie(0.1)).unwrap();
        cases.push(case(&format!("a gap of {gap}"), &forged(&evidence, &honest)));
    }
    for (name, evidence) in odd_attempts() {
        cases.push(case(&name, &forged(&evidence, &Receipt::build(&agreed()).unwrap())));
    }
    for (i, receipt) in odd_receipts(&Receipt::build(&agreed()).unwrap()).into_iter().enumerate() {
        let document = Document { receipt, status: Status::Pending, anchor: None, evidence: None };
        cases.push(case(&format!("receipt {i}"), &document.canonical().unwrap()));
    }
    let refused = cases.iter().filter(|case| case.status == 1).count();
    assert!((100..cases.len()).contains(&refused), "{refused} of {}", cases.len());
    agree("forgeries", cases);
}

/// The same of single bytes, all over the documents.
#[test]
fn a_stranger_says_the_same_of_changed_bytes() {
    let mut cases = Vec::new();
    for (name, document) in documents().0 {
        let bytes = document.canonical().unwrap();
        for (i, at) in (0..bytes.len()).step_by(bytes.len() / 23).enumerate() {
            let mut changed = bytes.clone();
            changed[at] ^= if i.is_multiple_of(2) { 1 } else { 2 };
            cases.push(case(&format!("{name}, byte {at}"), &changed));
        }
    }
    agree("bytes", cases);
}

fn agree(name: &str, documents: Vec<DocumentCase>) {
    let committed = std::fs::read(golden().join("receipts.json")).unwrap();
    let vectors: Vectors = serde_json::from_slice(&committed).unwrap();
    let vectors = Vectors { documents, edits: vec![], ..vectors };
    let folder = Folder::new(name);
    let output = python(&[folder.write("vectors.json", text(&vectors))]);
    assert_eq!(output.status.code(), Some(0), "{}", printed(&output));
}

/// As somebody uses it: files, a line for each check, exit status.
#[test]
fn a_stranger_checks_files() {
    let folder = Folder::new("files");
    let (manifest, history) = trusted();
    let (first, _) = registries();
    let manifest_file = folder.write("network.json", serde_json::to_vec_pretty(&manifest).unwrap());
    let registry_file = folder.write("models.json", serde_json::to_vec_pretty(history.current()).unwrap());
    let former = folder
        .write(&format!("registries/{}.json", first.hash().unwrap()), serde_json::to_vec(&first).unwrap());
    let check = |bytes: &[u8]| {
        let file = folder.write("receipt.json", bytes);
        let options =
            ["--manifest".into(), manifest_file.clone(), "--registry".into(), registry_file.clone()];
        let output = python(&[&["check".into(), file][..], &options].concat());
        (output.status.code(), printed(&output))
    };
    for (name, document) in documents().0 {
        let bytes = document.canonical().unwrap();
        let expected = case(name, &bytes);
        let (status, printed) = check(&bytes);
        assert_eq!(status, Some(expected.status.into()), "{name}: {printed}");
        for (check, _) in &expected.checks {
            assert!(printed.contains(check), "{name}: {check}: {printed}");
        }
        if !name.starts_with("agreed") {
            continue;
        }
        let text = String::from_utf8(bytes).unwrap();
        for (from, to) in [
            ("\"tokens\":[50", "\"tokens\":[51"),
            ("\"amount_micro\":18", "\"amount_micro\":17"),
            ("\"proof\":[\"0x", "\"proof\":[\"0x1"),
            ("\"status\":\"anchored\"", "\"status\":\"pending\""),
        ] {
            let changed = text.replacen(from, to, 1);
            let (status, printed) = check(changed.as_bytes());
            assert!(changed == text || status == Some(1), "{name}, {from}: {printed}");
        }
    }
    let bytes = documents().0[0].1.canonical().unwrap();
    std::fs::write(&former, b"{}").unwrap();
    assert_eq!(check(&bytes).0, Some(1), "a forged registry");
    std::fs::remove_file(&former).unwrap();
    let (status, printed) = check(&bytes);
    assert!(status == Some(3) && printed.contains("skipped  model"), "{printed}");
    std::fs::remove_file(&registry_file).unwrap();
    assert_eq!(check(&bytes).0, Some(2), "no registry");
}
