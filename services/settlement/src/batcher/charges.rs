//! Charging escrows on the chain: cumulative amounts, so that the same charge again takes nothing. They go along with a
//! batch, or by themselves when no batch follows: more accounts than one transaction takes, a deposit that came late.

use futures::{StreamExt, TryStreamExt, stream};
use infera_protocol::bytes::Address;
use sea_orm::DbErr;

use super::{Batcher, StepError, Work};
use crate::{
    chain::{Call, ChainError, Charge, Escrow, Head, Link, Port},
    escrow::follow::AT_A_TIME,
    store::{
        escrows::{self, EscrowRow},
        txs::{Job, Purpose},
        unsigned, vouchers,
    },
};

/// Charges of one transaction.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Charges {
    pub list: Vec<Charge>,
    /// What they bring into the pool, as far as it is known, 10^-6 INFER.
    pub micro: u128,
}

impl Charges {
    fn add(&mut self, charge: Charge, known: &Escrow) {
        self.micro += charge.cumulative.saturating_sub(known.charged).min(known.escrow);
        self.list.push(charge);
    }

    /// The call, for batch `sequence`; `None` if nobody owes anything.
    pub fn call(&self, sequence: u64) -> Option<Call> {
        (!self.list.is_empty()).then(|| Call::Charge { sequence, charges: self.list.clone() })
    }
}

impl<L: Link<Port: Clone>> Batcher<L> {
    /// What escrows owe, as the database knows the chain: a charge that is on its way may be among them again.
    pub(super) async fn charges(&self) -> Result<Charges, StepError> {
        let mut charges = Charges::default();
        for row in self.due().await? {
            let known = known(&row)?;
            if let Some(charge) = self.charge_of(&row, known.charged).await? {
                charges.add(charge, &known);
            }
        }
        Ok(charges)
    }

    async fn due(&self) -> Result<Vec<EscrowRow>, DbErr> {
        let escrow = &self.config.escrow;
        // Small sums that wait are exposed too: at the cap they would keep everybody's requests out.
        let min_micro = if self.exposure.is_reached() { 0 } else { escrow.charge_min_micro };
        escrows::due(&self.db, escrow.charges, min_micro).await
    }

    /// What an account owes, as far as its owner signed for it: beyond that the contract refuses the whole transaction, and
    /// everybody else's charges with it. `None` if no more than `charged` may be taken.
    async fn charge_of(&self, row: &EscrowRow, charged: u128) -> Result<Option<Charge>, StepError> {
        let account: Address = escrows::address(row)?;
        let owed = u128::from(unsigned("escrows.owed_micro", row.owed_micro)?);
        let seen = u128::from(unsigned("escrows.authorized_micro", row.authorized_micro)?);
        let mut cumulative = owed.min(seen);
        let mut voucher = None;
        if seen < owed
            && let Some(kept) = vouchers::find(&self.db, &account).await?
            && u128::from(kept.cumulative_micro) > seen
        {
            let signed = u128::from(kept.cumulative_micro);
            cumulative = owed.min(signed);
            voucher = Some((signed, kept.signature));
        }
        Ok((cumulative > charged).then_some(Charge { account: account.0.into(), cumulative, voucher }))
    }

    /// Charges by themselves what no batch charged, for the newest batch; whether that is on its way.
    pub(super) async fn charge(
        &self,
        port: &L::Port,
        work: &mut Work<L::Port>,
        head: &Head,
    ) -> Result<bool, StepError> {
        let due = self.due().await?;
        if due.is_empty() || head.sequence == 0 {
            return Ok(false);
        }
        // What was charged a moment ago may not be known yet: the chain itself says.
        let newest = port.newest().await?;
        let mut charges = Charges::default();
        let asking = due.into_iter().map(async |row| {
            let account = escrows::address(&row)?;
            let now = port.escrow(account.0.into(), newest.number).await?;
            Ok::<_, StepError>((row, now))
        });
        let states: Vec<(EscrowRow, Escrow)> = stream::iter(asking).buffered(AT_A_TIME).try_collect().await?;
        for (row, now) in states {
            if now.escrow > 0
                && let Some(charge) = self.charge_of(&row, now.charged).await?
            {
                charges.add(charge, &now);
            }
        }
        let Some(call) = charges.call(head.sequence) else { return Ok(false) };
        let job = Job { sequence: head.sequence, purpose: Purpose::Charge };
        match self.drive(port, work, job, &[call]).await {
            Ok(()) => Ok(true),
            // It must not keep rewards and batches waiting.
            Err(StepError::Chain(ChainError::Reverted { reason, .. })) => {
                tracing::error!(sequence = head.sequence, reason, "escrows are not charged for now");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }
}

fn known(row: &EscrowRow) -> Result<Escrow, DbErr> {
    Ok(Escrow {
        escrow: unsigned("escrows.escrow_micro", escrows::escrow_at_head(row))?.into(),
        charged: unsigned("escrows.charged_micro", escrows::charged_at_head(row))?.into(),
        ..Escrow::default()
    })
}
