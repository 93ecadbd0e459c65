//! `infera dead`: messages that could not be processed, and another try for them. Shows headers only, never content.

use std::{path::Path, process::ExitCode};

use infera_bus::{Bus, Topology, dead, outbox};
use infera_runtime::{
    config::{Common, ConfigError},
    db,
};
use sea_orm::DatabaseConnection;
use uuid::Uuid;

use crate::{
    cli::{DeadArgs, DeadCommand},
    layout::Layout,
    say,
};

/// Services whose databases have an outbox, and so may keep dead letters.
const WITH_OUTBOX: [&str; 4] = ["gateway", "settlement", "mempool", "verifier"];
/// Dead letters of one place that are looked at.
const MOST: u16 = 1_000;

pub fn dead(args: &DeadArgs) -> Result<ExitCode, String> {
    let data = match &args.command {
        DeadCommand::List { data } | DeadCommand::Replay { data, .. } => data,
    };
    let layout = Layout::existing(&data.data)?;
    let found = crate::block_on(async {
        let places = Places::open(&layout).await?;
        let found = match &args.command {
            DeadCommand::List { .. } => places.list().await,
            DeadCommand::Replay { ids, all, .. } => places.replay(ids, *all).await,
        };
        places.close().await;
        found
    })??;
    match &args.command {
        DeadCommand::List { .. } if found == 0 => say("no dead letters"),
        DeadCommand::List { .. } => {}
        DeadCommand::Replay { ids, .. } if found < ids.len() => {
            return Err(format!("{found} of {} were there: see `infera dead list`", ids.len()));
        }
        DeadCommand::Replay { .. } => {
            say(format_args!("{found} put back; what fails again is in `infera dead list` again"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Where dead letters are: on the broker, and in the databases of those who published them.
struct Places {
    bus: Option<Bus>,
    databases: Vec<(&'static str, DatabaseConnection)>,
}

impl Places {
    async fn open(layout: &Layout) -> Result<Self, String> {
        let mut bus = None;
        let mut databases = Vec::new();
        for service in WITH_OUTBOX {
            let common = common(service, &layout.config(service)).map_err(|e| e.to_string())?;
            if bus.is_none() && !common.bus_url.is_empty() {
                let connected = Bus::rabbit(common.bus_url.expose(), &common.bus_prefix)
                    .await
                    .map_err(|e| e.to_string())?;
                connected.declare(&Topology::network()).await.map_err(|e| e.to_string())?;
                bus = Some(connected);
            }
            let url = common.database_url.expose();
            if url.starts_with("sqlite:") && !layout.database(service).exists() {
                continue;
            }
            let schema = common.database_schema.as_deref();
            databases.push((service, db::connect(url, schema).await.map_err(|e| e.to_string())?));
        }
        Ok(Self { bus, databases })
    }

    async fn list(&self) -> Result<usize, String> {
        let mut found = 0;
        let mut line = |id: Uuid, kind: &str, queue: &str, bytes: usize, reason: &str| {
            found += 1;
            // A reason may quote what a stranger sent.
            let reason: String = reason.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
            say(format_args!("{id}  {kind}  in {queue}  {bytes} bytes  {reason}"));
        };
        if let Some(bus) = &self.bus {
            for letter in dead::hold(bus, MOST).await.map_err(|e| e.to_string())?.letters {
                let envelope = &letter.envelope;
                let (queue, reason) =
                    letter.dead_letter.as_ref().map_or(("", ""), |d| (&d.origin_queue, &d.reason));
                line(envelope.id, &envelope.kind, queue, envelope.body.len(), reason);
            }
        }
        for (_, db) in &self.databases {
            for (envelope, dead) in outbox::buried(db, MOST.into()).await.map_err(|e| e.to_string())? {
                line(envelope.id, &envelope.kind, &dead.origin_queue, envelope.body.len(), &dead.reason);
            }
        }
        Ok(found)
    }

    /// A message may have failed in several queues: it goes back to each.
    async fn replay(&self, ids: &[Uuid], all: bool) -> Result<usize, String> {
        let mut replayed = Vec::new();
        let wanted = |id: &Uuid| all || ids.contains(id);
        if let Some(bus) = &self.bus {
            for letter in dead::hold(bus, MOST).await.map_err(|e| e.to_string())?.letters {
                let id = letter.envelope.id;
                if wanted(&id) {
                    dead::replay(bus, letter).await.map_err(|e| format!("{id}: {e}"))?;
                    replayed.push(id);
                }
            }
        }
        for (_, db) in &self.databases {
            for (envelope, dead) in outbox::buried(db, MOST.into()).await.map_err(|e| e.to_string())? {
                if wanted(&envelope.id)
                    && outbox::replay(db, envelope.id, &dead.origin_queue).await.map_err(|e| e.to_string())?
                {
                    replayed.push(envelope.id);
                }
            }
        }
        replayed.sort();
        replayed.dedup();
        Ok(replayed.len())
    }

    async fn close(self) {
        if let Some(bus) = self.bus {
            bus.close().await;
        }
        for (service, db) in self.databases {
            if let Err(error) = db.close().await {
                tracing::debug!(%error, service, "database not closed");
            }
        }
    }
}

fn common(service: &str, file: &Path) -> Result<Common, ConfigError> {
    let file = Some(file);
    Ok(match service {
        "gateway" => infera_gateway::Config::load(file)?.common,
        "settlement" => infera_settlement::Config::load(file)?.common,
        "mempool" => infera_mempool::Config::load(file)?.common,
        _ => infera_verifier::Config::load(file)?.common,
    })
}
