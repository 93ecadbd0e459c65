//! Manifest and registries: what is in force while somebody replaces them.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use infera_protocol::bytes::Address;
use infera_protocol::registry::Registry;
use infera_protocol::stakes::Stakes;
use infera_runtime::CancellationToken;
use infera_runtime::network::{self, Live, NetworkError};
use infera_testkit::evidence::Network;
use infera_testkit::{TempDir, eventually};

use crate::DEADLINE;

struct Files {
    dir: TempDir,
    network: Network,
}

impl Files {
    fn new() -> Self {
        let (dir, network) = (TempDir::new().unwrap(), Network::new());
        network.write(dir.path());
        Self { dir, network }
    }

    fn manifest(&self) -> PathBuf {
        self.dir.path().join("network.json")
    }

    fn registry(&self) -> PathBuf {
        self.dir.path().join("models.json")
    }

    /// Another price; the manifest still names the version before.
    fn replace(&self, price_micro: u64) -> Registry {
        let mut wanted = self.network.registry.clone();
        wanted.models[0].price_micro = price_micro;
        network::replace(&self.registry(), &wanted, 5_000).unwrap()
    }

    fn name(&mut self, registry: &Registry) {
        self.network.manifest.registry_hash = registry.hash().unwrap();
        network::write_json(&self.manifest(), &self.network.manifest).unwrap();
    }

    fn price(&self) -> Result<u64, NetworkError> {
        network::load(&self.manifest(), &self.registry())
            .map(|(_, registries)| registries.current().models[0].price_micro)
    }
}

#[test]
fn until_the_manifest_names_it_the_version_before_is_in_force() {
    let mut files = Files::new();
    let first = files.price().unwrap();
    let second = files.replace(77);
    assert_eq!(files.price().unwrap(), first, "as after a crash between the two files");
    files.name(&second);
    assert_eq!(files.price().unwrap(), 77);
    assert_eq!(files.replace(77), second, "the same content is no new version");
    let (_, registries) = network::load(&files.manifest(), &files.registry()).unwrap();
    let before = registries.in_force(0, 4_999).next().unwrap();
    assert_eq!(before.models[0].price_micro, first);
    // A manifest that names neither.
    files.network.manifest.registry_hash.0[0] ^= 1;
    files.network.write(files.dir.path());
    assert!(files.price().is_err());
}

#[tokio::test]
async fn a_process_takes_over_what_is_written() {
    let mut files = Files::new();
    let live = Live::load(&files.manifest(), &files.registry()).unwrap();
    let stop = CancellationToken::new();
    let mut changes = live.watch();
    let following = tokio::spawn({
        let (live, stop) = (live.clone(), stop.clone());
        async move { live.follow(stop).await }
    });
    let price = async || live.now().registries.current().models[0].price_micro;
    let first = price().await;
    let second = files.replace(78);
    files.name(&second);
    eventually(DEADLINE, async || price().await == 78).await;
    changes.changed().await.unwrap();
    assert_eq!(
        changes.borrow_and_update().registries.in_force(0, 4_999).next().unwrap().models[0].price_micro,
        first
    );
    // Damage changes nothing, and what comes after it is taken over.
    fs::write(files.registry(), b"{").unwrap();
    let third = {
        network::write_json(&files.registry(), &second).unwrap();
        files.replace(79)
    };
    // Of a manifest only the registry may change.
    let dispatchers = std::mem::take(&mut files.network.manifest.dispatchers);
    files.name(&third);
    assert_eq!(price().await, 78);
    files.network.manifest.dispatchers = dispatchers;
    files.name(&third);
    eventually(DEADLINE, async || price().await == 79).await;
    stop.cancel();
    following.await.unwrap();
}

#[tokio::test]
async fn stakes_that_can_not_be_read_change_nothing_and_hold_nothing_back() {
    let mut files = Files::new();
    let path = network::stakes_path(&files.manifest());
    let stakes = |minimum_micro| {
        let operator = Address([7; 20]);
        Stakes { minimum_micro, active_micro: BTreeMap::from([(operator, minimum_micro)]) }
    };
    network::write_json(&path, &stakes(5)).unwrap();
    let live = Live::load(&files.manifest(), &files.registry()).unwrap();
    let stop = CancellationToken::new();
    let following = tokio::spawn({
        let (live, stop) = (live.clone(), stop.clone());
        async move { live.follow(stop).await }
    });
    for (price, damaged) in [(81, vec![b'{']), (82, vec![b' '; 4 * 1024 * 1024 + 1])] {
        fs::write(&path, damaged).unwrap();
        let registry = files.replace(price);
        files.name(&registry);
        eventually(DEADLINE, async || {
            let roots = live.now();
            roots.registries.current().models[0].price_micro == price && roots.stakes == stakes(5)
        })
        .await;
    }
    network::write_json(&path, &stakes(6)).unwrap();
    eventually(DEADLINE, async || live.now().stakes == stakes(6)).await;
    stop.cancel();
    following.await.unwrap();
}
