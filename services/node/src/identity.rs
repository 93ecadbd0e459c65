//! The keys of a node and its operator, made on this machine.

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use ed25519_dalek::SigningKey;
use infera_protocol::{
    bytes::{Address, EvmSignature, Hash32, NodeId, Signature},
    commitment::Slot,
    identity::{
        Domain, HelloClaims, IdentityError, MAX_BINDING_MS, NodeBinding, evm_address, hello_digest, node_id,
        sign,
    },
    registry::Manifest,
    typed,
};
use infera_runtime::clock;
use infera_wire::v1;
use k256::ecdsa::SigningKey as EvmKey;

use crate::{Args, Error};

/// Who this node is, and on which network.
pub struct Identity {
    key: SigningKey,
    /// Of what a contract must check.
    signer: EvmKey,
    pub domain: Domain,
    operator: EvmKey,
    release_hash: Hash32,
}

impl Identity {
    /// Loads the node's, signer's and operator's keys, and makes those that are missing.
    ///
    /// # Errors
    /// A key file that can't be read or written, or is no key.
    pub fn load_or_create(args: &Args, manifest: &Manifest) -> Result<Self, Error> {
        fs::create_dir_all(&args.data)
            .map_err(|e| Error::Identity(format!("cannot write {}: {e}", args.data.display())))?;
        let key = SigningKey::from_bytes(&secret(&args.data.join("node.key"))?);
        let signer = evm_key(&args.data.join("signer.key"))?;
        let operator_path = args.operator_key.clone().unwrap_or_else(|| args.data.join("operator.key"));
        let operator = evm_key(&operator_path)?;
        Ok(Self { key, signer, domain: manifest.domain, operator, release_hash: release_hash()? })
    }

    /// For tests of the network: declares an executable that nobody has.
    pub fn forge_release(&mut self) {
        self.release_hash = Hash32(rand::random());
    }

    pub fn node(&self) -> NodeId {
        node_id(&self.key)
    }

    pub fn operator(&self) -> Address {
        evm_address(&self.operator)
    }

    pub fn sign(&self, digest: &Hash32) -> Signature {
        sign(&self.key, digest)
    }

    /// Signs for the contracts, which can't check [`Identity::sign`]: two such statements about one slot that contradict each
    /// other cost the operator its stake.
    ///
    /// # Errors
    /// The key cannot sign.
    pub fn state(&self, digest: &Hash32) -> Result<EvmSignature, IdentityError> {
        typed::sign(digest, &self.signer)
    }

    /// Blinds the answer of a slot. The same slot has the same salt for ever, so that an answer that is computed twice
    /// makes the same commitment; nobody without the node's key can tell it before the reveal.
    pub fn salt(&self, slot: &Slot) -> Hash32 {
        let key = blake3::derive_key("infera node 2026 salt of a commitment", self.key.as_bytes());
        let mut hasher = blake3::Hasher::new_keyed(&key);
        hasher.update(&slot.request_hash.0).update(&slot.attempt.to_be_bytes());
        Hash32(*hasher.finalize().as_bytes())
    }

    /// The answer to a challenge. The operator binds the node anew each time, because a session ends with its binding.
    ///
    /// # Errors
    /// The operator's key cannot sign.
    pub fn hello(
        &self,
        nonce: &[u8; 32],
        weights_root: Hash32,
        class: &str,
        slots: u32,
    ) -> Result<v1::Hello, IdentityError> {
        let binding = NodeBinding {
            node: self.node(),
            signer: evm_address(&self.signer),
            expiry_ms: clock::now_ms() + MAX_BINDING_MS,
        };
        let claims = HelloClaims {
            node: binding.node,
            operator: self.operator(),
            binding,
            release_hash: self.release_hash,
            weights_root,
            class: class.to_owned(),
            slots,
        };
        let signature = self.sign(&hello_digest(&self.domain, nonce, &claims));
        Ok(v1::Hello {
            node: claims.node.to_vec(),
            operator: claims.operator.to_vec(),
            signer: binding.signer.to_vec(),
            binding_expiry_ms: binding.expiry_ms,
            binding_signature: binding.sign(&self.domain, &self.operator)?.to_vec(),
            release_hash: self.release_hash.to_vec(),
            weights_root: weights_root.to_vec(),
            class: claims.class,
            slots,
            version: format!("{} {}", env!("CARGO_PKG_VERSION"), infera_grammar::LIBRARY),
            signature: signature.to_vec(),
        })
    }
}

/// BLAKE3 of the running executable.
fn release_hash() -> Result<Hash32, Error> {
    let path = std::env::current_exe().map_err(|e| Error::Start(e.to_string()))?;
    crate::release(&path).map_err(|e| Error::File {
        what: "the running executable",
        path: path.display().to_string(),
        reason: e.to_string(),
    })
}

fn evm_key(path: &Path) -> Result<EvmKey, Error> {
    EvmKey::from_slice(&secret(path)?).map_err(|_| {
        Error::Identity(format!("{} is no secp256k1 key: remove it, and a new one is made", path.display()))
    })
}

/// 32 secret bytes as 0x hex, made with mode 0600 if the file is not there.
fn secret(path: &Path) -> Result<[u8; 32], Error> {
    let failed = |reason: String| Error::Identity(format!("{}: {reason}", path.display()));
    match fs::read_to_string(path) {
        Ok(text) => text
            .trim()
            .parse::<Hash32>()
            .map(|bytes| bytes.0)
            .map_err(|e| failed(format!("{e}; remove the file, and a new key is made"))),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let bytes: [u8; 32] = rand::random();
            let mut file = File::options()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(path)
                .map_err(|e| failed(e.to_string()))?;
            file.write_all(Hash32(bytes).to_string().as_bytes())
                .and_then(|()| file.sync_all())
                .map_err(|e| failed(e.to_string()))?;
            Ok(bytes)
        }
        Err(error) => Err(failed(error.to_string())),
    }
}
