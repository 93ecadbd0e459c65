//! A client that leaves before its answer: nobody could read it, so the nodes need not go on.

use actix_web::web::Data;
use tracing::Instrument;
use uuid::Uuid;

use crate::app::App;

/// Cancels the request that it was armed with when it is dropped, unless [`LeaveGuard::stay`] was called.
pub(crate) struct LeaveGuard {
    app: Data<App>,
    account: String,
    /// The request that it cancels.
    armed: Option<Uuid>,
}

impl LeaveGuard {
    pub(crate) fn new(app: Data<App>, account: &str) -> Self {
        Self { app, account: account.to_owned(), armed: None }
    }

    /// From now on there may be a request to cancel. Not for a client that gave an `Idempotency-Key` and
    /// may come back.
    pub(crate) fn arm(&mut self, id: Uuid) {
        self.armed = self.app.config.cancel_on_disconnect.then_some(id);
    }

    /// The client is sent away before its answer, and cannot come back for it: cancels at once.
    pub(crate) async fn send_away(&mut self) {
        if let Some(id) = self.armed.take() {
            cancel(&self.app, id, &self.account).await;
        }
    }

    /// The client has its answer, or was told that there will be none.
    pub(crate) fn stay(&mut self) {
        self.armed = None;
    }
}

impl Drop for LeaveGuard {
    fn drop(&mut self) {
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let Some(id) = self.armed.take() else { return };
        let (app, account) = (self.app.clone(), std::mem::take(&mut self.account));
        runtime.spawn(async move { cancel(&app, id, &account).await }.in_current_span());
    }
}

async fn cancel(app: &App, id: Uuid, account: &str) {
    tracing::info!(%id, "nobody waits any more, cancelling");
    if let Err(error) = app.cancel(id, account).await {
        tracing::warn!(%error, %id, "cannot cancel; it ends by itself");
    }
}
