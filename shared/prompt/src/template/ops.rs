//! Operators that count what they build, with Python's meaning.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use minijinja::value::{Kwargs, Object, ObjectRepr, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Value};

use super::guard;

/// How deep lists and maps may nest.
const MAX_DEPTH: usize = 16;
/// Most values in lists and maps that one rendering may build.
const MAX_VALUES: u64 = 2_000_000;

pub(super) fn invalid(message: impl Into<Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

/// What one rendering may still build.
#[derive(Debug)]
pub(super) struct Budget {
    limit: u64,
    bytes: AtomicU64,
    values: AtomicU64,
}

fn subtract(left: &AtomicU64, n: usize) -> bool {
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(n as u64)).is_ok()
}

impl Budget {
    pub(super) fn new(bytes: u64) -> Self {
        Self { limit: bytes, bytes: AtomicU64::new(bytes), values: AtomicU64::new(MAX_VALUES) }
    }

    /// Counts `n` bytes of text before they are built.
    pub(super) fn take(&self, n: usize) -> Result<(), Error> {
        if subtract(&self.bytes, n) {
            return Ok(());
        }
        Err(invalid(format!("the template builds more than {} bytes of text", self.limit)))
    }

    /// Counts `n` list items before they are built.
    pub(super) fn count(&self, n: usize) -> Result<(), Error> {
        if subtract(&self.values, n) {
            return Ok(());
        }
        Err(invalid(format!("the template builds more than {MAX_VALUES} values")))
    }

