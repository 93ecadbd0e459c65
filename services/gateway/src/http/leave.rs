//! A client that leaves before its answer: nobody could read it, so the nodes need not go on.

use actix_web::web::Data;
use tracing::Instrument;
use uuid::Uuid;

use crate::app::App;

/// Cancels the request when it is dropped, unless [`LeaveGuard::stay`] was called.
pub(crate) struct LeaveGuard {
    app: Data<App>,
    id: Uuid,
    account: String,
    armed: bool,
}

impl LeaveGuard {
    /// `repeatable`: the client gave an `Idempotency-Key` and may come back, so nothing is cancelled.
    pub(crate) fn new(app: Data<App>, id: Uuid, account: &str, repeatable: bool) -> Self {
        let armed = app.config.cancel_on_disconnect && !repeatable;
        Self { app, id, account: account.to_owned(), armed }
    }

    /// The client is sent away before its answer, and cannot come back for it: cancels at once.
    pub(crate) async fn send_away(&mut self) {
        if std::mem::take(&mut self.armed) {
            cancel(&self.app, self.id, &self.account).await;
        }
    }

    /// The client has its answer, or was told that there will be none.
    pub(crate) fn stay(&mut self) {
        self.armed = false;
    }
}

impl Drop for LeaveGuard {
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if !self.armed {
            return;
        }
        let (app, id, account) = (self.app.clone(), self.id, std::mem::take(&mut self.account));
        runtime.spawn(async move { cancel(&app, id, &account).await }.in_current_span());
    }
}

async fn cancel(app: &App, id: Uuid, account: &str) {
    tracing::info!(%id, "nobody waits any more, cancelling");
    if let Err(error) = app.cancel(id, account).await {
        tracing::warn!(%error, %id, "cannot cancel; it ends by itself");
    }
}
