//! Waits until what was started answers, and says so meanwhile.

use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::time::sleep;

use crate::{
    cli::UpArgs,
    client::get,
    layout::{Layout, SERVICES},
    say,
    services::Ports,
};

/// How long services and nodes may take until they answer.
const READY: Duration = Duration::from_secs(120);
/// Steps that take longer say so.
const SLOW: Duration = Duration::from_secs(2);

/// Waits until every service is ready and every node has its session.
pub(super) async fn ready(layout: &Layout, args: &UpArgs, ports: Ports) -> Result<(), String> {
    let services = async {
        for service in SERVICES {
            let url = format!("{}/readyz", ports.url(service));
            wait(|| async { get(&url, &[]).await.map(|_| ()) }).await.map_err(|last| {
                format!(
                    "{service} is not ready after {} s: {last}; see {}",
                    READY.as_secs(),
                    layout.root().join("logs").display()
                )
            })?;
        }
        Ok::<(), String>(())
    };
    step("the services", services).await?;
    let wanted = usize::from(args.nodes);
    let url = format!("{}/v1/nodes", ports.url("dispatcher"));
    let nodes = async {
        wait(|| async {
            let answer = get(&url, &[]).await?;
            let connected = answer.get("nodes").and_then(Value::as_array).map_or(0, Vec::len);
            if connected >= wanted {
                Ok(())
            } else {
                Err(format!("{connected} of {wanted} nodes are connected"))
            }
        })
        .await
        .map_err(|last| {
            format!("{last} after {} s; see {}", READY.as_secs(), layout.root().join("logs").display())
        })
    };
    step(&format!("{wanted} nodes of {wanted} operators"), nodes).await
}

async fn wait<F, Fut>(mut probe: F) -> Result<(), String>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<(), String>>,
{
    let deadline = Instant::now() + READY;
    loop {
        match probe().await {
            Ok(()) => return Ok(()),
            Err(last) if Instant::now() > deadline => return Err(last),
            Err(_) => sleep(Duration::from_millis(100)).await,
        }
    }
}

/// Says what is being done once it takes long, and how long it took.
pub(super) async fn step<T>(what: &str, work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let began = Instant::now();
    tokio::pin!(work);
    say(format_args!("up: starting {what}"));
    loop {
        tokio::select! {
            done = &mut work => {
                if done.is_ok() && began.elapsed() >= SLOW {
                    say(format_args!("up: {what}: ready after {:.1} s", began.elapsed().as_secs_f32()));
                }
                return done;
            }
            () = sleep(SLOW) => say(format_args!("up: {what} ... {} s", began.elapsed().as_secs())),
        }
    }
}
