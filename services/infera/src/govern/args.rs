//! Arguments of `infera govern`.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use crate::cli::DataArgs;

#[derive(Debug, Args)]
pub struct GovernArgs {
    #[command(subcommand)]
    pub command: GovernCommand,
}

#[derive(Debug, Subcommand)]
pub enum GovernCommand {
    /// All proposals, oldest first
    List {
        #[command(flatten)]
        at: Chain,
    },
    /// A proposal: what it does, its votes and its times
    Show {
        #[command(flatten)]
        at: Chain,
        /// Its id, or the first digits of it, as 0x3fa2
        id: String,
    },
    /// What the votes decided so far: models, releases and the calibration in force
    Registry {
        #[command(flatten)]
        at: Chain,
    },
    /// Let your tokens vote: undelegated ones do not
    Delegate {
        #[command(flatten)]
        who: Holder,
        /// Whose vote they add to; default: your own
        to: Option<String>,
    },
    /// Propose a change
    Propose {
        #[command(subcommand)]
        change: Change,
    },
    /// Vote on a proposal, once
    Vote {
        #[command(flatten)]
        who: Holder,
        /// Its id, or the first digits of it
        id: String,
        support: Vote,
    },
    /// Put a proposal that won into the timelock; anybody may
    Queue {
        #[command(flatten)]
        who: Holder,
        /// Its id, or the first digits of it
        id: String,
    },
    /// Carry a proposal out when the timelock has let it; anybody may
    Execute {
        #[command(flatten)]
        who: Holder,
        /// Its id, or the first digits of it
        id: String,
    },
}

#[derive(Debug, Subcommand)]
pub enum Change {
    /// Serve a model, or serve it with other values
    AdmitModel {
        #[command(flatten)]
        by: Proposer,
        /// The model's GGUF file or folder, or its entry as `infera models --inspect` prints it (.json)
        file: PathBuf,
        /// The name that clients ask for; default: the file's or folder's
        #[arg(long)]
        id: Option<String>,
        /// What a token costs per replica at first, micro-INFER; default: the entry's
        #[arg(long)]
        price: Option<u64>,
        /// The most that it may ever cost, micro-INFER; default: the price
        #[arg(long)]
        price_cap: Option<u64>,
        /// Cosine below which two answers disagree, as 0.6; default: the entry's
        #[arg(long)]
        threshold: Option<String>,
    },
    /// End the serving of a model: what was admitted is finished, new requests are refused
    WithdrawModel {
        #[command(flatten)]
        by: Proposer,
        id: String,
    },
    /// Change a served model's price cap or threshold; what is left out stays
    SetTerms {
        #[command(flatten)]
        by: Proposer,
        id: String,
        /// The most that a token may cost per replica, micro-INFER
        #[arg(long, required_unless_present = "threshold")]
        price_cap: Option<u64>,
        /// Cosine below which two answers disagree, as 0.6
        #[arg(long)]
        threshold: Option<String>,
    },
    /// Let nodes with this release of the node program work
    ApproveRelease {
        #[command(flatten)]
        by: Proposer,
        /// BLAKE3 of the executable, 0x and 64 hex digits
        hash: String,
        /// For people, as "0.3.1 linux x86_64"
        #[arg(long)]
        name: String,
    },
    /// Give nodes with this release no new work
    WithdrawRelease {
        #[command(flatten)]
        by: Proposer,
        hash: String,
    },
    /// Put a calibration in force
    SetCalibration {
        #[command(flatten)]
        by: Proposer,
        /// The hash that receipts name, 0x and 64 hex digits
        hash: String,
    },
}

impl Change {
    pub fn by(&self) -> &Proposer {
        match self {
            Self::AdmitModel { by, .. }
            | Self::WithdrawModel { by, .. }
            | Self::SetTerms { by, .. }
            | Self::ApproveRelease { by, .. }
            | Self::WithdrawRelease { by, .. }
            | Self::SetCalibration { by, .. } => by,
        }
    }
}

/// Who proposes, in which words.
#[derive(Debug, Clone, Args)]
pub struct Proposer {
    #[command(flatten)]
    pub who: Holder,
    /// One line for people; default: what the change is
    #[arg(long)]
    pub title: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Vote {
    For,
    Against,
    /// Counts for the quorum only
    Abstain,
}

/// Which network, and how it is printed.
#[derive(Debug, Clone, Args)]
pub struct Chain {
    #[command(flatten)]
    pub data: DataArgs,
    /// JSON-RPC endpoint of the chain; default: the one that network.json in the data folder names
    #[arg(long)]
    pub rpc: Option<String>,
    /// Addresses of the contracts; default: contracts.json in the data folder
    #[arg(long)]
    pub contracts: Option<PathBuf>,
    /// The block of the governor's deployment: the log is read from there on
    #[arg(long, default_value_t = 0)]
    pub from_block: u64,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Whose votes.
#[derive(Debug, Clone, Args)]
pub struct Holder {
    #[command(flatten)]
    pub at: Chain,
    /// File of the holder's key; default: on a devnet its treasury's, which has the supply, else operator.key in .infera-node
    #[arg(long, conflicts_with = "node")]
    pub key: Option<PathBuf>,
    /// The operator of this node of the network in the data folder, counted from 1
    #[arg(long)]
    pub node: Option<u16>,
}
