//! `Admission`: the one actor that decides who is next. It holds the set and the latest slot reports in
//! memory; the database has the set too, and what is decided counts once it is there.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::fut::wrap_future;
use actix::{Actor, ActorContext, ActorFutureExt, AsyncContext, Context, Handler, Message, MessageResult};
use infera_bus::outbox::Relay;
use infera_runtime::{CancellationToken, clock, planned};
use infera_wire::convert::CloseReason;
use sea_orm::{DatabaseConnection, DbErr, TransactionTrait};
use uuid::Uuid;

use crate::domain::{Command, Effect, ModelSummary, State};
use crate::metrics::Metrics;
use crate::store;

const TICK: Duration = Duration::from_millis(200);
const COUNT_EVERY: Duration = Duration::from_secs(1);
/// Waits between tries at a database that is away.
const RETRY: Duration = Duration::from_millis(500);

/// What the actor works with.
pub struct Tools {
    pub db: DatabaseConnection,
    pub relay: Relay,
    pub metrics: Metrics,
    pub shutdown: CancellationToken,
}

/// The actor.
pub struct Admission {
    state: State,
    tools: Arc<Tools>,
    /// What is told of the set, and when it was summed up.
    summaries: Arc<Vec<ModelSummary>>,
    summed_up: Option<Instant>,
    /// Old offers without a dispatcher that were logged.
    unheld: BTreeSet<Uuid>,
}

/// Something that the database has, or a report.
#[derive(Message)]
#[rtype(result = "()")]
pub struct Noted(pub Command);

/// Asks for what is in the set, as of at most a second ago.
#[derive(Message)]
#[rtype(result = "Arc<Vec<ModelSummary>>")]
pub struct Summaries;

impl Admission {
    pub fn new(state: State, tools: Tools) -> Self {
        Self {
            state,
            tools: Arc::new(tools),
            summaries: Arc::default(),
            summed_up: None,
            unheld: BTreeSet::new(),
        }
    }

    fn run(&mut self, command: Command, ctx: &mut Context<Self>) {
        match self.state.apply(command, clock::now_ms()) {
            Ok(effects) => {
                for effect in effects {
                    self.execute(effect, ctx);
                }
            }
            Err(rejection) => tracing::debug!(%rejection, "nothing to do"),
        }
    }

    fn execute(&mut self, effect: Effect, ctx: &mut Context<Self>) {
        match effect {
            Effect::Offer { requests } => {
                let tools = self.tools.clone();
                let stored = async move {
                    let gone = persist(&tools, || offer_all(&tools.db, &requests)).await?;
                    planned::pause("mempool.offer.after_commit").await;
                    tools.relay.wake();
                    tools.metrics.offers.inc_by((requests.len() - gone.len()) as u64);
                    Some((requests, gone))
                };
                ctx.spawn(wrap_future(stored).map(|stored, act: &mut Self, ctx| {
                    let Some((requests, gone)) = stored else { return };
                    act.run(Command::OffersStored { requests }, ctx);
                    act.forget(gone, ctx);
                }));
            }
            Effect::Close { requests, reason } => {
                let tools = self.tools.clone();
                let stored = async move {
                    let gone = persist(&tools, || close_all(&tools.db, &requests, reason)).await?;
                    tools.relay.wake();
                    let asked = (requests.len() - gone.len()) as u64;
                    tools.metrics.closes.with_label_values(&[reason.as_str()]).inc_by(asked);
                    Some(gone)
                };
                ctx.spawn(wrap_future(stored).map(|gone, act: &mut Self, ctx| {
                    act.forget(gone.unwrap_or_default(), ctx);
                }));
            }
        }
    }

    /// These have no row any more: their verdict was processed while they were read.
    fn forget(&mut self, gone: Vec<Uuid>, ctx: &mut Context<Self>) {
        for request in gone {
            self.run(Command::Closed { request }, ctx);
        }
    }

    /// Looks at the whole set at most once in `COUNT_EVERY`, however often it is asked.
    fn summaries(&mut self) -> Arc<Vec<ModelSummary>> {
        if self.summed_up.is_none_or(|at| at.elapsed() >= COUNT_EVERY) {
            self.summaries = Arc::new(self.state.summaries());
            self.summed_up = Some(Instant::now());
        }
        self.summaries.clone()
    }

    fn count(&mut self) {
        let (mut pending, mut offered, mut closing) = (0, 0, 0);
        for summary in self.summaries().iter() {
            pending += summary.pending;
            offered += summary.offered;
            closing += summary.closing;
        }
        for (stage, count) in [("pending", pending), ("offered", offered), ("closing", closing)] {
            let count = i64::try_from(count).unwrap_or(i64::MAX);
            self.tools.metrics.requests.with_label_values(&[stage]).set(count);
        }
        let unheld: BTreeSet<Uuid> = self.state.unheld(clock::now_ms()).into_iter().collect();
        self.tools.metrics.unheld.set(i64::try_from(unheld.len()).unwrap_or(i64::MAX));
        for request in unheld.difference(&self.unheld) {
            tracing::warn!(%request, "no dispatcher reports this offer; it waits on the bus");
        }
        self.unheld = unheld;
    }
}

/// Offers those that still wait; returns those that have no row any more.
async fn offer_all(db: &DatabaseConnection, requests: &[Uuid]) -> Result<Vec<Uuid>, DbErr> {
    let tx = db.begin().await?;
    let mut gone = Vec::new();
    for request in requests {
        if !store::offer(&tx, *request).await? {
            gone.push(*request);
        }
    }
    tx.commit().await?;
    Ok(gone)
}

/// Asks for the close of those that are there; returns the others.
async fn close_all(
    db: &DatabaseConnection,
    requests: &[Uuid],
    reason: CloseReason,
) -> Result<Vec<Uuid>, DbErr> {
    let tx = db.begin().await?;
    let mut gone = Vec::new();
    for request in requests {
        if !store::close(&tx, *request, reason).await? {
            gone.push(*request);
        }
    }
    tx.commit().await?;
    Ok(gone)
}

/// Tries until the database answers; `None` once the service ends.
async fn persist<T, F>(tools: &Tools, write: impl Fn() -> F) -> Option<T>
where
    F: Future<Output = Result<T, DbErr>>,
{
    loop {
        match write().await {
            Ok(value) => return Some(value),
            Err(error) => tracing::warn!(%error, "database is not reachable, trying again"),
        }
        tokio::select! {
            () = tools.shutdown.cancelled() => return None,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

impl Actor for Admission {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.set_mailbox_capacity(1024);
        ctx.run_interval(TICK, |act, ctx| act.run(Command::Tick, ctx));
        ctx.run_interval(COUNT_EVERY, |act, _| act.count());
        let shutdown = self.tools.shutdown.clone();
        let stop = wrap_future(async move { shutdown.cancelled().await });
        ctx.spawn(stop.map(|(), _: &mut Self, ctx: &mut Context<Self>| ctx.stop()));
    }
}

impl Handler<Noted> for Admission {
    type Result = ();

    fn handle(&mut self, noted: Noted, ctx: &mut Self::Context) {
        self.run(noted.0, ctx);
    }
}

impl Handler<Summaries> for Admission {
    type Result = MessageResult<Summaries>;

    fn handle(&mut self, _: Summaries, _: &mut Self::Context) -> Self::Result {
        MessageResult(self.summaries())
    }
}
