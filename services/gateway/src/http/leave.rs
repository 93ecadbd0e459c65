//! A client that leaves before its answer: nobody could read it, so the nodes need not go on.

use actix_web::web::Data;
use tracing::Instrument;
use uuid::Uuid;

use crate::app::App;

/// Cancels the requests that it was armed with when it is dropped, unless [`LeaveGuard::stay`] was called.
pub(crate) struct LeaveGuard {
    app: Data<App>,
    account: String,
    /// The requests that it cancels.
    armed: Vec<Uuid>,
}

impl LeaveGuard {
    pub(crate) fn new(app: Data<App>, account: &str) -> Self {
        Self { app, account: account.to_owned(), armed: Vec::new() }
    }

    /// From now on there may be a request to cancel. Not for a client that gave an `Idempotency-Key` and
    /// may come back.
    pub(crate) fn arm(&mut self, id: Uuid) {
        if self.app.config.cancel_on_disconnect {
            self.armed.push(id);
        }
    }

    /// The client is sent away before its answer, and cannot come back for it: cancels at once.
    pub(crate) async fn send_away(&mut self) {
        for id in std::mem::take(&mut self.armed) {
            cancel(&self.app, id, &self.account).await;
        }
    }

    /// This request is closed: there is nothing to cancel any more.
    pub(crate) fn closed(&mut self, id: Uuid) {
        self.armed.retain(|armed| *armed != id);
    }

    /// The client has its answer, or was told that there will be none.
    pub(crate) fn stay(&mut self) {
        self.armed.clear();
    }
}

impl Drop for LeaveGuard {
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let armed = std::mem::take(&mut self.armed);
        if armed.is_empty() {
            return;
        }
        let (app, account) = (self.app.clone(), std::mem::take(&mut self.account));
        let cancels = async move {
            for id in armed {
                cancel(&app, id, &account).await;
            }
        };
        runtime.spawn(cancels.in_current_span());
    }
}

async fn cancel(app: &App, id: Uuid, account: &str) {
    tracing::info!(%id, "nobody waits any more, cancelling");
    if let Err(error) = app.cancel(id, account).await {
        tracing::warn!(%error, %id, "cannot cancel; it ends by itself");
    }
}
