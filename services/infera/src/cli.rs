//! The command line.

use std::path::PathBuf;

use clap::{ArgMatches, Args, FromArgMatches, Parser, Subcommand, ValueEnum};

use crate::{account::AccountArgs, govern::args::GovernArgs};

#[derive(Debug, Parser)]
#[command(
    name = "infera",
    version,
    about = "Verified answers of open language models, computed on idle GPUs"
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a whole network on this machine
    Up(UpArgs),
    /// End the network that `infera up` started; its data stays
    Down(DataArgs),
    /// Run a node: this machine answers requests and earns; or look after what it earned, as `infera operator` does
    Node(RunNodeArgs),
    /// Take this machine back from its node: it stops computing at once and frees its memory
    Pause(NodeArgs),
    /// Let a paused node work again
    Resume(NodeArgs),
    /// Make and revoke API keys of a network in a data folder
    Keys(KeysArgs),
    /// Your account at a gateway: sign in with a wallet, API keys, balance, usage, quotes, vouchers
    Account(AccountArgs),
    /// Show the models of the network, or the registry entry of a model file
    Models(ModelsArgs),
    /// Check a receipt or whole batches, trusting no service
    Verify(VerifyArgs),
    /// List verified requests
    History(HistoryArgs),
    /// Look at messages that could not be processed, or try them again
    Dead(DeadArgs),
    /// Look at money held for requests whose verdict was lost, or give it back
    Holds(HoldsArgs),
    /// Prove that the books balance
    Ledger(LedgerArgs),
    /// What a node's operator earned, and its stake: look, claim, stake, unstake
    Operator(OperatorArgs),
    /// What the token's holders decide: look, delegate, propose, vote, queue, execute
    Govern(GovernArgs),
    /// Show the configuration that a service runs with; secrets are left out
    Config(ConfigArgs),
    /// Run all services in this process (what `infera up` starts)
    #[command(hide = true)]
    Network(DataArgs),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Profile {
    /// One process for all services; nothing to install
    Embedded,
    /// A process per service on private RabbitMQ, Redis and PostgreSQL
    Cluster,
}

impl Profile {
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedded => "embedded",
            Self::Cluster => "cluster",
        }
    }
}

/// A node, or what its operator does.
#[derive(Debug)]
pub enum RunNodeArgs {
    Run(infera_node::Args),
    Operator(OperatorCommand),
}

