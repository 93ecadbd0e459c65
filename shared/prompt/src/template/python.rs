//! Python's methods and Jinja's filters and tests, as far as chat templates use them.

use std::sync::Arc;

use minijinja::value::{Kwargs, Rest, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters, tests};

use super::json;
use super::ops::{Budget, invalid};

/// `str.isspace` of one character: Unicode's white space and the four separators of ASCII.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

fn strip(name: &str, text: &str, set: Option<&str>) -> String {
    let drop = |c: char| set.map_or_else(|| is_space(c), |set| set.contains(c));
    match name {
        "lstrip" => text.trim_start_matches(drop),
        "rstrip" => text.trim_end_matches(drop),
        _ => text.trim_matches(drop),
    }
    .to_owned()
}

fn capitalize(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |c| {
        c.to_uppercase().chain(letters.as_str().to_lowercase().chars()).collect()
    })
}

fn title(text: &str) -> String {
    let mut inside = false;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        inside = c.is_alphabetic();
    }
    out
}

fn replace(budget: &Budget, text: &str, from: &str, to: &str, most: Option<i64>) -> Result<Value, Error> {
    let most = most.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX);
    let found = text.matches(from).count().min(most);
    budget.take(text.len().saturating_add(found.saturating_mul(to.len())))?;
    Ok(Value::from(text.replacen(from, to, most)))
}

/// `str.split` and `str.rsplit`.
fn split(budget: &Budget, text: &str, args: &[Value], from_the_end: bool) -> Result<Value, Error> {
    let (by, most, named): (Option<Value>, Option<i64>, Kwargs) = from_args(args)?;
    let by = named.get::<Option<Value>>("sep")?.or(by).filter(|v| !v.is_none());
    let most = named.get::<Option<i64>>("maxsplit")?.or(most);
    named.assert_all_used()?;
    let most = most.and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX - 1);
    budget.take(text.len())?;
    let pieces: Vec<&str> = match by.as_ref().map(|by| by.as_str().ok_or(by)) {
        Some(Err(by)) => return Err(invalid(format!("cannot split by {}", by.kind()))),
        Some(Ok("")) => return Err(invalid("empty separator")),
        Some(Ok(by)) if from_the_end => {
            let mut pieces: Vec<&str> = text.rsplitn(most + 1, by).collect();
            pieces.reverse();
            pieces
        }
        Some(Ok(by)) => text.splitn(most + 1, by).collect(),
        None if most < usize::MAX - 1 => return Err(invalid("split with maxsplit needs a separator")),
        None => text.split(is_space).filter(|piece| !piece.is_empty()).collect(),
    };
    budget.count(pieces.len())?;
    Ok(pieces.into_iter().map(Value::from).collect())
}

fn join(budget: &Budget, items: &Value, by: &str) -> Result<Value, Error> {
    let mut out = String::new();
    for (i, item) in items.try_iter()?.enumerate() {
        let text = budget.text(&item)?;
        budget.take(text.len() + by.len())?;
        if i > 0 {
            out.push_str(by);
        }
        out.push_str(&text);
    }
    Ok(Value::from(out))
}

fn prefixes(value: &Value) -> Result<Vec<Value>, Error> {
    match value.kind() {
        ValueKind::String => Ok(vec![value.clone()]),
        ValueKind::Seq => Ok(value.try_iter()?.collect()),
        kind => Err(invalid(format!("startswith and endswith take text, not {kind}"))),
    }
}

fn of_text(budget: &Budget, text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    // Upper case can be three times as long as what it is made of.
    budget.take(text.len().saturating_mul(3))?;
    Ok(match name {
        "strip" | "lstrip" | "rstrip" => {
            let (set,): (Option<&str>,) = from_args(args)?;
            Value::from(strip(name, text, set))
        }
        "startswith" | "endswith" => {
            let (with,): (Value,) = from_args(args)?;
            let holds = |p: &Value| {
                p.as_str()
                    .is_some_and(|p| if name == "endswith" { text.ends_with(p) } else { text.starts_with(p) })
            };
            Value::from(prefixes(&with)?.iter().any(holds))
        }
        "upper" => Value::from(text.to_uppercase()),
        "lower" => Value::from(text.to_lowercase()),
        "capitalize" => Value::from(capitalize(text)),
        "title" => Value::from(title(text)),
        "replace" => {
            let (from, to, most): (&str, &str, Option<i64>) = from_args(args)?;
            replace(budget, text, from, to, most)?
        }
        "split" => split(budget, text, args, false)?,
        "rsplit" => split(budget, text, args, true)?,
        "join" => join(budget, &from_args::<(Value,)>(args)?.0, text)?,
        "find" => {
            let (what,): (&str,) = from_args(args)?;
            let at = text.find(what).map(|at| text[..at].chars().count());
            Value::from(at.and_then(|n| i64::try_from(n).ok()).unwrap_or(-1))
        }
        "count" => Value::from(text.matches(from_args::<(&str,)>(args)?.0).count()),
        "isdigit" => Value::from(!text.is_empty() && text.chars().all(char::is_numeric)),
        "isspace" => Value::from(!text.is_empty() && text.chars().all(is_space)),
        _ => return Err(Error::new(ErrorKind::UnknownMethod, format!("text has no method {name}"))),
    })
}

