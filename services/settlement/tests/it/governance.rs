//! The life of a proposal on a real chain, and every refusal on the way.

use alloy::{
    primitives::{B256, U256, hex, keccak256},
    sol_types::SolCall,
};
use infera_protocol::{
    bytes::Hash32,
    governed::{ModelTerms, end_tokens_hash, registry},
    registry::Model,
};
use std::time::Duration;

use infera_settlement::{
    chain::{
        Contracts,
        governance::{
            Action, Governance, GovernanceError, Proposal, ProposalLog, RegistryCall, State, Support, Voter,
        },
        port::Finality,
    },
    governance_http::Decisions,
};
use infera_testkit::{
    anvil::{Anvil, DEV_KEYS},
    eventually,
};
use serde_json::json;

use crate::{
    anvil_world::rpc,
    chain::DEPLOYER,
    network::Network,
    proxy::{Mode, Proxy},
    service::DEADLINE,
    wallets,
};

mod abi {
    alloy::sol! {
        function executeBatch(
            address[] targets, uint256[] values, bytes[] payloads, bytes32 predecessor, bytes32 salt
        );
    }
}

pub struct World {
    pub anvil: Anvil,
    pub contracts: Contracts,
    /// Has nearly the whole supply.
    pub treasury: Voter,
}

impl World {
    async fn new() -> Self {
        let anvil = Anvil::start_with(&["64"]).await;
        let contracts = crate::chain::contracts(anvil.url()).await;
        let treasury = Voter::connect(anvil.url(), DEPLOYER, contracts).await.unwrap();
        Self { anvil, contracts, treasury }
    }

    /// With votes, a second later.
    pub async fn delegated() -> Self {
        let world = Self::new().await;
        world.treasury.delegate(world.treasury.address()).await.unwrap();
        world.pass(1).await;
        world
    }

    async fn voter(&self, key: usize) -> Voter {
        Voter::connect(self.anvil.url(), DEV_KEYS[key], self.contracts).await.unwrap()
    }

    async fn pass(&self, secs: u64) {
        self.treasury.key().devnet_pass(secs).await.unwrap();
    }

    async fn find(&self, proposal: &Proposal) -> Proposal {
        self.treasury.governance().proposal(&proposal.id.to_string(), 0).await.unwrap()
    }

    pub async fn propose(&self, title: &str, change: &RegistryCall, entry: Option<&Model>) -> Proposal {
        let (id, _) = self.treasury.propose(title, change, entry).await.unwrap();
        self.treasury.governance().proposal(&id.to_string(), 0).await.unwrap()
    }

    /// Past the vote, with the treasury's votes.
    pub async fn voted(&self, proposal: &Proposal, support: Support) -> Proposal {
        self.pass(2).await;
        self.treasury.vote(&self.find(proposal).await, support).await.unwrap();
        self.pass(31).await;
        self.find(proposal).await
    }

    /// Voted for and queued, and its time in the timelock is over.
    async fn matured(&self, change: &RegistryCall, entry: Option<&Model>) -> Proposal {
        let title = format!("Change {:?}", self.treasury.governance().time().await.unwrap());
        let proposal = self.propose(&title, change, entry).await;
        let won = self.voted(&proposal, Support::For).await;
        self.treasury.queue(&won).await.unwrap();
        self.pass(10).await;
        self.find(&proposal).await
    }

    pub async fn carry_out(&self, change: &RegistryCall, entry: Option<&Model>) -> Proposal {
        let proposal = self.matured(change, entry).await;
        self.treasury.execute(&proposal).await.unwrap();
        self.find(&proposal).await
    }

