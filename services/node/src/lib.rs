//! The GPU worker: connects out to a dispatcher, proves who it is, computes what it is leased, and earns.
//!
//! ```text
//!  dispatcher ──lease──> session ──job──> engine (own threads)
//!             <─deltas──         <─tokens─
//!             <─commit── after the journal has it on disk
//!             ──reveal?─> the journal's bytes
//!             ──answers to check──> engine ──signed scores──>
//!             ──ranges?─> slices of the model's files
//! ```
//!
//! Promises:
//! - One answer per slot (request, attempt): the commitment is on disk before it is sent, and after a crash or a lost
//!   connection the same bytes are sent again. A node that keeps this can't be caught equivocating.
//! - One process per data folder: a second one would answer the same slots.
//! - A lease that can't be served is declined, signed, at once.
//! - The weights that it declares are the ones that it has: ranges of the file are proved whenever the dispatcher asks.
//! - Others' answers are scored beside its own work, in places of their own.
//! - A node whose engine has ended declines what it holds and ends with an error, for its supervisor to see.
//! - Gone at once when its owner wants the machine: a pause (SIGUSR1, or `infera pause`) ends all jobs within one step of
//!   the engine, gives weights and cache back, answers what is committed already, and leaves the dispatcher; SIGUSR2
//!   (`infera resume`) loads the model and connects again.
//! - No inbound port: the one connection goes out, so home routers are no matter.
//! - Keys are made on this machine and stay on it, readable by their owner alone.

mod args;
pub mod engine;
mod fault;
mod grammar;
mod identity;
mod journal;
mod pack;
mod pause;
mod session;
mod slots;
mod weights;

use std::{
    fs::{File, TryLockError},
    io::{self, Write},
    path::Path,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use infera_protocol::registry::Manifest;
use infera_runtime::{CancellationToken, shutdown, telemetry};

use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

pub use args::Args;
pub use fault::Fault;
pub use pause::{pause, resume};
pub use weights::{measure, release};

use engine::{Device, DeviceChoice, Engine, EngineConfig};
use fault::Faults;
use identity::Identity;
use slots::Slots;
use weights::Weights;

/// Pause before the first reconnect, and the longest one.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// How long the declines of a broken engine's jobs may take to go out.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Why a node does not run, one sentence each.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read {what} {path}: {reason}")]
    File { what: &'static str, path: String, reason: String },
    #[error("the engine does not start: {0}")]
    Engine(#[from] engine::EngineError),
    #[error("keys: {0}")]
    Identity(String),
    #[error("the journal of commitments: {0}")]
    Journal(io::Error),
    #[error("{data} is in use by another node: end that one, or choose another folder with --data")]
    InUse { data: String },
    #[error("no node runs in {data}: name its folder with --data")]
    NotRunning { data: String },
    #[error("cannot start: {0}")]
    Start(String),
}

/// Runs a node until a signal; 0 after a clean drain.
pub fn main(args: Args) -> ExitCode {
    shutdown::end_with_supervisor();
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| e.to_string())
        .and_then(|runtime| runtime.block_on(process(args)));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("infera-node: {message}");
            ExitCode::FAILURE
        }
    }
}

async fn process(args: Args) -> Result<(), String> {
    let guard = telemetry::init("infera-node", args.otlp.as_deref(), &args.log_filter, !args.log_text)
        .map_err(|e| e.to_string())?;
    let pauses = pause::on_signals().map_err(|e| format!("signals: {e}"))?;
    let result = run(args, shutdown::on_signals(), pauses).await;
    guard.shutdown().await;
    result.map_err(|e| e.to_string())
}

/// Runs a node until `shutdown`, then drains: no new leases, open slots are committed and revealed. While `pauses` is true
/// it neither computes nor holds a model.
///
/// # Errors
/// [`Error`]; a dispatcher that is away is none.
pub async fn run(
    mut args: Args,
    shutdown: CancellationToken,
    pauses: watch::Receiver<bool>,
) -> Result<(), Error> {
    fault::check(&args)?;
    let (choice, class) = (args.device, args.class);
    let (device, class) = blocking(move || engine::choose(choice, class)).await??;
    (args.device, args.class) = (DeviceChoice::Only(device), Some(class));
    let manifest = read_manifest(&args.manifest)?;
    let _lock = lock(&args.data)?;
    let mut identity = Identity::load_or_create(&args, &manifest)?;
    if args.fault.is_some_and(Fault::forges_release) {
        identity.forge_release();
    }
    let config = config(&args);
    let (for_weights, for_engine, loaded) = (args.clone(), args.clone(), config.clone());
    let weights = blocking(move || read_weights(&for_weights)).await??;
    let engine = blocking(move || Engine::start(config)).await??;
    let end_tokens = end_tokens(&args, &engine)?;
    let faults = blocking(move || faults(&for_engine, &loaded)).await??;
    let journal = journal::Journal::open(&args.data.join("slots")).map_err(Error::Journal)?;
    tracing::info!(
        node = %identity.node(),
        operator = %identity.operator(),
        model = %weights.root(),
        class = args.class().name(),
        %device,
        slots = args.slots,
        "node is ready"
    );
    let slots = Slots::new(
        engine,
        identity,
        journal,
        slots::Setting { weights, end_tokens, scorers: usize::from(args.scorers), faults },
    );
    let slots = Arc::new(slots.map_err(Error::Journal)?);
    tokio::select! {
        () = serve(&args, &slots, &shutdown, pauses) => {
            tracing::info!("node has ended");
            Ok(())
        }
        () = broken(&slots) => Err(engine::EngineError::Thread("it has ended; start the node again".into()).into()),
    }
}