fn method(budget: &Budget, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let Some(text) = value.as_str() {
        return of_text(budget, text, name, args);
    }
    let map = value.kind() == ValueKind::Map;
    match name {
        "get" if map => {
            let (key, default): (&Value, Option<&Value>) = from_args(args)?;
            let found = value.get_item(key)?;
            Ok(if found.is_undefined() { default.cloned().unwrap_or_else(|| Value::from(())) } else { found })
        }
        "keys" if map => Ok(Value::from(budget.items(value)?)),
        "items" if map => pairs(budget, value),
        "values" if map => budget
            .items(value)?
            .iter()
            .map(|key| value.get_item(key))
            .collect::<Result<Vec<_>, _>>()
            .map(Value::from),
        _ => Err(Error::new(ErrorKind::UnknownMethod, format!("{} has no method {name}", value.kind()))),
    }
}

fn pairs(budget: &Budget, map: &Value) -> Result<Value, Error> {
    if map.kind() != ValueKind::Map {
        return Err(invalid(format!("items takes a map, not {}", map.kind())));
    }
    let keys = budget.items(map)?;
    budget.count(keys.len() * 2)?;
    let pair = |key: Value| Ok(Value::from(vec![key.clone(), map.get_item(&key)?]));
    keys.into_iter().map(pair).collect::<Result<Vec<_>, Error>>().map(Value::from)
}

/// The filters whose result is one of the values given, a number or a short text: minijinja's own.
fn plain_filters(environment: &mut Environment<'_>) {
    environment.add_filter("length", filters::length);
    environment.add_filter("count", filters::length);
    environment.add_filter("default", filters::default);
    environment.add_filter("d", filters::default);
    environment.add_filter("first", filters::first);
    environment.add_filter("last", filters::last);
    environment.add_filter("int", filters::int);
    environment.add_filter("float", filters::float);
    environment.add_filter("abs", filters::abs);
    environment.add_filter("round", filters::round);
    environment.add_filter("min", filters::min);
    environment.add_filter("max", filters::max);
    environment.add_filter("safe", |value: Value| value);
}

fn text_filters(environment: &mut Environment<'_>, budget: &Arc<Budget>) {
    for name in ["upper", "lower", "capitalize", "title"] {
        let b = budget.clone();
        environment.add_filter(name, move |value: Value| of_text(&b, &b.text(&value)?, name, &[]));
    }
    let b = budget.clone();
    environment.add_filter("trim", move |value: Value, set: Option<String>| {
        let text = b.text(&value)?;
        b.take(text.len())?;
        Ok::<_, Error>(strip("strip", &text, set.as_deref()))
    });
    let b = budget.clone();
    environment.add_filter("string", move |value: Value| {
        let text = b.text(&value)?;
        b.take(text.len())?;
        Ok::<_, Error>(text.into_owned())
    });
    let b = budget.clone();
    environment.add_filter("replace", move |value: Value, from: String, to: String, most: Option<i64>| {
        replace(&b, &b.text(&value)?, &from, &to, most)
    });
    let b = budget.clone();
    environment.add_filter("join", move |value: Value, by: Option<String>| {
        join(&b, &value, by.as_deref().unwrap_or(""))
    });
    let b = budget.clone();
    environment.add_filter("tojson", move |value: Value, indent: Option<usize>, named: Kwargs| {
        json::dump(&b, &value, indent, &named)
    });
}

