//! Single commands of `infera`, without a network or against its remains.

use std::{fs, path::Path, process::Command};

use infera_protocol::{
    document::{Document, Status},
    registry::{Manifest, Registry, Replaced},
};
use infera_testkit::{TempDir, evidence};

use crate::network::{infera, text};

/// A folder with the manifest, the registry in force and a receipt with its evidence that was made under the first
/// version, before price and calibration changed.
struct Folder {
    dir: TempDir,
    former: Registry,
}

impl Folder {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let network = evidence::Network::new();
        let case = evidence::Case::new(&network);
        let mut current = network.registry.clone();
        current.models[0].price_micro += 1;
        current.calibration.near_tie_milli += 1;
        current.replaces = Some(Replaced {
            registry_hash: network.registry.hash().unwrap(),
            at_ms: case.submitted_at_ms + 60_000,
        });
        let manifest = Manifest { registry_hash: current.hash().unwrap(), ..network.manifest.clone() };
        let document = Document {
            receipt: case.receipt(),
            status: Status::Pending,
            anchor: None,
            evidence: Some(case.evidence()),
        };
        fs::write(dir.path().join("receipt.json"), document.canonical().unwrap()).unwrap();
        fs::write(dir.path().join("network.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
        fs::write(dir.path().join("models.json"), serde_json::to_vec(&current).unwrap()).unwrap();
        Self { dir, former: network.registry }
    }

    /// Keeps `content` as the version before.
    fn keep(&self, content: &Registry) {
        let kept = self.dir.path().join("registries");
        fs::create_dir_all(&kept).unwrap();
        let name = format!("{}.json", self.former.hash().unwrap());
        fs::write(kept.join(name), serde_json::to_vec(content).unwrap()).unwrap();
    }

    fn verify(&self) -> (Option<i32>, String) {
        run(&["verify", "receipt.json", "--data", "."], self.dir.path())
    }
}

fn run(args: &[&str], folder: &Path) -> (Option<i32>, String) {
    let output = Command::new(infera()).args(args).current_dir(folder).output().unwrap();
    (output.status.code(), text(&output))
}

#[test]
fn a_receipt_is_checked_against_the_registry_of_its_time() {
    let folder = Folder::new();
    let (status, said) = folder.verify();
    assert_eq!(status, Some(3), "{said}");
    let missing = format!("skipped  model: the registry {}", folder.former.hash().unwrap());
    assert!(said.contains(&missing), "{said}");

    folder.keep(&folder.former);
    let (status, said) = folder.verify();
    // It is not anchored; everything else holds.
    assert_eq!(status, Some(3), "{said}");
    assert!(said.contains("ok       model") && said.contains("ok       calibration"), "{said}");
    assert_eq!(said.matches("skipped").count(), 1, "{said}");

    let mut forged = folder.former.clone();
    forged.models[0].price_micro = 9;
    folder.keep(&forged);
    let (status, said) = folder.verify();
    assert_eq!(status, Some(1), "{said}");
    assert!(said.contains("FAILED   registry"), "{said}");
}