fn config(args: &Args) -> EngineConfig {
    EngineConfig {
        model_path: loaded(args).to_owned(),
        class: args.class(),
        device: device(args),
        slots: usize::from(args.slots),
        scorers: usize::from(args.scorers),
        threads: usize::from(args.threads),
        max_context: args.max_context as usize,
        cache_tokens: args.cache_tokens.map(|tokens| tokens as usize),
        memory_limit: args.memory_limit_mib.map(|mib| mib.saturating_mul(1024 * 1024)),
        rounding: args.fault.and_then(Fault::rounding),
    }
}

/// What computes, once it is chosen.
fn device(args: &Args) -> Device {
    match args.device {
        DeviceChoice::Only(device) => device,
        DeviceChoice::Auto => Device::Cpu,
    }
}

/// The file that computes: the declared one, unless a fault says otherwise.
fn loaded(args: &Args) -> &Path {
    match (args.fault, &args.fault_model) {
        (Some(fault), Some(other)) if fault.loads_another() => other,
        _ => &args.model,
    }
}

/// The declared model's; a fault's other model may be one without a chat template, which has its own.
fn end_tokens(args: &Args, engine: &Engine) -> Result<Vec<u32>, Error> {
    if args.fault.is_some_and(Fault::loads_another) {
        return Ok(engine.tokenizer().end_tokens().to_vec());
    }
    Ok(engine::prompt(&config(args))?.end_tokens().to_vec())
}

fn read_weights(args: &Args) -> Result<Weights, Error> {
    let read = |path: &Path| {
        Weights::read(path).map_err(|e| Error::File {
            what: "the model",
            path: path.display().to_string(),
            reason: e.to_string(),
        })
    };
    let declared = read(&args.model)?;
    match args.fault {
        Some(Fault::WrongWeights) => Ok(read(loaded(args))?.declared_as(declared.root())),
        _ => Ok(declared),
    }
}

fn faults(args: &Args, loaded: &EngineConfig) -> Result<Option<Faults>, Error> {
    if args.fault.is_none() {
        return Ok(None);
    }
    let declared = EngineConfig { model_path: args.model.clone(), ..loaded.clone() };
    Faults::new(args, &engine::prompt(&declared)?, loaded)
}

/// One session after the other, until `shutdown`.
async fn serve(
    args: &Args,
    slots: &Arc<Slots>,
    shutdown: &CancellationToken,
    mut pauses: watch::Receiver<bool>,
) {
    let mut wait = FIRST_PAUSE;
    while !shutdown.is_cancelled() {
        if *pauses.borrow_and_update() {
            slots.pause().await;
            tokio::select! {
                () = pause::until(&mut pauses, false) => {}
                () = shutdown.cancelled() => {}
            }
            continue;
        }
        // Loading takes its time, above all while the owner still uses the device.
        let mut watched = pauses.clone();
        tokio::select! {
            () = slots.resume() => {}
            () = pause::until(&mut watched, true) => continue,
            () = shutdown.cancelled() => {
                // Whoever waits for the model waits no longer.
                slots.pause().await;
                continue;
            }
        }
        let stop = shutdown.child_token();
        let mut watched = pauses.clone();
        let paused = async {
            pause::until(&mut watched, true).await;
            slots.pause().await;
            stop.cancel();
            std::future::pending::<()>().await;
        };
        let welcomed = tokio::select! {
            welcomed = session::run(args, slots, &stop) => welcomed,
            () = paused => false,
        };
        if welcomed {
            wait = FIRST_PAUSE;
        }
        // Jitter keeps a crowd of nodes from coming back in one moment.
        let jittered = wait.mul_f64(rand::random_range(0.5..1.5));
        tokio::select! {
            () = tokio::time::sleep(jittered) => {}
            () = shutdown.cancelled() => {}
        }
        wait = (wait * 2).min(LONGEST_PAUSE);
    }
}

/// Returns once the engine has ended and its jobs are declined.
async fn broken(slots: &Slots) {
    slots.engine_ended().cancelled().await;
    tracing::error!("the engine has ended");
    let until = Instant::now() + LAST_WORDS;
    while (slots.generating() > 0 || slots.queued() > 0) && Instant::now() < until {
        sleep(Duration::from_millis(20)).await;
    }
}

/// Takes the data folder for this process, for as long as the file is open.
fn lock(data: &Path) -> Result<File, Error> {
    let path = data.join("node.lock");
    let failed = |e: io::Error| Error::Start(format!("cannot lock {}: {e}", path.display()));
    std::fs::create_dir_all(data).map_err(failed)?;
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {
            // For `infera pause`.
            file.set_len(0).map_err(failed)?;
            (&file).write_all(std::process::id().to_string().as_bytes()).map_err(failed)?;
            Ok(file)
        }
        Err(TryLockError::WouldBlock) => Err(Error::InUse { data: data.display().to_string() }),
        Err(TryLockError::Error(error)) => Err(failed(error)),
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::Start(e.to_string()))
}

fn read_manifest(path: &Path) -> Result<Manifest, Error> {
    let failed = |reason: String| Error::File {
        what: "the network's manifest",
        path: path.display().to_string(),
        reason,
    };
    let text = std::fs::read(path).map_err(|e| failed(e.to_string()))?;
    serde_json::from_slice(&text).map_err(|e| failed(e.to_string()))
}