fn list_filters(environment: &mut Environment<'_>, budget: &Arc<Budget>) {
    let b = budget.clone();
    environment.add_filter("list", move |value: Value| {
        if let Some(text) = value.as_str() {
            b.count(text.len())?;
        }
        b.items(&value).map(Value::from)
    });
    let b = budget.clone();
    environment.add_filter("items", move |value: Value| pairs(&b, &value));
    let b = budget.clone();
    environment.add_filter("reverse", move |value: Value| {
        let mut items = b.items(&value)?;
        items.reverse();
        Ok::<_, Error>(Value::from(items))
    });
    for (name, attribute, keep) in [
        ("select", false, true),
        ("reject", false, false),
        ("selectattr", true, true),
        ("rejectattr", true, false),
    ] {
        let b = budget.clone();
        environment.add_filter(name, move |state: &State<'_, '_>, value: Value, args: Rest<Value>| {
            select(&b, state, &value, &args, attribute, keep)
        });
    }
    let b = budget.clone();
    environment.add_filter("map", move |state: &State<'_, '_>, value: Value, args: Rest<Value>| {
        let (filter, named): (Option<String>, Kwargs) = from_args(&args)?;
        let attribute: Option<String> = named.get("attribute")?;
        named.assert_all_used()?;
        let items = b.items(&value)?;
        let one = |item: Value| match (&attribute, &filter) {
            (Some(attribute), None) => item.get_attr(attribute),
            (None, Some(filter)) => state.apply_filter(filter, &[item]),
            _ => Err(invalid("map takes a filter or attribute=")),
        };
        items.into_iter().map(one).collect::<Result<Vec<_>, _>>().map(Value::from)
    });
}

fn select(
    budget: &Budget,
    state: &State<'_, '_>,
    value: &Value,
    args: &[Value],
    attribute: bool,
    keep: bool,
) -> Result<Value, Error> {
    let wrong = || {
        invalid("select and reject take the name of a test, selectattr and rejectattr an attribute before it")
    };
    let (attribute, args) = match args {
        [name, rest @ ..] if attribute => (Some(name.as_str().ok_or_else(wrong)?), rest),
        rest if !attribute => (None, rest),
        _ => return Err(wrong()),
    };
    let mut out = Vec::new();
    for item in budget.items(value)? {
        let subject = attribute.map_or_else(|| Ok(item.clone()), |name| item.get_attr(name))?;
        let holds = match args {
            [] => subject.is_true(),
            [test, rest @ ..] => {
                let mut all = vec![subject];
                all.extend_from_slice(rest);
                state.perform_test(test.as_str().ok_or_else(wrong)?, &all)?
            }
        };
        if holds == keep {
            out.push(item);
        }
    }
    Ok(Value::from(out))
}

fn add_tests(environment: &mut Environment<'_>) {
    environment.add_test("defined", tests::is_defined);
    environment.add_test("undefined", tests::is_undefined);
    environment.add_test("none", tests::is_none);
    environment.add_test("boolean", tests::is_boolean);
    environment.add_test("true", tests::is_true);
    environment.add_test("false", tests::is_false);
    environment.add_test("number", tests::is_number);
    environment.add_test("integer", tests::is_integer);
    environment.add_test("float", tests::is_float);
    environment.add_test("string", tests::is_string);
    environment.add_test("mapping", tests::is_mapping);
    // To Python a text is a sequence, and so is a map.
    let sequence = |v: &Value| matches!(v.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map);
    environment.add_test("sequence", sequence);
    environment.add_test("iterable", move |v: &Value| sequence(v) || v.kind() == ValueKind::Iterable);
    environment.add_test("odd", tests::is_odd);
    environment.add_test("even", tests::is_even);
    environment.add_test("divisibleby", tests::is_divisibleby);
    environment.add_test("sameas", tests::is_sameas);
    environment.add_test("in", tests::is_in);
    for name in ["eq", "equalto", "=="] {
        environment.add_test(name, tests::is_eq);
    }
    for name in ["ne", "!="] {
        environment.add_test(name, tests::is_ne);
    }
    for name in ["lt", "lessthan", "<"] {
        environment.add_test(name, tests::is_lt);
    }
    for name in ["gt", "greaterthan", ">"] {
        environment.add_test(name, tests::is_gt);
    }
    for name in ["le", "<="] {
        environment.add_test(name, tests::is_le);
    }
    for name in ["ge", ">="] {
        environment.add_test(name, tests::is_ge);
    }
}

/// Gives `environment` everything of this module.
pub(super) fn register(environment: &mut Environment<'_>, budget: &Arc<Budget>) {
    plain_filters(environment);
    text_filters(environment, budget);
    list_filters(environment, budget);
    add_tests(environment);
    let b = budget.clone();
    environment.set_unknown_method_callback(move |_, value, name, args| method(&b, value, name, args));
    environment.add_function("range", minijinja::functions::range);
    environment
        .add_function("raise_exception", |message: String| -> Result<Value, Error> { Err(invalid(message)) });
}
