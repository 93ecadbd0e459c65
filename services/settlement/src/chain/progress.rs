//! How far a log was read: each final block once. Should the chain be reorganised beyond them, all of it again.

use super::{B256, ChainError, ChainReader};

/// Blocks that one look into the log covers: endpoints limit it, many to 10,000.
pub(crate) const LOG_RANGE: u64 = 5_000;

/// How far a log was read.
#[derive(Debug)]
pub(crate) struct Progress {
    from_block: u64,
    /// The last block that was read.
    last: Option<(u64, B256)>,
}

/// Blocks to be read next, both ends included.
#[derive(Debug)]
pub(crate) struct Range {
    pub from: u64,
    pub to: u64,
    hash: B256,
}

impl Progress {
    /// Nothing is read yet.
    pub fn new(from_block: u64) -> Self {
        Self { from_block, last: None }
    }

    /// The last block that was read.
    pub fn last(&self) -> Option<u64> {
        self.last.map(|(block, _)| block)
    }

    /// The next block to be read.
    pub fn next_block(&self) -> u64 {
        self.last().map_or(self.from_block, |block| block + 1)
    }

    /// Whether the chain has another block in the last one's place: what was read counts no more, and it begins anew.
    ///
    /// # Errors
    /// [`ChainError`]; `Unreachable` also if the endpoint lags behind what was read.
    pub async fn begins_anew(&mut self, reader: &ChainReader) -> Result<bool, ChainError> {
        let Some((block, hash)) = self.last else { return Ok(false) };
        if reader.existing_hash(block).await? == hash {
            return Ok(false);
        }
        tracing::warn!(block, "the chain was reorganised beyond finality: its log is read again");
        self.last = None;
        Ok(true)
    }

    /// What comes next up to the final block `until`.
    ///
    /// # Errors
    /// [`ChainError`]; `Unreachable` also if the endpoint lags behind `until`.
    pub async fn next(&self, reader: &ChainReader, until: u64) -> Result<Option<Range>, ChainError> {
        let from = self.next_block();
        if from > until {
            return Ok(None);
        }
        let to = from.saturating_add(LOG_RANGE - 1).min(until);
        // Before the log: should the blocks be replaced in between, the next reading finds out.
        let hash = reader.existing_hash(to).await?;
        Ok(Some(Range { from, to, hash }))
    }

    /// These blocks are read.
    pub fn read(&mut self, range: &Range) {
        self.last = Some((range.to, range.hash));
    }
}
