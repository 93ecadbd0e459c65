//! Deltas on their way to gateways: one batch per gateway replica and tick.

use std::collections::HashMap;

use infera_bus::{Bus, Envelope};
use infera_wire::topology::keys;
use infera_wire::{Message, v1};
use uuid::Uuid;

/// Entries after which a batch leaves before its tick.
const MAX_ENTRIES: usize = 512;

/// Batches that wait for their tick.
#[derive(Default)]
pub struct Deltas {
    waiting: HashMap<String, v1::DeltaBatch>,
}

impl Deltas {
    /// Adds an entry. The first tokens of a slot do not wait.
    pub fn push(&mut self, bus: &Bus, reply_to: &str, entry: v1::DeltaEntry) {
        let first = entry.offset == 0;
        let batch = self.waiting.entry(reply_to.to_owned()).or_default();
        batch.entries.push(entry);
        let leaves = first || batch.entries.len() >= MAX_ENTRIES;
        if let Some(batch) = leaves.then(|| self.waiting.remove(reply_to)).flatten() {
            send(bus, reply_to, &batch);
        }
    }

    /// Sends all that waits.
    pub fn flush(&mut self, bus: &Bus) {
        for (reply_to, batch) in self.waiting.drain() {
            send(bus, &reply_to, &batch);
        }
    }
}

fn send(bus: &Bus, reply_to: &str, batch: &v1::DeltaBatch) {
    let envelope = Envelope::new(Uuid::now_v7(), "deltas", batch.encode_to_vec());
    bus.publish_transient(&keys::deltas(reply_to), envelope);
}
