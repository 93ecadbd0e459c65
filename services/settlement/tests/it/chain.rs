//! The contract client and the devnet, against a real anvil.

use std::{fs, path::PathBuf, time::Duration};

use infera_settlement::chain::{
    Address, B256, Batch, Chain, ChainError, ChainReader, Contracts, Deployment, TxStatus, deploy,
    devnet::{Devnet, DevnetConfig, DevnetError},
};

use crate::network::Network;

/// anvil's first and second accounts, known to everybody.
pub const DEPLOYER: &str = "0xac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80";
pub const SETTLER: &str = "0x59c6995e998f97a5a0044966f0945389dc9e86dae88c7a8412f4603b6b78690d";
pub const SETTLER_ADDRESS: &str = "0x70997970C51812dc3A010C7d01b50e0d17dc79C8";

pub fn anvil() -> PathBuf {
    let cache = std::env::var("INFERA_CACHE")
        .unwrap_or_else(|_| format!("{}/.cache/infera", std::env::var("HOME").unwrap()));
    PathBuf::from(cache).join("npm/node_modules/.bin/anvil")
}

/// A port below the range from which the system takes the ports of outgoing connections, so that nobody else gets it.
pub fn free_port() -> u16 {
    use std::sync::atomic::{AtomicU16, Ordering};
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = 18_000 + u16::try_from(std::process::id() % 600).unwrap() * 20;
    loop {
        let port = first + NEXT.fetch_add(1, Ordering::Relaxed);
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

pub fn config(folder: &tempfile::TempDir) -> DevnetConfig {
    DevnetConfig {
        anvil: anvil(),
        port: free_port(),
        chain_id: 31_337,
        state_file: folder.path().join("chain/state.hex"),
        block_time: None,
    }
}

/// A devnet's contracts, with anvil's third account as the guardian.
pub async fn contracts(rpc_url: &str) -> Contracts {
    let guardian = "0x3C44CdDdB6a900fa2b585dd299e03d12FA4293BC".parse().unwrap();
    let devnet = Deployment::devnet(SETTLER_ADDRESS.parse().unwrap(), guardian);
    let wanted = Deployment { minimum_stake_micro: 1_000_000_000, ..devnet };
    deploy::deploy(rpc_url, DEPLOYER, &Network::offline().registry, &wanted).await.unwrap()
}

async fn deployed(devnet: &Devnet) -> Chain {
    let contract = contracts(devnet.rpc_url()).await.settlement;
    Chain::connect(devnet.rpc_url(), SETTLER, contract).await.unwrap()
}

fn batch(sequence: u64, previous_hash: B256) -> Batch {
    let byte = u8::try_from(sequence).unwrap();
    Batch {
        sequence,
        previous_hash,
        receipts_root: B256::repeat_byte(byte),
        count: 10 + sequence,
        reward_root: B256::repeat_byte(0xee),
        total: 1_000 * u128::from(sequence),
    }
}

async fn post(chain: &Chain, batch: &Batch) -> B256 {
    let signed = chain.sign_batch(batch, chain.next_nonce().await.unwrap()).await.unwrap();
    chain.send_raw(&signed.raw).await.unwrap();
    wait_included(chain, signed.hash).await;
    signed.hash
}

async fn wait_included(chain: &Chain, tx: B256) -> u64 {
    for _ in 0..500 {
        match chain.status(tx).await.unwrap() {
            TxStatus::Included { gas_used, .. } => return gas_used,
            TxStatus::Failed { .. } => panic!("the transaction failed"),
            TxStatus::Unknown => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
    panic!("the transaction was not included");
}

#[tokio::test]
async fn posts_batches_that_readers_find_again() {
    let folder = tempfile::tempdir().unwrap();
    let devnet = Devnet::start(&config(&folder)).await.unwrap();
    let chain = deployed(&devnet).await;
    assert_eq!(chain.head().await.unwrap().sequence, 0);

    let first = batch(1, B256::ZERO);
    let tx = post(&chain, &first).await;
    let second = batch(2, first.hash());
    let signed = chain.sign_batch(&second, chain.next_nonce().await.unwrap()).await.unwrap();
    chain.send_raw(&signed.raw).await.unwrap();
    let gas = wait_included(&chain, signed.hash).await;
    assert!(gas < 70_000, "a batch must cost less than 7 gas a receipt at 10,000: {gas}");

    let reader = ChainReader::connect(devnet.rpc_url(), chain.reader().contract()).await.unwrap();
    assert_eq!(reader.chain_id(), 31_337);
    let head = reader.head().await.unwrap();
    assert_eq!((head.sequence, head.hash), (2, second.hash()));
    assert_eq!(reader.batch(1).await.unwrap(), Some(first.receipts_root));
    assert_eq!(reader.batch(3).await.unwrap(), None);
    let posted = reader.posted(1, 0).await.unwrap().unwrap();
    assert_eq!((posted.batch, posted.batch_hash, posted.tx), (first, first.hash(), tx));
    assert_eq!(reader.posted(3, 0).await.unwrap(), None);
    devnet.stop().await.unwrap();
}

#[tokio::test]
async fn sending_twice_posts_once_and_bad_batches_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(&folder);
    // Blocks are a second apart, so that the second sending finds the first still in the pool.
    config.block_time = Some(1);
    let devnet = Devnet::start(&config).await.unwrap();
    let chain = deployed(&devnet).await;
    let first = batch(1, B256::ZERO);
    let signed = chain.sign_batch(&first, chain.next_nonce().await.unwrap()).await.unwrap();
    assert_eq!(chain.status(signed.hash).await.unwrap(), TxStatus::Unknown);
    chain.send_raw(&signed.raw).await.unwrap();
    chain.send_raw(&signed.raw).await.unwrap();
    wait_included(&chain, signed.hash).await;
    assert_eq!(chain.head().await.unwrap().sequence, 1);

    let nonce = chain.next_nonce().await.unwrap();
    assert_eq!(nonce, signed.nonce + 1);
    let again = chain.sign_batch(&first, nonce).await.unwrap_err().to_string();
    assert!(again.contains("sequence 1 given, 2 expected"), "{again}");
    let skipped = chain.sign_batch(&batch(3, first.hash()), nonce).await.unwrap_err().to_string();
    assert!(skipped.contains("sequence 3 given, 2 expected"), "{skipped}");
    let rewritten = chain.sign_batch(&batch(2, B256::ZERO), nonce).await.unwrap_err().to_string();
    assert!(rewritten.contains("previous hash"), "{rewritten}");

    let contract = chain.reader().contract();
    let stranger = Chain::connect(devnet.rpc_url(), DEPLOYER, contract).await.unwrap();
    let refused = stranger.sign_batch(&batch(2, first.hash()), 99).await.unwrap_err().to_string();
    assert!(refused.contains("may not do this"), "{refused}");
    devnet.stop().await.unwrap();
}

#[tokio::test]
async fn bad_settings_name_their_field() {
    let folder = tempfile::tempdir().unwrap();
    let devnet = Devnet::start(&config(&folder)).await.unwrap();
    let url = devnet.rpc_url().to_string();
    let nowhere = Address::repeat_byte(1);
    let message = |e: ChainError| e.to_string();
    let error = message(ChainReader::connect(&url, nowhere).await.unwrap_err());
    assert!(error.starts_with("chain.contract: there is no contract"), "{error}");
    let error = message(Chain::connect(&url, "0x123", nowhere).await.unwrap_err());
    assert!(error.starts_with("chain.settler_key: ") && !error.contains("123"), "{error}");
    let error = message(ChainReader::connect("ftp://127.0.0.1", nowhere).await.unwrap_err());
    assert!(error.starts_with("chain.rpc_url: "), "{error}");
    devnet.stop().await.unwrap();
    let down = ChainReader::connect(&url, nowhere).await.unwrap_err();
    assert!(down.is_unreachable(), "{down}");
}

#[tokio::test]
async fn state_survives_a_kill_and_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder);
    let devnet = Devnet::start(&config).await.unwrap();
    let chain = deployed(&devnet).await;
    let contract = chain.reader().contract();
    let first = batch(1, B256::ZERO);
    let tx = post(&chain, &first).await;
    devnet.save().await.unwrap();
    let left_behind = devnet.pid().unwrap();
    // As after kill -9 of the whole program: nobody stops anvil, nobody waits for it.
    std::mem::forget(devnet);

    let devnet = Devnet::start(&config).await.unwrap();
    assert_ne!(devnet.pid(), Some(left_behind));
    assert_eq!(devnet.warning(), None);
    let chain = Chain::connect(devnet.rpc_url(), SETTLER, contract).await.unwrap();
    assert_eq!(chain.head().await.unwrap().hash, first.hash());
    assert!(matches!(chain.status(tx).await.unwrap(), TxStatus::Included { .. }));
    assert_eq!(chain.reader().posted(1, 0).await.unwrap().unwrap().batch, first);
    let second = batch(2, first.hash());
    post(&chain, &second).await;
    devnet.stop().await.unwrap();

    let devnet = Devnet::start(&config).await.unwrap();
    let reader = ChainReader::connect(devnet.rpc_url(), contract).await.unwrap();
    assert_eq!(reader.head().await.unwrap().hash, second.hash());
    devnet.stop().await.unwrap();
}

#[tokio::test]
async fn a_new_block_is_saved_without_being_asked() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder);
    let devnet = Devnet::start(&config).await.unwrap();
    let chain = deployed(&devnet).await;
    let contract = chain.reader().contract();
    let written = || fs::metadata(&config.state_file).and_then(|m| m.modified()).ok();
    let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
    let mut last = written();
    let mut previous = batch(1, B256::ZERO);
    post(&chain, &previous).await;
    while written() == last {
        assert!(tokio::time::Instant::now() < deadline, "the state was not saved");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // That save may have begun before the first batch was in; one after the second batch has the first.
    last = written();
    previous = batch(2, previous.hash());
    post(&chain, &previous).await;
    while written() == last {
        assert!(tokio::time::Instant::now() < deadline, "the state was not saved again");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    drop(devnet);
    let devnet = Devnet::start(&config).await.unwrap();
    let reader = ChainReader::connect(devnet.rpc_url(), contract).await.unwrap();
    assert!(reader.head().await.unwrap().sequence >= 1);
    devnet.stop().await.unwrap();
}

#[tokio::test]
async fn a_truncated_state_is_set_aside_with_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(&folder);
    let devnet = Devnet::start(&config).await.unwrap();
    deployed(&devnet).await;
    devnet.stop().await.unwrap();
    let bytes = fs::read(&config.state_file).unwrap();
    fs::write(&config.state_file, &bytes[..bytes.len() / 2]).unwrap();

    let devnet = Devnet::start(&config).await.unwrap();
    let warning = devnet.warning().unwrap().to_string();
    assert!(warning.contains("set aside"), "{warning}");
    let aside = fs::read_dir(config.state_file.parent().unwrap())
        .unwrap()
        .any(|entry| entry.unwrap().file_name().to_string_lossy().contains(".broken-"));
    assert!(aside);
    assert_eq!(deployed(&devnet).await.head().await.unwrap().sequence, 0);
    devnet.stop().await.unwrap();
}

#[tokio::test]
async fn a_taken_port_and_a_missing_anvil_are_said_clearly() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(&folder);
    let taken = std::net::TcpListener::bind(("127.0.0.1", config.port)).unwrap();
    let error = Devnet::start(&config).await.unwrap_err();
    assert!(matches!(error, DevnetError::PortTaken(port) if port == config.port), "{error}");
    drop(taken);
    config.anvil = "/nowhere/anvil".into();
    let error = Devnet::start(&config).await.unwrap_err().to_string();
    assert!(error.contains("/nowhere/anvil") && error.contains("deploy/setup"), "{error}");
}