// By hand: an `Option` of the node's arguments counts as given where the environment sets one of them, and then
// lacks `--model` beside a subcommand.
impl FromArgMatches for RunNodeArgs {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        if matches.subcommand_name().is_some() {
            OperatorCommand::from_arg_matches(matches).map(Self::Operator)
        } else {
            infera_node::Args::from_arg_matches(matches).map(Self::Run)
        }
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for RunNodeArgs {
    fn augment_args(command: clap::Command) -> clap::Command {
        OperatorCommand::augment_subcommands(infera_node::Args::augment_args(command))
            .args_conflicts_with_subcommands(true)
            .subcommand_negates_reqs(true)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

/// Which node.
#[derive(Debug, Args)]
pub struct NodeArgs {
    /// Folder of the node's keys and its journal of commitments
    #[arg(long, default_value = ".infera-node")]
    pub data: PathBuf,
}

#[derive(Debug, Clone, Args)]
pub struct UpArgs {
    #[arg(long, value_enum, default_value = "embedded")]
    pub profile: Profile,
    /// Return once all is ready; `infera down` ends it
    #[arg(long)]
    pub detach: bool,
    /// Folder of all data
    #[arg(long, default_value = ".infera", env = "INFERA_DATA")]
    pub data: PathBuf,
    /// Nodes to start, each of an operator of its own
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(0..=16))]
    pub nodes: u16,
    /// Make a node misbehave: NUMBER=MODE, as 4=garbage, or NUMBER=MODE:PATH, as 3=collude:/tmp/gang; may be repeated
    #[arg(long = "node-fault", value_name = "NUMBER=MODE[:PATH]")]
    pub node_faults: Vec<String>,
    /// First of the ten ports that are used on 127.0.0.1
    #[arg(long, default_value_t = 8080, env = "INFERA_PORT_BASE", value_parser = clap::value_parser!(u16).range(1024..=65000))]
    pub port_base: u16,
    /// Send traces to this OTLP collector (gRPC), as http://127.0.0.1:4317
    #[arg(long, env = "INFERA_OTLP_ENDPOINT")]
    pub otlp: Option<String>,
    /// Keep the vectors of answers in this Qdrant (gRPC), as http://127.0.0.1:6334; default: in the database
    #[arg(long, env = "INFERA_QDRANT_URL")]
    pub qdrant: Option<String>,
    /// Set on the copy that --detach leaves behind
    #[arg(long, hide = true)]
    pub detached: bool,
}

#[derive(Debug, Clone, Args)]
pub struct DataArgs {
    /// Folder of the network's data
    #[arg(long, default_value = ".infera", env = "INFERA_DATA")]
    pub data: PathBuf,
}

#[derive(Debug, Args)]
pub struct KeysArgs {
    #[command(subcommand)]
    pub command: KeysCommand,
}

#[derive(Debug, Subcommand)]
pub enum KeysCommand {
    /// Print a new API key of an account
    Create {
        #[command(flatten)]
        data: DataArgs,
        #[arg(long, default_value = "demo")]
        account: String,
        /// Days until it expires
        #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u16).range(1..=3650))]
        days: u16,
    },
    /// Revoke an API key: the key itself, or its `jti`
    Revoke {
        #[command(flatten)]
        data: DataArgs,
        key: String,
    },
}

#[derive(Debug, Args)]
pub struct ModelsArgs {
    #[command(flatten)]
    pub data: DataArgs,
    /// A GGUF file, or a folder with safetensors, whose registry entry is computed and printed
    #[arg(long)]
    pub inspect: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The receipt document, as `GET /v1/receipts/{id}` answers it; `-` reads standard input
    #[arg(required_unless_present = "batches")]
    pub receipt: Option<PathBuf>,
    /// Check whole batches instead, from public data and the chain alone: 1..20, 5.. to the newest, or 7
    #[arg(long, visible_alias = "epoch", value_name = "FIRST..LAST", conflicts_with_all = ["receipt", "allocation"])]
    pub batches: Option<crate::epoch::Range>,
    /// Address of a gateway, or of a settlement service, for --batches; default: what runs on the data folder
    #[arg(long, requires = "batches")]
    pub settlement: Option<String>,
    /// The block of the contract's deployment, for --batches: the log is read from there on
    #[arg(long, requires = "batches", default_value_t = 0)]
    pub from_block: u64,
    /// JSON-RPC endpoint of the chain; default: the one that the manifest names
    #[arg(long)]
    pub rpc: Option<String>,
    /// The network's manifest; default: network.json in the data folder
    #[arg(long)]
    pub manifest: Option<PathBuf>,
    /// The model registry; default: models.json beside the manifest
    #[arg(long)]
    pub registry: Option<PathBuf>,
    #[command(flatten)]
    pub data: DataArgs,
    /// Print the checks as JSON
    #[arg(long)]
    pub json: bool,
    /// Also say why these nodes: the draw repeated, and what only the dispatcher's word stands for
    #[arg(long, conflicts_with = "json")]
    pub allocation: bool,
}

#[derive(Debug, Args)]
pub struct HistoryArgs {
    #[command(flatten)]
    pub data: DataArgs,
    /// At most this many, newest first
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=200))]
    pub limit: u16,
    /// Search for answers that mean something like this
    #[arg(long)]
    pub search: Option<String>,
}

#[derive(Debug, Args)]
pub struct DeadArgs {
    #[command(subcommand)]
    pub command: DeadCommand,
}