    /// As anybody may, past the governor.
    pub async fn carry_out_on_the_timelock(&self, change: &RegistryCall, entry: Option<&Model>) -> Proposal {
        let proposal = self.matured(change, entry).await;
        let mut salt = keccak256(&proposal.description);
        salt.iter_mut().zip(self.contracts.governor).for_each(|(salt, byte)| *salt ^= byte);
        let execute = abi::executeBatchCall {
            targets: vec![self.contracts.registry],
            values: vec![U256::ZERO],
            payloads: vec![change.encode()],
            predecessor: B256::ZERO,
            salt,
        };
        let tx = json!({
            "from": wallets::address(0), "to": self.contracts.timelock, "gas": "0x7a120",
            "input": hex::encode_prefixed(execute.abi_encode()),
        });
        rpc(self.anvil.url(), "eth_sendTransaction", json!([tx])).await;
        eventually(DEADLINE, async || {
            let found = self.find(&proposal).await;
            if found.executed.is_some() { Ok(found) } else { Err(found) }
        })
        .await
    }
}

pub fn second() -> Model {
    let first = Network::offline().registry.models[0].clone();
    Model { id: "second".into(), weights_root: Hash32([0x22; 32]), end_tokens: vec![106, 1], ..first }
}

pub fn admit(model: &Model) -> RegistryCall {
    RegistryCall::AdmitModel { id: model.id.clone(), terms: ModelTerms::of(model) }
}

#[tokio::test]
async fn a_model_is_voted_in_and_whoever_follows_has_its_whole_entry() {
    let world = World::delegated().await;
    let governance = world.treasury.governance();
    let before = governance.registry_state(None).await.unwrap();
    assert_eq!(before.models.len(), 1);
    assert_eq!(before.models[0].terms, ModelTerms::of(&Network::offline().registry.models[0]));

    let model = second();
    let proposal = world.propose("Serve the second model", &admit(&model), Some(&model)).await;
    assert_eq!((proposal.state, proposal.title()), (State::Pending, "Serve the second model"));
    assert_eq!(proposal.actions, [Action::Registry(admit(&model))]);
    assert_eq!(proposal.entries(), [("second", Ok(model.clone()))]);
    assert_eq!(proposal.proposer, world.treasury.address());
    assert_eq!(proposal.deadline_secs, proposal.snapshot_secs + 30);
    let short = proposal.id.to_string()[..10].to_owned();
    assert_eq!(governance.proposal(&short, 0).await.unwrap().id, proposal.id);

    world.pass(2).await;
    let (_, votes) = world.treasury.vote(&world.find(&proposal).await, Support::For).await.unwrap();
    assert_eq!(votes, 990_000_000_000_000, "the supply less the pool");
    let active = world.find(&proposal).await;
    assert_eq!((active.state, active.votes.for_, active.eta_secs), (State::Active, votes, 0));
    assert_eq!(active.quorum_micro, 40_000_000_000_000, "4 percent of the supply");
    world.pass(31).await;
    let won = world.find(&proposal).await;
    assert_eq!(won.state, State::Succeeded);
    world.treasury.queue(&won).await.unwrap();
    let queued = world.find(&proposal).await;
    assert_eq!(queued.state, State::Queued);
    assert!(queued.eta_secs >= governance.time().await.unwrap() && queued.queued.is_some());
    assert_eq!(governance.registry_state(None).await.unwrap().models.len(), 1, "nothing yet");
    world.pass(10).await;
    let tx = world.treasury.execute(&world.find(&proposal).await).await.unwrap();
    let done = world.find(&proposal).await;
    assert_eq!(done.state, State::Executed);
    assert_eq!(done.executed.unwrap().tx, tx);

    let after = governance.registry_state(None).await.unwrap();
    assert_eq!(after.revision, before.revision + 1);
    assert_eq!((after.models[1].id.as_str(), after.models[1].terms), ("second", ModelTerms::of(&model)));
    assert_eq!(after.models[1].terms.end_tokens_hash, end_tokens_hash(&[1, 106]));
    let cards: Vec<Model> = done.entries().into_iter().map(|(_, card)| card.unwrap()).collect();
    let (followed, unmet) = registry(&after.decided(), &Network::offline().registry, &cards);
    assert_eq!((followed.models.last(), unmet.as_slice()), (Some(&model), [].as_slice()));
    assert_eq!(governance.registry_state(Some(after.block)).await.unwrap(), after);
    let future = governance.registry_state(Some(after.block + 100)).await.unwrap_err();
    assert!(future.to_string().contains("has no block"), "{future}");
}

