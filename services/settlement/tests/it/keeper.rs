//! What holders decide on a real chain is in force in a deployment's files, and in every process that follows them.

use std::{path::PathBuf, time::Duration};

use infera_protocol::registry::{Model, Registry};
use infera_runtime::{
    CancellationToken,
    network::{self, Live},
};
use infera_settlement::{
    chain::{
        governance::{RegistryCall, State, Support},
        port::Finality,
    },
    keeper::Keeper,
};
use infera_testkit::{TempDir, eventually};
use prometheus::IntGauge;

use crate::{
    governance::{World, admit, second},
    network::{MODEL, Network},
};

/// Long enough for a loaded machine; only a failing test waits for it.
const PATIENCE: Duration = Duration::from_secs(60);

struct Deployment {
    dir: TempDir,
    unmet: IntGauge,
}

impl Deployment {
    fn new() -> Self {
        let (dir, network) = (TempDir::new().unwrap(), Network::offline());
        let write = |name: &str, bytes: Vec<u8>| std::fs::write(dir.path().join(name), bytes).unwrap();
        write("network.json", serde_json::to_vec(&network.manifest).unwrap());
        write("models.json", serde_json::to_vec(&network.registry).unwrap());
        Self { dir, unmet: IntGauge::new("unmet", "in a test").unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn live(&self) -> Live {
        Live::load(&self.path("network.json"), &self.path("models.json")).unwrap()
    }

    /// A keeper, and a process that follows what it writes, until the token is cancelled.
    fn start(&self, world: &World) -> (Live, CancellationToken) {
        let stop = CancellationToken::new();
        let keeper = Keeper {
            rpc_url: world.anvil.url().to_owned(),
            contracts: world.contracts,
            live: self.live(),
            manifest_path: self.path("network.json"),
            registry_path: self.path("models.json"),
            from_block: 0,
            finality: Finality::Depth,
            confirmations: 1,
            poll: Duration::from_millis(50),
            unmet: self.unmet.clone(),
        };
        let (kept, other) = (keeper.live.clone(), self.live());
        for live in [kept, other.clone()] {
            let stop = stop.clone();
            tokio::spawn(async move { live.follow(stop).await });
        }
        tokio::spawn(keeper.run(stop.clone()));
        (other, stop)
    }
}

fn models(live: &Live) -> Vec<(String, u64)> {
    let roots = live.now();
    roots.registries.current().models.iter().map(|model| (model.id.clone(), model.price_micro)).collect()
}

#[tokio::test]
async fn votes_change_what_is_served_without_a_restart() {
    let world = World::delegated().await;
    let deployment = Deployment::new();
    let (live, stop) = deployment.start(&world);
    let before: Registry = live.now().registries.current().clone();
    let model = second();
    world.carry_out(&admit(&model), Some(&model)).await;
    eventually(PATIENCE, async || live.now().registries.current().by_id("second") == Some(&model)).await;

    let cheaper = RegistryCall::SetTerms {
        id: MODEL.to_owned(),
        similarity_threshold_millionths: 700_000,
        price_cap_micro: 1,
    };
    world.carry_out(&cheaper, None).await;
    let price = before.models[0].price_micro.min(1);
    eventually(PATIENCE, async || {
        let roots = live.now();
        let model = &roots.registries.current().models[0];
        (model.similarity_threshold_millionths, model.price_micro) == (700_000, price)
    })
    .await;

    world.carry_out(&RegistryCall::WithdrawModel { id: MODEL.to_owned() }, None).await;
    eventually(PATIENCE, async || models(&live).iter().all(|(id, _)| id == "second")).await;
    // What was made under the versions before can be checked for ever.
    let roots = live.now();
    assert!(roots.registries.in_force(0, i64::MAX).any(|version| version.models == before.models));
    stop.cancel();

    // A keeper that starts anew finds everything as it is.
    let (again, stop) = deployment.start(&world);
    assert_eq!(models(&again), models(&live));
    stop.cancel();
}

#[tokio::test]
async fn a_price_is_that_of_the_entry_that_was_voted_for() {
    let world = World::delegated().await;
    let deployment = Deployment::new();
    // Proposed first, and nobody votes for it.
    let cheap = Model { price_micro: 3, weights_bytes: 5, created_secs: 9, ..second() };
    let lost = world.propose("Serve it for nearly nothing", &admit(&cheap), Some(&cheap)).await;
    world.voted(&lost, Support::Against).await;
    let model = Model { price_micro: 7, ..second() };
    world.carry_out(&admit(&model), Some(&model)).await;
    let (live, stop) = deployment.start(&world);
    let in_force = async |wanted: &Model| {
        eventually(PATIENCE, async || {
            let roots = live.now();
            let found = roots.registries.current().by_id(&wanted.id).cloned();
            if found.as_ref() == Some(wanted) { Ok(()) } else { Err(found) }
        })
        .await;
    };
    in_force(&model).await;
    // A cap that is put at the price, lowered and raised again, of a voted model and of one that the network began with.
    let first = live.now().registries.current().by_id(MODEL).unwrap().clone();
    for listed in [&model, &first] {
        let threshold = listed.similarity_threshold_millionths;
        let price = listed.price_micro;
        for (price_cap_micro, price_micro) in [(price, price), (1, 1), (20, price)] {
            let change = RegistryCall::SetTerms {
                id: listed.id.clone(),
                similarity_threshold_millionths: threshold,
                price_cap_micro,
            };
            world.carry_out(&change, None).await;
            in_force(&Model { price_micro, ..listed.clone() }).await;
        }
    }
    // Admitted anew, for more and with its true size; carried out past the governor.
    let again = Model { price_micro: 11, weights_bytes: 99, ..model.clone() };
    let proposal = world.carry_out_on_the_timelock(&admit(&again), Some(&again)).await;
    assert_eq!(proposal.state, State::Executed);
    in_force(&again).await;
    stop.cancel();
}

#[tokio::test]
async fn what_could_not_be_followed_is_followed_once_it_can() {
    let world = World::delegated().await;
    let deployment = Deployment::new();
    let mut registry = Network::offline().registry;
    registry.calibration.pairs.pop();
    world.carry_out(&RegistryCall::SetCalibration { hash: registry.calibration.hash() }, None).await;
    let (_, stop) = deployment.start(&world);
    eventually(PATIENCE, async || deployment.unmet.get() == 1).await;
    // The operator brings it.
    let registry = network::replace(&deployment.path("models.json"), &registry, 1).unwrap();
    let mut manifest = Network::offline().manifest;
    manifest.registry_hash = registry.hash().unwrap();
    network::write_json(&deployment.path("network.json"), &manifest).unwrap();
    eventually(PATIENCE, async || deployment.unmet.get() == 0).await;
    assert_eq!(deployment.live().now().registries.current(), &registry, "it stays");
    stop.cancel();
}

#[tokio::test]
async fn what_can_not_be_followed_changes_nothing_and_is_said() {
    let world = World::delegated().await;
    let deployment = Deployment::new();
    let (live, stop) = deployment.start(&world);
    let before = models(&live);
    // A calibration that nobody here knows.
    let hash = infera_protocol::bytes::Hash32([0x66; 32]);
    world.carry_out(&RegistryCall::SetCalibration { hash }, None).await;
    eventually(PATIENCE, async || deployment.unmet.get() == 1).await;
    assert_eq!(models(&live), before);
    stop.cancel();
}
