//! The dependency rules of docs/architecture.md, over `cargo metadata` and the sources.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use infera_testkit::workspace_root;
use serde_json::Value;

/// Direct normal dependencies of every workspace crate; (name, is_dev).
fn graph() -> BTreeMap<String, Vec<(String, bool)>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(workspace_root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let name = |value: &Value| value["name"].as_str().unwrap().to_owned();
    metadata["packages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|package| {
            let dependencies = package["dependencies"].as_array().unwrap();
            (name(package), dependencies.iter().map(|d| (name(d), d["kind"] == "dev")).collect())
        })
        .collect()
}

fn layer(krate: &str) -> Option<u32> {
    Some(match krate {
        "infera-protocol" => 0,
        "infera-wire" => 1,
        "infera-runtime" | "infera-prompt" | "infera-kernels" => 2,
        "infera-bus" | "infera-embed" | "infera-grammar" => 3,
        "infera-gateway" | "infera-mempool" | "infera-dispatcher" | "infera-verifier"
        | "infera-settlement" | "infera-explorer" | "infera-node" => 4,
        "infera" => 5,
        _ => return None,
    })
}

#[test]
fn dependencies_point_inwards() {
    for (krate, dependencies) in graph() {
        for (dependency, dev) in dependencies {
            if dependency == "infera-testkit" {
                assert!(dev, "{krate} depends on testkit outside its tests");
            }
            if let (Some(from), Some(to)) = (layer(&krate), layer(&dependency))
                && !dev
            {
                assert!(from > to, "{krate} must not depend on {dependency}");
            }
        }
    }
}

#[test]
fn each_driver_has_one_home() {
    let homes: [(&str, &[&str]); 6] = [
        ("tch", &["infera-node", "infera-embed"]),
        ("qdrant-client", &["infera-embed"]),
        ("lapin", &["infera-bus"]),
        ("llguidance", &["infera-grammar"]),
        ("alloy", &["infera-settlement", "infera"]),
        ("redis", &["infera-runtime"]),
    ];
    for (krate, dependencies) in graph() {
        for (driver, allowed) in homes {
            let uses = dependencies.iter().any(|(name, dev)| name == driver && !dev);
            assert!(!uses || allowed.contains(&krate.as_str()), "{krate} must not depend on {driver}");
        }
    }
}

#[test]
fn the_protocol_is_pure() {
    let forbidden = [
        "tokio",
        "actix",
        "lapin",
        "sea_orm",
        "redis",
        "tch::",
        "SystemTime",
        "Instant::now",
        "std::fs",
        "std::net",
    ];
    let mut seen = 0;
    for file in sources(&workspace_root().join("shared/protocol/src")) {
        seen += 1;
        let text = fs::read_to_string(&file).unwrap();
        for word in forbidden {
            assert!(!text.contains(word), "{} names {word}", file.display());
        }
    }
    assert!(seen > 10, "only {seen} files were read");
}

#[test]
fn mains_are_small() {
    for krate in ["gateway", "mempool", "dispatcher", "verifier", "settlement", "explorer", "node", "infera"]
    {
        let file = workspace_root().join("services").join(krate).join("src/main.rs");
        let lines = fs::read_to_string(&file).unwrap().lines().count();
        assert!(lines <= 20, "{} has {lines} lines", file.display());
    }
}

fn sources(dir: &Path) -> Vec<std::path::PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let path = entry.path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    files
}