#[tokio::test]
async fn every_other_change_of_the_registry_is_carried_out() {
    let world = World::delegated().await;
    let id = || crate::network::MODEL.to_owned();
    let terms =
        RegistryCall::SetTerms { id: id(), similarity_threshold_millionths: 700_000, price_cap_micro: 9 };
    let release = Hash32([0x55; 32]);
    world.carry_out(&terms, None).await;
    world.carry_out(&RegistryCall::ApproveRelease { release, name: "0.3.1 linux".into() }, None).await;
    world.carry_out(&RegistryCall::SetCalibration { hash: Hash32([0x66; 32]) }, None).await;
    let state = world.treasury.governance().registry_state(None).await.unwrap();
    let listed = state.models[0].terms;
    assert_eq!((listed.similarity_threshold_millionths, listed.price_cap_micro), (700_000, 9));
    assert_eq!(
        (state.releases.as_slice(), state.calibration_hash),
        ([release].as_slice(), Hash32([0x66; 32]))
    );
    world.carry_out(&RegistryCall::WithdrawRelease { release }, None).await;
    world.carry_out(&RegistryCall::WithdrawModel { id: id() }, None).await;
    let state = world.treasury.governance().registry_state(None).await.unwrap();
    assert!(state.releases.is_empty() && !state.models[0].terms.active);
    let proposals = world.treasury.governance().proposals(0).await.unwrap();
    assert_eq!(proposals.len(), 5);
    assert!(proposals.iter().all(|proposal| proposal.state == State::Executed));
    assert!(proposals.is_sorted_by_key(|proposal| proposal.proposed.block));

    // What the registry itself does not take is said by its own words, and nothing is sent.
    let again = RegistryCall::WithdrawModel { id: id() };
    let proposal = world.propose("Withdraw it twice", &again, None).await;
    world.treasury.queue(&world.voted(&proposal, Support::For).await).await.unwrap();
    world.pass(10).await;
    let refused = world.treasury.execute(&world.find(&proposal).await).await.unwrap_err().to_string();
    assert!(refused.contains("serves no model"), "{refused}");
    assert_eq!(world.find(&proposal).await.state, State::Queued);
}

#[tokio::test]
async fn who_has_no_votes_neither_proposes_nor_votes() {
    let world = World::new().await;
    let change = RegistryCall::SetCalibration { hash: Hash32([1; 32]) };
    let refused = world.treasury.propose("Calibrate", &change, None).await.unwrap_err();
    assert!(matches!(refused, GovernanceError::NotDelegated { .. }), "{refused}");
    assert_eq!(world.treasury.governance().delegate(world.treasury.address()).await.unwrap(), None);
    world.treasury.delegate(world.treasury.address()).await.unwrap();
    world.pass(1).await;

    let small = world.voter(2).await;
    let refused = small.propose("Calibrate", &change, None).await.unwrap_err();
    assert!(
        matches!(
            refused,
            GovernanceError::BelowThreshold { votes_micro: 0, needed_micro: 100_000_000_000, .. }
        ),
        "{refused}"
    );
    world.treasury.key().transfer(small.address(), 99_999_999_999).await.unwrap();
    small.delegate(small.address()).await.unwrap();
    world.pass(1).await;
    let refused = small.propose("Calibrate", &change, None).await.unwrap_err().to_string();
    assert!(refused.contains("99999999999") && refused.contains("needs 100000000000"), "{refused}");

    let proposal = world.propose("Calibrate", &change, None).await;
    let again = world.treasury.propose("Calibrate", &change, None).await.unwrap_err();
    assert!(matches!(again, GovernanceError::Proposed(id) if id == proposal.id), "{again}");
    world.pass(2).await;
    // Bought after the proposal.
    let late = world.voter(3).await;
    world.treasury.key().transfer(late.address(), 5).await.unwrap();
    late.delegate(late.address()).await.unwrap();
    world.pass(1).await;
    let refused = late.vote(&world.find(&proposal).await, Support::For).await.unwrap_err();
    assert!(matches!(refused, GovernanceError::NoVotes { .. }), "{refused}");
    let (_, votes) = small.vote(&world.find(&proposal).await, Support::Abstain).await.unwrap();
    assert_eq!(votes, 99_999_999_999);
    assert_eq!(world.find(&proposal).await.votes.abstain, votes);
}