#[derive(Debug, Subcommand)]
pub enum DeadCommand {
    /// One line each: id, kind, the queue it failed in, size and reason
    List {
        #[command(flatten)]
        data: DataArgs,
    },
    /// Put them back into the queues they failed in, once the reason is gone
    Replay {
        #[command(flatten)]
        data: DataArgs,
        /// Ids as `infera dead list` prints them
        #[arg(required_unless_present = "all", conflicts_with = "all")]
        ids: Vec<uuid::Uuid>,
        /// Every one of them
        #[arg(long)]
        all: bool,
    },
}

#[derive(Debug, Args)]
pub struct HoldsArgs {
    #[command(subcommand)]
    pub command: HoldsCommand,
}

#[derive(Debug, Subcommand)]
pub enum HoldsCommand {
    /// One line each: request, account, amount and deadline
    List {
        #[command(flatten)]
        data: DataArgs,
    },
    /// Give an overdue hold back to its account; first try `infera dead replay`, which settles it as it should be
    Release {
        #[command(flatten)]
        data: DataArgs,
        request: uuid::Uuid,
    },
}

#[derive(Debug, Args)]
pub struct LedgerArgs {
    #[command(subcommand)]
    pub command: LedgerCommand,
}

#[derive(Debug, Subcommand)]
pub enum LedgerCommand {
    /// Check over all rows that every balance is the sum of its entries and that everything sums to zero; exit status 1 if not
    Audit {
        #[command(flatten)]
        data: DataArgs,
        /// Print the sums as JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, Args)]
pub struct OperatorArgs {
    #[command(subcommand)]
    pub command: OperatorCommand,
}

#[derive(Debug, Subcommand)]
pub enum OperatorCommand {
    /// Pending, verified, claimable and paid, and why something was not paid
    Earnings {
        #[command(flatten)]
        who: OperatorWho,
        /// Print it as JSON
        #[arg(long)]
        json: bool,
    },
    /// Bring what is claimable to the operator's address
    Claim {
        #[command(flatten)]
        who: OperatorWho,
    },
    /// Lock tokens, without which a network may give no work
    Stake {
        #[command(flatten)]
        who: OperatorWho,
        /// INFER, with up to six decimals
        amount: String,
        /// On a devnet: take the tokens that are missing from its treasury
        #[arg(long)]
        faucet: bool,
    },
    /// Report evidence that an operator signed two things for one slot: it loses half of its stake, a tenth of that is yours
    Slash {
        #[command(flatten)]
        who: OperatorWho,
        /// The evidence, as a dispatcher's /v1/contradictions/{id} gives it; `-` reads standard input
        evidence: PathBuf,
    },
    /// Begin to take stake out; without an amount: take what has come out
    Unstake {
        #[command(flatten)]
        who: OperatorWho,
        /// INFER, with up to six decimals
        amount: Option<String>,
    },
}

/// Which operator, on which network.
#[derive(Debug, Clone, Args)]
pub struct OperatorWho {
    #[command(flatten)]
    pub data: DataArgs,
    /// File of the operator's key; default: operator.key in .infera-node
    #[arg(long, conflicts_with = "node")]
    pub key: Option<PathBuf>,
    /// The operator of this node of the network in the data folder, counted from 1
    #[arg(long)]
    pub node: Option<u16>,
    /// JSON-RPC endpoint of the chain; default: the one that network.json in the data folder names
    #[arg(long)]
    pub rpc: Option<String>,
    /// Addresses of the contracts; default: contracts.json in the data folder
    #[arg(long)]
    pub contracts: Option<PathBuf>,
    /// Address of a gateway, or of the settlement service; default: what runs on the data folder
    #[arg(long)]
    pub settlement: Option<String>,
}

#[derive(Debug, Args)]
pub struct ConfigArgs {
    #[command(flatten)]
    pub data: DataArgs,
    /// gateway, settlement, mempool, dispatcher, verifier or explorer
    pub service: String,
}
