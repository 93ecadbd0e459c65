//! What people read of a gateway's answers.

use infera_protocol::rfc3339;
use serde_json::Value;

use crate::{client::infer, say};

pub fn json(value: &Value) -> Result<(), String> {
    say(serde_json::to_string_pretty(value).map_err(|e| e.to_string())?);
    Ok(())
}

pub fn balance(balance: &Value) -> Result<(), String> {
    say(format_args!("account    {}", text(balance, "account")));
    row(balance, "available_micro", "available", "new requests may hold this");
    row(balance, "held_micro", "held", "by open requests");
    row(balance, "charged_micro", "charged", "for verified answers, in all");
    let Some(escrow) = balance.get("escrow").filter(|escrow| escrow.is_object()) else { return Ok(()) };
    row(escrow, "escrow_micro", "escrow", "on the chain, final");
    row(escrow, "withdrawal_micro", "leaving", "was asked to be withdrawn");
    row(escrow, "voucher_micro", "voucher", "may be charged in all");
    row(escrow, "charged_on_chain_micro", "on chain", "charged there already");
    Ok(())
}

fn row(of: &Value, name: &str, label: &str, why: &str) {
    if let Some(micro) = of.get(name) {
        say(format_args!("{label:10} {:>26}  {why}", amount(micro)));
    }
}

pub fn keys(list: &Value) -> Result<(), String> {
    for key in rows(list)? {
        let scopes: Vec<&str> = key
            .get("scopes")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let marks = [("sign_in", "sign-in"), ("current", "this one")];
        let marks: Vec<&str> = marks
            .iter()
            .filter(|(name, _)| key.get(*name).and_then(Value::as_bool).unwrap_or(false))
            .map(|(_, mark)| *mark)
            .collect();
        say(format_args!(
            "{}  until {}  {:20} {:16} {}",
            text(key, "jti"),
            time(key.get("expires_at").and_then(Value::as_i64).map(|secs| secs.saturating_mul(1_000))),
            plain(text(key, "name")),
            scopes.join(","),
            marks.join(", ")
        ));
    }
    Ok(())
}

pub fn usage(usage: &Value) -> Result<(), String> {
    let list = rows(usage)?;
    for request in list {
        let count = |name: &str| request.get(name).and_then(Value::as_u64).unwrap_or(0);
        say(format_args!(
            "{}  {}  {:10} {:24} {:>6} + {:>5} tokens  {:>22}",
            time(request.get("submitted_at_ms").and_then(Value::as_i64)),
            text(request, "request_id"),
            text(request, "state"),
            text(request, "model"),
            count("prompt_tokens"),
            count("completion_tokens"),
            amount(request.get("charged_micro").unwrap_or(&Value::Null)),
        ));
    }
    if list.is_empty() {
        say("no requests in this period");
    }
    if let Some(totals) = usage.get("totals") {
        let requests = totals.get("requests").and_then(Value::as_u64).unwrap_or(0);
        let charged = amount(totals.get("charged_micro").unwrap_or(&Value::Null));
        say(format_args!("{requests} requests in the period, charged {charged}"));
    }
    more(usage);
    Ok(())
}

pub fn statement(statement: &Value) -> Result<(), String> {
    say(format_args!("{:24}  {:10} {:>26} {:>26}  request", "time", "kind", "amount", "balance"));
    for entry in rows(statement)? {
        let of = |name: &str| amount(entry.get(name).unwrap_or(&Value::Null));
        say(format_args!(
            "{:24}  {:10} {:>26} {:>26}  {}",
            time(entry.get("at_ms").and_then(Value::as_i64)),
            text(entry, "kind"),
            of("amount_micro"),
            of("balance_micro"),
            text(entry, "request_id"),
        ));
    }
    more(statement);
    Ok(())
}

fn more(page: &Value) {
    if let Some(cursor) = page.get("next_cursor").and_then(Value::as_str) {
        say(format_args!("there are more: --cursor {cursor}"));
    }
}

pub fn quote(quote: &Value) -> Result<(), String> {
    let count = |name: &str| quote.get(name).and_then(Value::as_u64).unwrap_or(0);
    say(format_args!(
        "{}: {} tokens of prompt and up to {} of answer, on {} nodes, at {} a token and node",
        text(quote, "model"),
        count("prompt_tokens"),
        count("max_tokens"),
        count("replicas"),
        infer(count("price_micro")),
    ));
    say(format_args!("at most {}; what is not generated is not charged", infer(count("hold_micro"))));
    Ok(())
}

fn rows(list: &Value) -> Result<&Vec<Value>, String> {
    list.get("data").and_then(Value::as_array).ok_or_else(|| "the gateway's answer has no `data`".to_owned())
}

fn text<'a>(of: &'a Value, name: &str) -> &'a str {
    of.get(name).and_then(Value::as_str).unwrap_or("-")
}

/// Without what could move a terminal's cursor.
fn plain(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).collect()
}

fn time(ms: Option<i64>) -> String {
    ms.map_or_else(|| "-".to_owned(), rfc3339::format_ms)
}

/// Micro-INFER as a number or as its digits.
fn amount(micro: &Value) -> String {
    let number = micro.as_i64().or_else(|| micro.as_str()?.parse().ok());
    match number {
        Some(micro) if micro < 0 => format!("-{}", infer(micro.unsigned_abs())),
        Some(micro) => infer(micro.unsigned_abs()),
        None => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn amounts_are_infer() {
        for (micro, shown) in [
            (json!(1_500_000), "1.500000 INFER"),
            (json!("7"), "0.000007 INFER"),
            (json!(-1), "-0.000001 INFER"),
            (json!(null), "-"),
            (json!("x"), "-"),
        ] {
            assert_eq!(amount(&micro), shown);
        }
    }

    #[test]
    fn names_cannot_move_the_cursor() {
        assert_eq!(plain("a\u{1b}[2Jb\u{7}"), "a[2Jb");
    }
}
