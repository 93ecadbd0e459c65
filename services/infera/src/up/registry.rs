//! The model registry of a devnet and its versions: what `deploy/models.json` says comes into force when it changes, what
//! holders decided since then stays, and what was in force before is kept.

use std::{fs, io, path::Path};

use infera_protocol::registry::{Manifest, Model, Registry};
use infera_runtime::network;

use super::bootstrap::write_json;
use crate::layout::Layout;

/// Makes `wanted` the registry in force, with the models that the holders admitted besides, and returns it as it is stored.
/// Where another one was in force, that one is kept under its hash, and the new one says since when it replaces it. If
/// `wanted` is what it was at the last start, what is stored stays: the holders may have changed it. `manifest` is the one
/// of the last start.
///
/// # Errors
/// One sentence; also where the stored registry is not the one that `manifest` names: its receipts could not be
/// checked any more.
pub fn put_in_force(
    layout: &Layout,
    manifest: Option<&Manifest>,
    wanted: &Registry,
    now_ms: i64,
) -> Result<Registry, String> {
    let path = layout.registry();
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound && manifest.is_none() => {
            write_json(&path, wanted)?;
            write_json(&layout.wanted(), wanted)?;
            return Ok(wanted.clone());
        }
        Err(error) => return Err(format!("cannot read {}: {error}", path.display())),
    };
    let stored: Registry = serde_json::from_slice(&bytes).map_err(|e| unreadable(&path, &e))?;
    let hash = stored.hash().map_err(|e| e.to_string())?;
    // A start that was killed between the two files leaves a manifest that names the version before.
    let named = manifest.is_none_or(|manifest| {
        let known = Some(manifest.registry_hash);
        known == Some(hash) || known == stored.replaces.map(|former| former.registry_hash)
    });
    if !named {
        return Err(format!(
            "{} was changed by hand, the manifest names another one: put back what was there, or start anew with \
             `make clean-data`",
            path.display()
        ));
    }
    let last: Option<Registry> =
        fs::read(layout.wanted()).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
    if last.as_ref() == Some(wanted) {
        return Ok(stored);
    }
    let asked_for = |model: &Model| {
        let mut all = wanted.models.iter().chain(last.iter().flat_map(|last| &last.models));
        all.any(|other| other.id == model.id)
    };
    let mut wanted_now = wanted.clone();
    wanted_now.models.extend(stored.models.iter().filter(|model| !asked_for(model)).cloned());
    let registry = network::replace(&path, &wanted_now, now_ms).map_err(|e| e.to_string())?;
    write_json(&layout.wanted(), wanted)?;
    Ok(registry)
}

/// What to say where a file of an earlier start can't be read.
pub(super) fn unreadable(path: &Path, error: &serde_json::Error) -> String {
    format!(
        "{} is damaged, or of another version of Infera ({error}): go on with the version that wrote it, or start \
         anew with `make clean-data`",
        path.display()
    )
}

#[cfg(test)]
mod tests {
    use infera_testkit::TempDir;

    use super::*;

    struct Folder {
        layout: Layout,
        manifest: Option<Manifest>,
        _dir: TempDir,
    }

    impl Folder {
        fn new() -> Self {
            let dir = TempDir::new().unwrap();
            Self { layout: Layout::new(dir.path()).unwrap(), manifest: None, _dir: dir }
        }

        /// A start at `now_ms`, with the manifest that it writes.
        fn start(&mut self, wanted: &Registry, now_ms: i64) -> Registry {
            let registry = put_in_force(&self.layout, self.manifest.as_ref(), wanted, now_ms).unwrap();
            let mut manifest = infera_testkit::evidence::Network::new().manifest;
            manifest.registry_hash = registry.hash().unwrap();
            write_json(&self.layout.manifest(), &manifest).unwrap();
            self.manifest = Some(manifest);
            registry
        }
    }

    fn wanted(price_micro: u64, near_tie_milli: u32) -> Registry {
        let mut registry = infera_testkit::evidence::Network::new().registry;
        registry.models[0].price_micro = price_micro;
        registry.calibration.pairs[0].bounds.near_tie_milli = near_tie_milli;
        registry
    }

    #[test]
    fn what_was_in_force_is_kept_and_found() {
        let mut folder = Folder::new();
        assert_eq!(folder.start(&wanted(1, 300), 1_000), wanted(1, 300));
        // Nothing has changed: no new version.
        assert_eq!(folder.start(&wanted(1, 300), 2_000), wanted(1, 300));
        folder.start(&wanted(2, 300), 3_000);
        // The clock was set back.
        let last = folder.start(&wanted(1, 250), 10);
        assert_eq!(last.replaces.unwrap().at_ms, 3_001);
        let (manifest, history) =
            network::load(&folder.layout.manifest(), &folder.layout.registry()).unwrap();
        assert_eq!(manifest.registry_hash, last.hash().unwrap());
        let prices = |first, last| -> Vec<u64> {
            history.in_force(first, last).map(|registry| registry.models[0].price_micro).collect()
        };
        assert_eq!(prices(0, 2_999), [1]);
        assert_eq!(prices(3_000, 3_000), [2]);
        assert_eq!(prices(2_999, 9_999), [1, 2, 1]);
        assert_eq!(history.unknown_before(0), None);
    }

    #[test]
    fn a_start_that_was_killed_between_the_files_is_repeated() {
        let mut folder = Folder::new();
        folder.start(&wanted(1, 300), 1_000);
        // The registry is written, the manifest is not.
        let manifest = folder.manifest.clone();
        let changed = put_in_force(&folder.layout, manifest.as_ref(), &wanted(2, 300), 2_000).unwrap();
        assert_eq!(folder.start(&wanted(2, 300), 3_000), changed);
    }

    #[test]
    fn what_holders_decided_outlives_a_start() {
        let mut folder = Folder::new();
        folder.start(&wanted(1, 300), 1_000);
        // A vote: another price, and a second model.
        let mut voted = wanted(7, 300);
        voted.models.push(Model { id: "voted".into(), ..voted.models[0].clone() });
        let voted = network::replace(&folder.layout.registry(), &voted, 2_000).unwrap();
        let named = Manifest { registry_hash: voted.hash().unwrap(), ..folder.manifest.clone().unwrap() };
        folder.manifest = Some(named);
        assert_eq!(folder.start(&wanted(1, 300), 3_000), voted, "deploy/models.json is what it was");
        let changed = folder.start(&wanted(2, 250), 4_000);
        assert_eq!(changed.models[0].price_micro, 2);
        assert_eq!(changed.models[1].id, "voted");
    }

    #[test]
    fn a_registry_changed_by_hand_is_refused() {
        let mut folder = Folder::new();
        folder.start(&wanted(1, 300), 1_000);
        write_json(&folder.layout.registry(), &wanted(9, 300)).unwrap();
        let error =
            put_in_force(&folder.layout, folder.manifest.as_ref(), &wanted(1, 300), 2_000).unwrap_err();
        assert!(error.contains("changed by hand") && error.contains("models.json"), "{error}");
    }
}