    /// `str(value)`.
    pub(super) fn text<'v>(&self, value: &'v Value) -> Result<Cow<'v, str>, Error> {
        if let Some(text) = value.as_str() {
            return Ok(Cow::Borrowed(text));
        }
        Ok(match value.kind() {
            ValueKind::Undefined => Cow::Borrowed(""),
            ValueKind::None => Cow::Borrowed("None"),
            ValueKind::Bool => Cow::Borrowed(if value.is_true() { "True" } else { "False" }),
            ValueKind::Number => Cow::Owned(value.to_string()),
            _ => {
                let mut out = String::new();
                self.repr(value, &mut out, 0)?;
                Cow::Owned(out)
            }
        })
    }

    fn push(&self, out: &mut String, text: &str) -> Result<(), Error> {
        self.take(text.len())?;
        out.push_str(text);
        Ok(())
    }

    /// `repr(value)`.
    fn repr(&self, value: &Value, out: &mut String, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(invalid("a value is nested too deeply"));
        }
        if let Some(text) = value.as_str() {
            return self.push(out, &quoted(text));
        }
        match kind(value) {
            ValueKind::Map => {
                self.push(out, "{")?;
                for (i, key) in value.try_iter()?.enumerate() {
                    self.push(out, if i == 0 { "" } else { ", " })?;
                    self.repr(&key, out, depth + 1)?;
                    self.push(out, ": ")?;
                    self.repr(&value.get_item(&key)?, out, depth + 1)?;
                }
                self.push(out, "}")
            }
            ValueKind::Seq | ValueKind::Iterable => {
                self.push(out, "[")?;
                for (i, item) in value.try_iter()?.enumerate() {
                    self.push(out, if i == 0 { "" } else { ", " })?;
                    self.repr(&item, out, depth + 1)?;
                }
                self.push(out, "]")
            }
            ValueKind::Plain => Err(invalid("a namespace, a loop or a macro is no text")),
            _ => self.push(out, &self.text(value)?),
        }
    }

    /// Whether `value` may be kept in a list, a map or a namespace: no cycles, no deep nesting.
    fn storable(&self, value: &Value, depth: usize) -> Result<(), Error> {
        self.count(1)?;
        match kind(value) {
            ValueKind::Plain => {
                Err(invalid("a namespace, a loop or a macro cannot be kept in another value"))
            }
            ValueKind::Map | ValueKind::Seq | ValueKind::Iterable if depth >= MAX_DEPTH => {
                Err(invalid(format!("lists and maps nest more than {MAX_DEPTH} deep")))
            }
            ValueKind::Map => {
                value.try_iter()?.try_for_each(|key| self.storable(&value.get_item(&key)?, depth + 1))
            }
            ValueKind::Seq | ValueKind::Iterable => {
                value.try_iter()?.try_for_each(|item| self.storable(&item, depth + 1))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn items(&self, value: &Value) -> Result<Vec<Value>, Error> {
        let mut out = Vec::new();
        for item in value.try_iter()? {
            self.count(1)?;
            out.push(item);
        }
        Ok(out)
    }
}

/// `value.kind()`, with macros and loops told from maps: to minijinja they are maps too, and a macro holds what it uses.
fn kind(value: &Value) -> ValueKind {
    let of_engine = value.as_object().is_some_and(|object| object.type_name().starts_with("minijinja::vm::"));
    if of_engine { ValueKind::Plain } else { value.kind() }
}

fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if c < ' ' || c == '\x7f' => {
                // Writing to a String cannot fail.
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

/// Jinja's `namespace`: the one value that a template can change. It holds no other namespace, so that values form no
/// cycles.
#[derive(Debug, Default)]
struct Namespace(Mutex<BTreeMap<String, Value>>);

impl Object for Namespace {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(key.as_str()?).cloned()
    }
}

impl Namespace {
    fn set(&self, name: &str, value: Value) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(name.into(), value);
    }
}

fn is_list(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}

fn add(budget: &Budget, a: &Value, b: &Value) -> Result<Value, Error> {
    if let (Some(a), Some(b)) = (a.as_str(), b.as_str()) {
        budget.take(a.len() + b.len())?;
        return Ok(Value::from([a, b].concat()));
    }
    if is_list(a) && is_list(b) {
        let mut items = budget.items(a)?;
        items.extend(budget.items(b)?);
        return Ok(Value::from(items));
    }
    numeric(a, b, i64::checked_add, |a, b| a + b)
        .ok_or_else(|| invalid(format!("cannot add {} and {}", a.kind(), b.kind())))
}

fn numeric(
    a: &Value,
    b: &Value,
    whole: fn(i64, i64) -> Option<i64>,
    real: fn(f64, f64) -> f64,
) -> Option<Value> {
    if !a.is_number() || !b.is_number() {
        return None;
    }
    if a.is_integer() && b.is_integer() {
        return whole(i64::try_from(a.clone()).ok()?, i64::try_from(b.clone()).ok()?).map(Value::from);
    }
    Some(Value::from(real(f64::try_from(a.clone()).ok()?, f64::try_from(b.clone()).ok()?)))
}

fn repeat(budget: &Budget, a: &Value, b: &Value) -> Result<Value, Error> {
    let wrong = || invalid(format!("cannot multiply {} and {}", a.kind(), b.kind()));
    let (many, n) = if a.is_number() { (b, a) } else { (a, b) };
    if let Some(text) = many.as_str() {
        let n = usize::try_from(i64::try_from(n.clone()).map_err(|_| wrong())?).unwrap_or(0);
        budget.take(text.len().saturating_mul(n))?;
        return Ok(Value::from(text.repeat(n)));
    }
    numeric(a, b, i64::checked_mul, |a, b| a * b).ok_or_else(wrong)
}

/// Python's slices: the positions, in order.
fn positions(length: usize, start: &Value, stop: &Value, step: &Value) -> Result<Vec<usize>, Error> {
    let whole = |v: &Value| -> Result<Option<i64>, Error> {
        if v.is_none() || v.is_undefined() { Ok(None) } else { i64::try_from(v.clone()).map(Some) }
    };
    let length = i64::try_from(length).unwrap_or(i64::MAX);
    let step = whole(step)?.unwrap_or(1);
    if step == 0 {
        return Err(invalid("slice step cannot be zero"));
    }
    let (low, high) = if step > 0 { (0, length) } else { (-1, length - 1) };
    let clamp = |v: i64| if v < 0 { v.saturating_add(length).max(low) } else { v.min(high) };
    let mut at = whole(start)?.map_or(if step > 0 { low } else { high }, clamp);
    let end = whole(stop)?.map_or(if step > 0 { high } else { low }, clamp);
    let mut out = Vec::new();
    while if step > 0 { at < end } else { at > end } {
        out.extend(usize::try_from(at));
        at = at.saturating_add(step);
    }
    Ok(out)
}

fn slice(budget: &Budget, of: &Value, bounds: [&Value; 3]) -> Result<Value, Error> {
    let [start, stop, step] = bounds;
    if let Some(text) = of.as_str() {
        budget.take(text.len())?;
        let letters: Vec<char> = text.chars().collect();
        let picked = positions(letters.len(), start, stop, step)?;
        return Ok(Value::from(picked.into_iter().map(|at| letters[at]).collect::<String>()));
    }
    if !is_list(of) {
        return Err(invalid(format!("cannot slice {}", of.kind())));
    }
    let items = budget.items(of)?;
    let picked = positions(items.len(), start, stop, step)?;
    Ok(picked.into_iter().map(|at| items[at].clone()).collect())
}

fn map(budget: &Budget, parts: &[Value]) -> Result<Value, Error> {
    let mut pairs = Vec::with_capacity(parts.len() / 2);
    for pair in parts.chunks_exact(2) {
        if !matches!(pair[0].kind(), ValueKind::String | ValueKind::Number | ValueKind::Bool) {
            return Err(invalid(format!("{} cannot be a key", pair[0].kind())));
        }
        budget.storable(&pair[1], 1)?;
        pairs.push((pair[0].clone(), pair[1].clone()));
    }
    Ok(pairs.into_iter().collect())
}

fn namespace(budget: &Budget, first: &Kwargs) -> Result<Value, Error> {
    let made = Namespace::default();
    for name in first.args() {
        let value: Value = first.get(name)?;
        budget.storable(&value, 0)?;
        made.set(name, value);
    }
    Ok(Value::from_object(made))
}

fn assign(budget: &Budget, to: &Value, name: &str, value: Value) -> Result<Value, Error> {
    let Some(names) = to.downcast_object_ref::<Namespace>() else {
        return Err(invalid(format!("can only assign to attributes of a namespace, not of {}", to.kind())));
    };
    budget.storable(&value, 0)?;
    names.set(name, value);
    Ok(Value::from(()))
}

/// Gives `environment` the operators that [`guard`] writes, and output that counts.
pub(super) fn register(environment: &mut Environment<'_>, budget: &Arc<Budget>) {
    let b = budget.clone();
    environment.add_function(guard::ADD, move |x: Value, y: Value| add(&b, &x, &y));
    let b = budget.clone();
    environment.add_function(guard::CONCAT, move |x: Value, y: Value| {
        let (x, y) = (b.text(&x)?, b.text(&y)?);
        b.take(x.len() + y.len())?;
        Ok::<_, Error>([x.as_ref(), y.as_ref()].concat())
    });
    let b = budget.clone();
    environment.add_function(guard::REPEAT, move |x: Value, y: Value| repeat(&b, &x, &y));
    let b = budget.clone();
    environment.add_function(guard::SLICE, move |of: Value, start: Value, stop: Value, step: Value| {
        slice(&b, &of, [&start, &stop, &step])
    });
    let b = budget.clone();
    environment.add_function(guard::LIST, move |items: Rest<Value>| {
        items.iter().try_for_each(|item| b.storable(item, 1))?;
        Ok::<_, Error>(Value::from(items.to_vec()))
    });
    let b = budget.clone();
    environment.add_function(guard::MAP, move |parts: Rest<Value>| map(&b, &parts));
    let b = budget.clone();
    environment.add_function(guard::ASSIGN, move |to: Value, name: String, value: Value| {
        assign(&b, &to, &name, value)
    });
    environment.add_function(guard::RAW, |text: Value| text);
    let b = budget.clone();
    environment.add_function("namespace", move |first: Kwargs| namespace(&b, &first));
    let b = budget.clone();
    environment.add_function("dict", move |entries: Kwargs| {
        let names: Vec<&str> = entries.args().collect();
        let mut pairs = Vec::with_capacity(names.len());
        for name in names {
            let value: Value = entries.get(name)?;
            b.storable(&value, 1)?;
            pairs.push((name.to_owned(), value));
        }
        Ok::<Value, Error>(pairs.into_iter().collect())
    });
    let b = budget.clone();
    environment.set_formatter(move |out, _, value| {
        let text = b.text(value)?;
        b.take(text.len())?;
        out.write_str(&text).map_err(Error::from)
    });
}