#[tokio::test]
async fn every_step_has_its_time() {
    let world = World::delegated().await;
    let change = RegistryCall::SetCalibration { hash: Hash32([1; 32]) };
    let voter = &world.treasury;
    let proposal = world.propose("Calibrate", &change, None).await;
    let early = voter.vote(&proposal, Support::For).await.unwrap_err();
    assert!(matches!(early, GovernanceError::NotOpen { left_secs: 1..=2 }), "{early}");
    let unqueued = voter.execute(&proposal).await.unwrap_err();
    assert!(matches!(unqueued, GovernanceError::NotQueued { state: State::Pending }), "{unqueued}");
    world.pass(2).await;
    let active = world.find(&proposal).await;
    voter.vote(&active, Support::For).await.unwrap();
    let twice = voter.vote(&active, Support::Against).await.unwrap_err();
    assert!(matches!(twice, GovernanceError::Voted { .. }), "{twice}");
    let soon = voter.queue(&active).await.unwrap_err();
    assert!(matches!(soon, GovernanceError::Voting { left_secs: 1..=31 }), "{soon}");
    world.pass(31).await;
    let won = world.find(&proposal).await;
    let over = voter.vote(&won, Support::Against).await.unwrap_err();
    assert!(matches!(over, GovernanceError::Closed { state: State::Succeeded }), "{over}");
    let unqueued = voter.execute(&won).await.unwrap_err();
    assert!(matches!(unqueued, GovernanceError::NotQueued { state: State::Succeeded }), "{unqueued}");
    voter.queue(&won).await.unwrap();
    let queued = world.find(&proposal).await;
    let twice = voter.queue(&queued).await.unwrap_err();
    assert!(matches!(twice, GovernanceError::Done { state: State::Queued }), "{twice}");
    let waits = voter.execute(&queued).await.unwrap_err();
    assert!(matches!(waits, GovernanceError::Timelock { left_secs: 1..=10 }), "{waits}");
    world.pass(10).await;
    voter.execute(&queued).await.unwrap();
    let twice = voter.execute(&world.find(&proposal).await).await.unwrap_err();
    assert!(matches!(twice, GovernanceError::Done { state: State::Executed }), "{twice}");

    let lost = world.propose("Calibrate against my will", &change, None).await;
    let lost = world.voted(&lost, Support::Against).await;
    let refused = voter.queue(&lost).await.unwrap_err();
    assert!(matches!(refused, GovernanceError::Defeated { for_micro: 0, .. }), "{refused}");
}

