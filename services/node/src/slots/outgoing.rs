//! The way to the dispatcher while there is one.

use infera_runtime::CancellationToken;
use infera_wire::v1;
use parking_lot::Mutex;
use tokio::sync::mpsc;

/// Frames of streams that may wait for the wire; further ones are dropped, they are not durable.
const DELTAS: usize = 192;
/// Further frames that may wait. Whoever lets more pile up is disconnected: nothing but deltas is ever dropped while
/// the session goes on.
const ANSWERS: usize = 4_096;
/// Work whose answer may be a large frame is not begun while so many frames wait.
const LARGE: usize = 32;

/// The queue of one session, in the order of what happened: a commitment never overtakes its stream.
struct Queue {
    frames: mpsc::Sender<v1::FromNode>,
    /// Cancelled when the queue is full.
    behind: CancellationToken,
}

/// The queue of the present session, if there is one.
#[derive(Default)]
pub struct Outgoing(Mutex<Option<Queue>>);

impl Queue {
    fn queued(&self) -> usize {
        self.frames.max_capacity() - self.frames.capacity()
    }
}

impl Outgoing {
    /// A new session, with room for `more` frames beside the usual ones. Returns what is to be written, and what is
    /// cancelled when too much of it waits.
    pub fn open(&self, more: usize) -> (mpsc::Receiver<v1::FromNode>, CancellationToken) {
        let (frames, receiver) = mpsc::channel(DELTAS + ANSWERS + more);
        let behind = CancellationToken::new();
        *self.0.lock() = Some(Queue { frames, behind: behind.clone() });
        (receiver, behind)
    }

    pub fn close(&self) {
        *self.0.lock() = None;
    }

    /// Frames that wait for the wire.
    pub fn queued(&self) -> usize {
        self.0.lock().as_ref().map_or(0, Queue::queued)
    }

    /// Whether a large frame would find the dispatcher reading.
    pub fn takes_large(&self) -> bool {
        self.queued() < LARGE
    }

    /// Without a connection a frame is dropped: promises are sent again with the next one, and a lease that is not
    /// answered ends with the session. A queue that is full ends the session for the same reason.
    pub fn send(&self, message: v1::from_node::Message) {
        let queue = self.0.lock();
        let Some(queue) = &*queue else { return };
        if matches!(message, v1::from_node::Message::Deltas(_)) && queue.queued() >= DELTAS {
            tracing::debug!("a part of a stream found no room");
            return;
        }
        if queue.frames.try_send(v1::FromNode { message: Some(message) }).is_err() {
            queue.behind.cancel();
        }
    }
}
