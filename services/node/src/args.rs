//! What a node's operator may choose.

use std::path::PathBuf;

use crate::{
    engine::{Class, DeviceChoice},
    fault::Fault,
};

/// The command line of `infera node`.
#[derive(Debug, Clone, clap::Parser)]
pub struct Args {
    /// Folder of the node's keys and its journal of commitments
    #[arg(long, default_value = ".infera-node")]
    pub data: PathBuf,
    /// The dispatcher, as ws://host:port
    #[arg(long, default_value = "ws://127.0.0.1:8083")]
    pub dispatcher: String,
    /// The network's manifest: which chain and contract this node works for
    #[arg(long, default_value = ".infera/network.json")]
    pub manifest: PathBuf,
    /// The model to serve: a GGUF file, or a folder with config.json, tokenizer.json and safetensors
    #[arg(long)]
    pub model: PathBuf,
    /// What computes: auto, cpu, cuda or cuda:N; auto takes the first GPU, if there is one and the class allows it
    #[arg(long, default_value = "auto", env = "INFERA_NODE__DEVICE")]
    pub device: DeviceChoice,
    /// Numerics class: exact or fast on a processor, bf16 on a GPU; default: bf16 on a GPU, otherwise exact
    #[arg(long, value_parser = class)]
    pub class: Option<Class>,
    /// Requests at once; at most 64 in the classes exact and fast
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub slots: u16,
    /// Others' answers to check at once, beside the requests: work that is paid too
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    pub scorers: u8,
    /// Threads; more than free cores makes it slower
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..))]
    pub threads: u8,
    /// Most tokens of a request, prompt and answer together
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u32).range(1..=131_072))]
    pub max_context: u32,
    /// Tokens whose keys and values are kept, of running requests and of earlier prompts; default: max-context for each slot and scorer
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=16_777_216))]
    pub cache_tokens: Option<u32>,
    /// Most memory that the model may need, MiB; default: no limit
    #[arg(long)]
    pub memory_limit_mib: Option<u64>,
    /// The operator's secp256k1 key, 32 bytes as 0x hex; default: operator.key in the data folder, made if missing
    #[arg(long)]
    pub operator_key: Option<PathBuf>,
    /// Misbehave, to test the network
    #[arg(long, value_enum)]
    pub fault: Option<Fault>,
    /// The model that --fault other-model and wrong-weights load
    #[arg(long, requires = "fault")]
    pub fault_model: Option<PathBuf>,
    /// The folder through which nodes of one owner cheat together
    #[arg(long, requires = "fault")]
    pub fault_share: Option<PathBuf>,
    /// Send traces to this OTLP collector (gRPC), as http://127.0.0.1:4317
    #[arg(long)]
    pub otlp: Option<String>,
    /// Which log lines are written
    #[arg(long, default_value = "info", env = "INFERA_NODE__LOG_FILTER")]
    pub log_filter: String,
    /// Write logs as text, not as JSON
    #[arg(long)]
    pub log_text: bool,
}

impl Args {
    /// The class that is computed: as asked for, or, once the device is chosen, the device's.
    pub(crate) fn class(&self) -> Class {
        self.class.unwrap_or(Class::Exact)
    }
}

fn class(text: &str) -> Result<Class, String> {
    match text {
        "exact" => Ok(Class::Exact),
        "fast" => Ok(Class::Fast),
        "bf16" => Ok(Class::Bf16),
        other => Err(format!("there is no class `{other}`: choose exact, fast or bf16")),
    }
}
