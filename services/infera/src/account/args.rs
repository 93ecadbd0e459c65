//! The command line of `infera account`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use crate::cli::DataArgs;

#[derive(Debug, Args)]
pub struct AccountArgs {
    #[command(subcommand)]
    pub command: AccountCommand,
}

#[derive(Debug, Subcommand)]
pub enum AccountCommand {
    /// Sign in with a wallet's key: the gateway gives an API key for it, which the other commands use
    Login {
        #[command(flatten)]
        who: AccountWho,
        /// Make a new wallet key where there is none
        #[arg(long)]
        new: bool,
        /// What a gateway calls itself that is reached through a proxy, as https://gateway.example.org: only for it anything
        /// is signed; default: the gateway's address
        #[arg(long)]
        origin: Option<String>,
    },
    /// Revoke the API key of the sign-in and forget it
    Logout {
        #[command(flatten)]
        who: AccountWho,
    },
    /// The account's API keys: list, make, revoke
    Keys {
        #[command(subcommand)]
        command: AccountKeysCommand,
    },
    /// What the account has, and what open requests hold
    Balance {
        #[command(flatten)]
        who: AccountWho,
        /// Print the gateway's answer as JSON
        #[arg(long)]
        json: bool,
    },
    /// The account's requests and what each was charged, newest first
    Usage {
        #[command(flatten)]
        who: AccountWho,
        #[command(flatten)]
        period: Period,
        /// Of this model only
        #[arg(long)]
        model: Option<String>,
        /// At most this many
        #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=1000))]
        limit: u16,
        /// Go on where the last page ended
        #[arg(long)]
        cursor: Option<String>,
    },
    /// Every movement of the account's money, with the balance at the start and at the end
    Statement {
        #[command(flatten)]
        who: AccountWho,
        #[command(flatten)]
        period: Period,
        /// At most this many
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u16).range(1..=1000))]
        limit: u16,
        /// Go on where the last page ended
        #[arg(long)]
        cursor: Option<String>,
    },
    /// What an answer would cost at most
    Quote {
        #[command(flatten)]
        who: AccountWho,
        /// The question
        prompt: String,
        /// Default: the first model that is served
        #[arg(long)]
        model: Option<String>,
        /// Most tokens of the answer; default: the gateway's
        #[arg(long)]
        max_tokens: Option<u32>,
        /// Print the gateway's answer as JSON
        #[arg(long)]
        json: bool,
    },
    /// Move tokens of the wallet into its escrow; they may be spent once their block is final and a voucher allows it
    Deposit {
        #[command(flatten)]
        who: AccountWho,
        #[command(flatten)]
        chain: ChainWho,
        /// INFER, with up to six decimals
        amount: String,
        /// On a devnet: take the tokens that are missing from its treasury
        #[arg(long)]
        faucet: bool,
    },
    /// Allow the network to charge the wallet's escrow up to an amount, over the account's lifetime
    Voucher {
        #[command(flatten)]
        who: AccountWho,
        /// INFER, with up to six decimals
        amount: String,
        /// The amount is what is allowed beyond the last voucher that was signed here
        #[arg(long)]
        more: bool,
    },
    /// Announce that tokens are to come out of escrow; without an amount: take what the delay has let out
    Withdraw {
        #[command(flatten)]
        who: AccountWho,
        #[command(flatten)]
        chain: ChainWho,
        /// INFER, with up to six decimals
        amount: Option<String>,
        /// Take the announcement back
        #[arg(long, conflicts_with = "amount")]
        cancel: bool,
    },
}

#[derive(Debug, Subcommand)]
pub enum AccountKeysCommand {
    /// One line each: jti, name, scopes, when it ends
    List {
        #[command(flatten)]
        who: AccountWho,
    },
    /// Print a new API key; it is shown once
    Create {
        #[command(flatten)]
        who: AccountWho,
        /// What it is for
        name: String,
        /// Days until it expires
        #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u16).range(1..=3650))]
        days: u16,
        /// chat or receipts; may be repeated; default: both
        #[arg(long = "scope")]
        scopes: Vec<String>,
    },
    /// Revoke a key by its jti
    Revoke {
        #[command(flatten)]
        who: AccountWho,
        jti: String,
    },
}

/// From when until when.
#[derive(Debug, Clone, Args)]
pub struct Period {
    /// From this time on, as 2026-11-01T00:00:00Z
    #[arg(long)]
    pub from: Option<String>,
    /// Until before this time
    #[arg(long)]
    pub to: Option<String>,
    /// Print it as CSV
    #[arg(long)]
    pub csv: bool,
}

/// Which account, at which gateway.
#[derive(Debug, Clone, Args)]
pub struct AccountWho {
    /// Folder of the wallet's key and of the sign-in
    #[arg(long, default_value = ".infera-account", env = "INFERA_ACCOUNT")]
    pub account: PathBuf,
    /// File of the wallet's key, 0x and 64 hex digits; default: wallet.key in the account's folder
    #[arg(long)]
    pub key: Option<PathBuf>,
    /// Address of the gateway, as http://127.0.0.1:8080; default: that of the sign-in, or of the network in the data folder
    #[arg(long)]
    pub gateway: Option<String>,
    #[command(flatten)]
    pub data: DataArgs,
}

/// Which chain and contracts.
#[derive(Debug, Clone, Args)]
pub struct ChainWho {
    /// JSON-RPC endpoint of the chain; default: the one that network.json in the data folder names
    #[arg(long)]
    pub rpc: Option<String>,
    /// Addresses of the contracts; default: contracts.json in the data folder
    #[arg(long)]
    pub contracts: Option<PathBuf>,
}
