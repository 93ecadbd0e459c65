//! The network that synthetic requests are asked in: its roots, and its one model.

use infera_protocol::bytes::{Address, Hash32};
use infera_protocol::calibration::{Bounds, Calibration, Pair};
use infera_protocol::identity::Domain;
use infera_protocol::registry::{Manifest, Model, Registry};
use infera_protocol::vrf::VrfSecret;

/// What the dispatcher's secret is made from.
pub const DISPATCHER_SEED: [u8; 32] = [0xd1; 32];

/// Manifest, registry and the dispatcher's key.
#[derive(Clone)]
pub struct Network {
    pub manifest: Manifest,
    pub registry: Registry,
    pub dispatcher: VrfSecret,
}

impl Network {
    /// A network with one model, `synthetic`, whose weights are [`weights`].
    pub fn new() -> Self {
        Self::serving(vec![Model {
            weights_bytes: weights().len() as u64,
            ..model("synthetic", Hash32(*blake3::hash(&weights()).as_bytes()))
        }])
    }

    /// A network that serves `models`.
    pub fn serving(models: Vec<Model>) -> Self {
        let calibration = calibration();
        let registry = Registry { models, releases: Vec::new(), calibration, replaces: None };
        let dispatcher = VrfSecret::from_seed(&DISPATCHER_SEED).expect("a seed has a secret");
        let manifest = Manifest {
            network: "infera-synthetic".to_owned(),
            domain: Domain { chain_id: 31_337, contract: Address([0xc0; 20]) },
            rpc_url: "http://127.0.0.1:8545".to_owned(),
            dispatchers: vec![dispatcher.key()],
            registry_hash: registry.hash().expect("a registry is JSON"),
        };
        Self { manifest, registry, dispatcher }
    }

    /// Writes `network.json` and `models.json` into `dir`, as services read them.
    pub fn write(&self, dir: &std::path::Path) {
        let write = |name: &str, json: serde_json::Result<Vec<u8>>| {
            std::fs::write(dir.join(name), json.expect("it is JSON")).expect("the file can be written");
        };
        write("network.json", serde_json::to_vec(&self.manifest));
        write("models.json", serde_json::to_vec(&self.registry));
    }
}

impl Default for Network {
    fn default() -> Self {
        Self::new()
    }
}

/// The file of the model `synthetic`: no model, but bytes that can be proved.
pub fn weights() -> Vec<u8> {
    (0..100_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// Bounds between all pairs of `exact` and `fast`, for synthetic answers.
pub fn calibration() -> Calibration {
    let bounds = Bounds {
        near_tie_milli: 500,
        fingerprint_milli: 100,
        margin_milli: 500,
        clip_milli: 200,
        mean_micro: 50_000,
        drift_micro: 10_000,
        drift_limit_micro: 100_000,
    };
    let pair = |a: &str, b: &str| Pair { classes: [a.into(), b.into()], bounds };
    Calibration { pairs: vec![pair("exact", "exact"), pair("exact", "fast"), pair("fast", "fast")] }
}

/// What ends an answer of [`model`].
pub const END_TOKEN: u32 = 2;

/// A registry entry with usual values.
pub fn model(id: &str, weights_root: Hash32) -> Model {
    Model {
        id: id.to_owned(),
        weights_root,
        weights_bytes: 1 << 20,
        tokenizer_hash: Hash32([0x22; 32]),
        template_hash: Hash32([0x33; 32]),
        end_tokens: vec![END_TOKEN],
        vocab_size: 49_152,
        context_length: 2_048,
        similarity_threshold_millionths: 600_000,
        price_micro: 2,
        created_secs: 1_790_000_000,
    }
}
