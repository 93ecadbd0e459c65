//! The verifier as a process, aborted at every step of a verdict's way and started again.

use infera_testkit::evidence::{Answer, Case};
use infera_testkit::{Process, eventually};
use infera_wire::v1::verdict::Outcome;

use crate::harness::{On, PATIENCE, World, embedder, tokens};

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_at_any_step_leaves_one_verdict_and_one_vector() {
    let crashes: Vec<_> = [
        "verifier.collected.before_commit",
        "verifier.collected.after_commit",
        "outbox.verdict.before_publish",
        "outbox.verdict.after_publish",
        "verifier.index.before_upsert",
        "verifier.index.after_upsert",
    ]
    .map(|point| tokio::spawn(crash_at(point)))
    .into();
    for crash in crashes {
        crash.await.unwrap();
    }
}

async fn crash_at(point: &'static str) {
    let mut world = World::new(On::Cluster).await;
    let log = world.dir.path().join("verifier.log");
    let spec = Process::spec(env!("CARGO_BIN_EXE_infera-verifier"), &log).args([world.process_config()]);
    let mut doomed = spec.clone().env("INFERA_FAIL", format!("{point}=abort")).spawn();
    let case = Case::new(&world.network).answers(vec![Answer::tokens(&tokens("Rome is in Italy.")); 3]);
    world.collect(&case).await;
    let status = doomed.wait(PATIENCE).await;
    assert!(!status.success(), "{point}: it was to be aborted");

    let mut process = spec.spawn();
    let (id, verdict) = world.verdict().await;
    let Some(Outcome::Verified(verified)) = &verdict.outcome else { panic!("{point}: not verified") };
    assert_eq!(verified.nodes.len(), 3, "{point}");
    let question = embedder().embed(vec!["Rome is in Italy.".to_owned()]).await.unwrap().remove(0);
    let (index, question) = (&world.index, &question);
    eventually(PATIENCE, || async { index.search(question, 5, 0.5).await.unwrap().len() == 1 }).await;

    // Said again, it is the same: the stored bytes, whichever process decided.
    world.settled().await;
    world.collect_as(&case, 1).await;
    assert_eq!(world.verdict().await, (id, verdict.clone()), "{point}");
    process.terminate();
    assert!(process.wait(PATIENCE).await.success(), "{point}: it drains and ends");
}
