//! Queueing reward roots, so that operators can claim. A root goes along with its batch where that is possible, or by
//! itself when no batch follows.

use infera_runtime::clock;

use super::{Batcher, StepError, Work};
use crate::{
    chain::{Call, Head, Link, Port, Rewards},
    store::{
        batches::{self, BatchRow},
        txs::{Job, Purpose},
        unsigned,
    },
};

/// Roots that wait at a time at most, of the contract's 128: the rest is room for a person.
const MOST_PENDING: u64 = 100;

/// Why a reward root is not queued now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waits {
    /// The newest root holds as much.
    NothingNew,
    /// The last one is too new: roots that wait are few, so that frequent ones starve nobody.
    TooSoon { until_secs: u64 },
    /// The queue is full.
    QueueFull { until_secs: u64 },
    /// The pool is smaller than what was earned: somebody must fund it.
    PoolTooSmall { funded: u128 },
    /// The chain knows more than this database: an old backup was restored.
    TotalBelowChains { chains: u128 },
}

/// Whether a root with this `total` in batch `sequence` may be queued now.
///
/// # Errors
/// What it waits for.
pub fn may_queue(rewards: &Rewards, sequence: u64, total: u128, interval_secs: u32) -> Result<(), Waits> {
    if sequence <= rewards.last_sequence || total == rewards.last_total {
        return Err(Waits::NothingNew);
    }
    if total < rewards.last_total {
        return Err(Waits::TotalBelowChains { chains: rewards.last_total });
    }
    if total > rewards.funded {
        return Err(Waits::PoolTooSmall { funded: rewards.funded });
    }
    if rewards.full_until_secs > 0 {
        return Err(Waits::QueueFull { until_secs: rewards.full_until_secs });
    }
    let interval = u64::from(interval_secs).max(rewards.challenge_delay_secs.div_ceil(MOST_PENDING));
    let until_secs = rewards.last_queued_secs.saturating_add(interval);
    if rewards.last_id > 0 && rewards.now_secs < until_secs {
        return Err(Waits::TooSoon { until_secs });
    }
    Ok(())
}

impl<L: Link<Port: Clone>> Batcher<L> {
    /// The total with which the batch's rewards can be queued now, after charges have brought `charged` into the pool.
    pub(super) async fn queueable(
        &self,
        port: &L::Port,
        row: &BatchRow,
        charged: u128,
    ) -> Result<Option<u128>, StepError> {
        let total = u128::from(unsigned("batches.reward_total_micro", row.reward_total_micro)?);
        if !self.config.rewards.queue || total == 0 {
            return Ok(None);
        }
        let sequence = unsigned("batches.sequence", row.sequence)?;
        let mut rewards = port.rewards().await?;
        rewards.funded = rewards.funded.saturating_add(charged);
        // A chain without transactions makes no blocks, and its time stands still.
        let wall_secs = u64::try_from(clock::now_ms() / 1_000).unwrap_or(0);
        rewards.now_secs = rewards.now_secs.max(wall_secs);
        let waits = may_queue(&rewards, sequence, total, self.config.rewards.interval_secs);
        self.metrics.unqueued(total.saturating_sub(rewards.last_total));
        match waits {
            Ok(()) => Ok(Some(total)),
            Err(Waits::NothingNew | Waits::TooSoon { .. }) => Ok(None),
            Err(waits) => {
                tracing::warn!(sequence, total, ?waits, "rewards are not queued for now");
                Ok(None)
            }
        }
    }

    /// Queues the newest batch's rewards by themselves; whether that is on its way.
    pub(super) async fn queue(
        &self,
        port: &L::Port,
        work: &mut Work<L::Port>,
        head: &Head,
    ) -> Result<bool, StepError> {
        let Some(row) = batches::find(&self.db, head.sequence).await? else { return Ok(false) };
        let Some(total) = self.queueable(port, &row, 0).await? else { return Ok(false) };
        let job = Job { sequence: head.sequence, purpose: Purpose::Queue };
        let call = Call::Queue { batch: batches::batch(&row)?, total };
        self.drive(port, work, job, &[call]).await?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_waits_for_what_the_contract_asks() {
        let rewards = Rewards {
            last_id: 3,
            last_sequence: 7,
            last_total: 100,
            last_queued_secs: 1_000,
            funded: 500,
            challenge_delay_secs: 30,
            full_until_secs: 0,
            now_secs: 1_010,
        };
        let may = |sequence, total| may_queue(&rewards, sequence, total, 10);
        assert_eq!(may(8, 101), Ok(()));
        assert_eq!(may(8, 500), Ok(()));
        assert_eq!(may(7, 200), Err(Waits::NothingNew), "one root a batch");
        assert_eq!(may(8, 100), Err(Waits::NothingNew));
        assert_eq!(may(8, 99), Err(Waits::TotalBelowChains { chains: 100 }));
        assert_eq!(may(8, 501), Err(Waits::PoolTooSmall { funded: 500 }));
        assert_eq!(may_queue(&rewards, 8, 101, 11), Err(Waits::TooSoon { until_secs: 1_011 }));
        let full = Rewards { full_until_secs: 1_050, ..rewards };
        assert_eq!(may_queue(&full, 8, 101, 0), Err(Waits::QueueFull { until_secs: 1_050 }));
        // A day's delay leaves room for one root every quarter of an hour, whatever is configured.
        let slow = Rewards { challenge_delay_secs: 86_400, ..rewards };
        assert_eq!(may_queue(&slow, 8, 101, 0), Err(Waits::TooSoon { until_secs: 1_864 }));
        assert_eq!(may_queue(&Rewards { last_id: 0, ..Rewards::default() }, 1, 0, 9), Err(Waits::NothingNew));
    }
}
