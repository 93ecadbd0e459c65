//! A wallet's money on the chain: deposits, vouchers, withdrawals.

use std::{fs, path::Path};

use infera_protocol::{identity::Domain, voucher::Voucher};
use infera_settlement::{
    chain::{Escrow, consumer::Consumer},
    ledger::MAX_MICRO,
};
use reqwest::Method;
use serde_json::{Value, json};

use super::{
    args::{AccountWho, ChainWho},
    field, of,
    session::Session,
};
use crate::{
    client::infer,
    contracts::Place,
    layout::write_secret,
    operator::{amount, shown},
    say,
};

/// A wallet at a network's contracts.
struct Wallet {
    consumer: Consumer,
    place: Place,
    session: Session,
}

impl Wallet {
    async fn open(who: &AccountWho, chain: &ChainWho) -> Result<Self, String> {
        let session = Session::open(who)?;
        let place = Place::find(session.data(), chain.contracts.as_deref(), chain.rpc.as_deref())?;
        let key = session.wallet_key()?;
        if place.gas(&place.connect(&key).await?).await? {
            say("the devnet gave money for gas");
        }
        let consumer =
            Consumer::connect(&place.rpc, &key, place.contracts).await.map_err(|e| e.to_string())?;
        Ok(Self { consumer, place, session })
    }

    async fn take_from_treasury(&self, missing: u128) -> Result<(), String> {
        self.place.treasury_gives(self.session.data(), self.consumer.address(), missing).await?;
        say(format_args!("the devnet's treasury gave {}", shown(missing)));
        Ok(())
    }

    async fn say_escrow(&self) -> Result<Escrow, String> {
        let escrow = self.consumer.account(self.consumer.address()).await.map_err(|e| e.to_string())?;
        say(format_args!(
            "in escrow {}, charged in all {}, of at most {} that vouchers on the chain allow",
            shown(escrow.escrow),
            shown(escrow.charged),
            shown(escrow.authorized)
        ));
        Ok(escrow)
    }
}

pub async fn deposit(who: &AccountWho, chain: &ChainWho, text: &str, faucet: bool) -> Result<(), String> {
    let wanted = amount(text)?;
    let wallet = Wallet::open(who, chain).await?;
    let me = wallet.consumer.address();
    let has = wallet.consumer.tokens(me).await.map_err(|e| e.to_string())?;
    if has < wanted {
        if !faucet {
            return Err(format!(
                "{me} has {}, {} are to be deposited; on a devnet --faucet takes what is missing from its treasury",
                shown(has),
                shown(wanted)
            ));
        }
        wallet.take_from_treasury(wanted - has).await?;
    }
    let tx = wallet.consumer.deposit(wanted).await.map_err(|e| e.to_string())?;
    say(format_args!("deposited {}, transaction {tx}", shown(wanted)));
    wallet.say_escrow().await?;
    say(
        "it may be spent once the block is final, as far as a voucher allows: `infera account voucher AMOUNT`",
    );
    Ok(())
}

pub async fn withdraw(
    who: &AccountWho,
    chain: &ChainWho,
    text: Option<&str>,
    cancel: bool,
) -> Result<(), String> {
    let wanted = text.map(amount).transpose()?;
    let wallet = Wallet::open(who, chain).await?;
    let consumer = &wallet.consumer;
    let (what, tx) = match wanted {
        Some(wanted) => {
            (format!("{} is on its way out", shown(wanted)), consumer.request_withdrawal(wanted).await)
        }
        None if cancel => {
            ("nothing is on its way out any more".to_owned(), consumer.cancel_withdrawal().await)
        }
        None => ("took out what had come out".to_owned(), consumer.withdraw().await),
    };
    say(format_args!("{what}, transaction {}", tx.map_err(|e| e.to_string())?));
    let escrow = wallet.say_escrow().await?;
    if escrow.withdrawal > 0 {
        let now = consumer.reader().time().await.map_err(|e| e.to_string())?;
        say(format_args!(
            "on its way out {}: `infera account withdraw` without an amount takes it in {} s",
            shown(escrow.withdrawal),
            escrow.withdrawable_secs.saturating_sub(now)
        ));
    }
    let tokens = consumer.tokens(consumer.address()).await.map_err(|e| e.to_string())?;
    say(format_args!("in the wallet {}", shown(tokens)));
    Ok(())
}

