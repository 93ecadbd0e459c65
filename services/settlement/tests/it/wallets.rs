//! Consumers with wallets: keys that everybody knows, what they do on a chain, and what they sign.

use infera_protocol::{
    bytes::{Address, EvmSignature},
    identity::Domain,
    voucher::Voucher,
};
use infera_settlement::{chain::parse_key, store::vouchers::Signed};

/// anvil's fourth and fifth account.
pub const WALLETS: [&str; 2] = [
    "7c852118294e51e653712a81e05800f419141751be58f605c371e15141b007a6",
    "47e179ec197488593b187f80a00eb0da91f1b9d0b13f8733639f19c30a34926a",
];

/// What a consumer does on the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    Deposit(u64),
    Request(u64),
    Cancel,
    Withdraw,
}

pub fn address(wallet: usize) -> Address {
    Address(parse_key("key", WALLETS[wallet]).unwrap().address().into())
}

pub fn sign(wallet: usize, domain: &Domain, cumulative_micro: u64) -> EvmSignature {
    let voucher = Voucher { account: address(wallet), cumulative_micro };
    voucher.sign(domain, parse_key("key", WALLETS[wallet]).unwrap().credential()).unwrap()
}

pub fn voucher(wallet: usize, domain: &Domain, cumulative_micro: u64) -> Signed {
    Signed { cumulative_micro, signature: sign(wallet, domain, cumulative_micro) }
}
