//! Where `infera up` keeps things: one folder, `.infera` unless told otherwise.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

/// Names of the services, in the order in which a request meets them.
pub const SERVICES: [&str; 6] = ["gateway", "settlement", "mempool", "dispatcher", "verifier", "explorer"];

/// Paths below the data folder.
#[derive(Debug, Clone)]
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    pub fn new(root: &Path) -> io::Result<Self> {
        for folder in ["", "keys", "config", "logs", "db", "nodes", "pids", "registries", "models", "bin"] {
            fs::create_dir_all(root.join(folder))?;
        }
        Ok(Self { root: root.canonicalize()? })
    }

    /// For commands that only look: the folder must be there.
    pub fn existing(root: &Path) -> Result<Self, String> {
        let root = root.canonicalize().map_err(|_| {
            format!(
                "there is no network in {}: start one with `make up`, or name its folder with --data",
                root.display()
            )
        })?;
        Ok(Self { root })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A link to the program that started the network: `.infera/bin/infera` in the documentation.
    pub fn program(&self) -> PathBuf {
        self.root.join("bin").join("infera")
    }

    pub fn manifest(&self) -> PathBuf {
        self.root.join("network.json")
    }

    /// Where the network's contracts are.
    pub fn contracts(&self) -> PathBuf {
        self.root.join("contracts.json")
    }

    /// The devnet's treasury: has the token's supply.
    pub fn treasury_key(&self) -> PathBuf {
        self.key("treasury.key")
    }

    pub fn registry(&self) -> PathBuf {
        self.root.join("models.json")
    }

    /// What `deploy/models.json` said at the last start that changed the registry.
    pub fn wanted(&self) -> PathBuf {
        self.root.join("models.wanted.json")
    }

    /// Further models, each as ID.gguf or as a folder ID: those that the holders may admit.
    pub fn model_folder(&self) -> PathBuf {
        self.root.join("models")
    }

    pub fn jwks(&self) -> PathBuf {
        self.root.join("jwks.json")
    }

    pub fn key(&self, name: &str) -> PathBuf {
        self.root.join("keys").join(name)
    }

    pub fn config(&self, name: &str) -> PathBuf {
        self.root.join("config").join(format!("{name}.toml"))
    }

    pub fn log(&self, name: &str) -> PathBuf {
        self.root.join("logs").join(format!("{name}.log"))
    }

    pub fn database(&self, service: &str) -> PathBuf {
        self.root.join("db").join(format!("{service}.sqlite"))
    }

    pub fn pid(&self, name: &str) -> PathBuf {
        self.root.join("pids").join(format!("{name}.pid"))
    }

    pub fn node(&self, number: usize) -> PathBuf {
        self.root.join("nodes").join(number.to_string())
    }

    pub fn chain_state(&self) -> PathBuf {
        self.root.join("chain").join("state.json")
    }

    pub fn cluster(&self) -> PathBuf {
        self.root.join("cluster")
    }

    /// Written when all is ready, removed at the end: what scripts read.
    pub fn up_json(&self) -> PathBuf {
        self.root.join("up.json")
    }

    /// Held by the running `infera up`; holds its process id.
    pub fn lock(&self) -> Result<File, String> {
        let path = self.root.join("up.lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .read(true)
            .open(&path)
            .map_err(|e| format!("cannot open {}: {e}", path.display()))?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(_) => Err(format!(
                "a network already runs in {}: end it with `make down`, or use another folder with --data",
                self.root.display()
            )),
        }
    }

    /// The process id of the running `infera up`, if one runs here.
    pub fn running(&self) -> Option<i32> {
        let file = File::open(self.root.join("up.lock")).ok()?;
        if file.try_lock().is_ok() {
            return None;
        }
        fs::read_to_string(self.pid("up")).ok()?.trim().parse().ok()
    }
}

/// `${INFERA_CACHE:-$HOME/.cache/infera}`, where `deploy/setup` puts what it installs.
pub fn cache() -> PathBuf {
    std::env::var_os("INFERA_CACHE").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache/infera"),
        PathBuf::from,
    )
}

/// Writes a file that only its owner may read, whole or not at all.
pub fn write_secret(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let temporary = path.with_extension("new");
    let _ = fs::remove_file(&temporary);
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(&temporary)?;
    io::Write::write_all(&mut file, bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}