/// Signs and brings a voucher. What was signed before is known from the account's folder, not from the gateway, which
/// could otherwise have more signed than anybody meant.
pub async fn voucher(who: &AccountWho, text: &str, more: bool) -> Result<(), String> {
    let session = Session::open(who)?;
    // Nothing is signed that could not be brought.
    session.api_key()?;
    let wanted = u64::try_from(amount(text)?).map_err(|_| format!("the amount `{text}` is too large"))?;
    let wallet = session.wallet()?;
    let account = of(wallet.address());
    let manifest = session.manifest()?.ok_or_else(|| {
        format!(
            "there is no network.json in {}: name the network's folder with --data, a voucher is for its chain and contract",
            session.data().display()
        )
    })?;
    let domain = manifest.domain;
    let Domain { chain_id, contract } = domain;
    let path = session.folder().join(format!("voucher-{chain_id}-{contract}-{account}"));
    let cumulative_micro = total(last(&path)?, wanted, more)?;
    // The key is good, and this wallet's: another account's would take no voucher of it.
    let balance = session.ask(Method::GET, "/v1/balance", None).await?;
    let of_key = field(&balance, "account")?;
    if of_key.parse() != Ok(account) {
        return Err(format!(
            "the API key is of the account {of_key}, the voucher would be of the wallet {account}: sign in with this \
             wallet, or name the account's with --key"
        ));
    }
    let voucher = Voucher { account, cumulative_micro };
    let signature = voucher.sign(&domain, wallet.credential()).map_err(|e| e.to_string())?;
    // Before it leaves: what may have arrived counts as signed.
    write_secret(&path, cumulative_micro.to_string().as_bytes())
        .map_err(|e| format!("cannot write {}: {e}", path.display()))?;
    let body = json!({ "cumulative_micro": cumulative_micro.to_string(), "signature": signature });
    let answer = session.ask(Method::POST, "/v1/vouchers", Some(&body)).await.map_err(|e| {
        let amount = infer(cumulative_micro);
        let amount = amount.trim_end_matches(" INFER");
        format!(
            "{e}; the voucher counts as signed: bring it again with `infera account voucher {amount}`, without --more"
        )
    })?;
    let kept = kept(&answer, cumulative_micro)?;
    say(format_args!("{} may be charged in all to {account} on chain {chain_id}", infer(kept)));
    Ok(())
}

/// The highest voucher that the network has: `signed`, or one that was brought before.
pub(super) fn kept(answer: &Value, signed: u64) -> Result<u64, String> {
    let kept = answer.get("voucher_micro").and_then(Value::as_u64);
    match kept.ok_or("the gateway's answer has no `voucher_micro`")? {
        kept if kept >= signed => Ok(kept),
        kept => Err(format!(
            "the gateway says that it has a voucher of {}, {} was brought: bring it again",
            infer(kept),
            infer(signed)
        )),
    }
}

/// What the voucher says, after one of `last`.
fn total(last: Option<u64>, wanted: u64, more: bool) -> Result<u64, String> {
    let total = match (more, last) {
        (true, Some(last)) => Ok(last.saturating_add(wanted)),
        (true, None) => {
            Err("no voucher was signed in this folder yet: give the whole amount, without --more".into())
        }
        (false, Some(last)) if wanted < last => Err(format!(
            "a voucher of {} was signed before, and a lower one takes nothing back: withdraw what is in escrow instead",
            infer(last)
        )),
        (false, _) => Ok(wanted),
    }?;
    if total > MAX_MICRO.unsigned_abs() {
        return Err(format!("a voucher may say {} at most", infer(MAX_MICRO.unsigned_abs())));
    }
    Ok(total)
}

fn last(path: &Path) -> Result<Option<u64>, String> {
    match fs::read_to_string(path) {
        Ok(text) => text.trim().parse().map(Some).map_err(|_| format!("{} holds no amount", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(format!("cannot read {}: {error}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vouchers_only_grow() {
        assert_eq!(total(None, 5, false), Ok(5));
        assert_eq!(total(Some(5), 5, false), Ok(5));
        assert_eq!(total(Some(5), 7, false), Ok(7));
        assert_eq!(total(Some(5), 7, true), Ok(12));
        assert!(total(Some(5), 4, false).unwrap_err().contains("0.000005 INFER"));
        assert!(total(None, 4, true).unwrap_err().contains("--more"));
        let most = MAX_MICRO.unsigned_abs();
        assert_eq!(total(Some(most - 1), 1, true), Ok(most));
        for (last, wanted, more) in
            [(Some(most), 1, true), (Some(u64::MAX), 1, true), (None, most + 1, false)]
        {
            assert!(total(last, wanted, more).unwrap_err().contains("1000000000000.000000 INFER at most"));
        }
    }
}