#[tokio::test]
async fn an_entry_that_is_not_its_calls_is_not_proposed_and_unknown_ids_are_said() {
    let world = World::delegated().await;
    let model = second();
    let other = Model { end_tokens: vec![7], ..model.clone() };
    let refused = world.treasury.propose("Serve it", &admit(&model), Some(&other)).await.unwrap_err();
    assert!(refused.to_string().contains("end_tokens"), "{refused}");
    let governance = world.treasury.governance();
    for text in ["0x12", "12", "nonsense", ""] {
        let missing = governance.proposal(text, 0).await.unwrap_err();
        assert!(matches!(missing, GovernanceError::NoProposal(_)), "{text}: {missing}");
    }
    assert!(governance.proposals(0).await.unwrap().is_empty());
    for n in 0..40_u8 {
        let change = RegistryCall::SetCalibration { hash: Hash32([n + 1; 32]) };
        world.treasury.propose("Calibrate", &change, None).await.unwrap();
    }
    let all = governance.proposals(0).await.unwrap();
    assert_eq!(all.len(), 40);
    // Forty ids cannot have forty different first digits.
    let first = |p: &Proposal| p.id.to_string()[..3].to_owned();
    let shared = all.iter().find(|a| all.iter().filter(|b| first(a) == first(b)).count() > 1).unwrap();
    let several = governance.proposal(&first(shared), 0).await.unwrap_err();
    assert!(matches!(several, GovernanceError::Ambiguous { .. }), "{several}");
}

fn calibrate(n: u8) -> RegistryCall {
    RegistryCall::SetCalibration { hash: Hash32([n; 32]) }
}

#[tokio::test]
async fn what_is_kept_of_the_log_is_final_and_the_rest_is_read_again() {
    let world = World::delegated().await;
    let governance = Governance::connect(world.anvil.url(), world.contracts).await.unwrap();
    let mut log = ProposalLog::new(0, Finality::Depth, 3);
    let mut titles = async |most: usize| -> Vec<String> {
        let proposals = governance.newest(&mut log, most).await.unwrap();
        proposals.iter().map(|proposal| proposal.title().to_owned()).collect()
    };
    assert!(titles(9).await.is_empty());
    world.propose("one", &calibrate(1), None).await;
    assert_eq!(titles(9).await, ["one"], "in a block that is not final");
    rpc(world.anvil.url(), "anvil_reorg", json!([1, []])).await;
    assert!(titles(9).await.is_empty(), "its block is gone");
    world.propose("two", &calibrate(2), None).await;
    world.propose("three", &calibrate(3), None).await;
    rpc(world.anvil.url(), "anvil_mine", json!(["0x5"])).await;
    assert_eq!(titles(9).await, ["three", "two"]);
    let third = world.propose("four", &calibrate(4), None).await;
    assert_eq!(titles(2).await, ["four", "three"], "the newest");
    let now = governance.newest(&mut ProposalLog::new(0, Finality::Depth, 3), 1).await.unwrap();
    assert_eq!(now, [third]);
    // Deeper than what counts as final: nothing of it is kept.
    rpc(world.anvil.url(), "anvil_reorg", json!([7, []])).await;
    let mut titles = async || {
        let proposals = governance.newest(&mut log, 9).await.unwrap();
        proposals.iter().map(|proposal| proposal.title().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(titles().await, ["two"]);
}

#[tokio::test]
async fn decisions_are_read_by_themselves_and_the_former_answer_is_given_meanwhile() {
    let world = World::delegated().await;
    let proxy = Proxy::start(world.anvil.url()).await;
    let log = ProposalLog::new(0, Finality::Depth, 1);
    let decisions = Decisions::new(proxy.url.clone(), world.contracts, log, Duration::ZERO);
    // Who asked first is gone at once: it is read all the same.
    assert!(tokio::time::timeout(Duration::ZERO, decisions.read()).await.is_err());
    let before = decisions.read().await.unwrap();
    assert!(before.contains("\"proposals\":[]"), "{before}");
    proxy.set(Mode::Hang);
    world.propose("Calibrate once more", &calibrate(1), None).await;
    for _ in 0..3 {
        // A reading that hangs takes 10 s to fail.
        let said = tokio::time::timeout(Duration::from_secs(5), decisions.read()).await;
        assert_eq!(said.expect("an answer").unwrap(), before);
    }
    proxy.set(Mode::Pass);
    eventually(DEADLINE, async || {
        let said = decisions.read().await.unwrap();
        if said.contains("Calibrate once more") { Ok(()) } else { Err(said) }
    })
    .await;
}
