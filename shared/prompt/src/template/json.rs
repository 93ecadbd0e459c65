//! `tojson` as transformers defines it: Python's `json.dumps` that leaves Unicode as it is.

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, Value};

use super::ops::{Budget, invalid};

const MAX_DEPTH: usize = 20;
const MAX_INDENT: usize = 16;

struct Writer<'a> {
    budget: &'a Budget,
    out: String,
    indent: Option<usize>,
    between: String,
    after_key: String,
    sort_keys: bool,
}

/// `json.dumps(value, ensure_ascii=False, indent, separators, sort_keys)`.
pub(super) fn dump(
    budget: &Budget,
    value: &Value,
    indent: Option<usize>,
    named: &Kwargs,
) -> Result<String, Error> {
    let indent = named.get::<Option<usize>>("indent")?.or(indent);
    let separators: Option<Vec<String>> = named.get("separators")?;
    let sort_keys = named.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let _: Option<bool> = named.get("ensure_ascii")?;
    named.assert_all_used()?;
    if indent.is_some_and(|n| n > MAX_INDENT) {
        return Err(invalid(format!("tojson indents by at most {MAX_INDENT}")));
    }
    let [between, after_key] = match separators.as_deref() {
        None => [if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()],
        Some([between, after_key]) => [between.clone(), after_key.clone()],
        Some(_) => return Err(invalid("tojson takes two separators")),
    };
    let mut writer = Writer { budget, out: String::new(), indent, between, after_key, sort_keys };
    writer.value(value, 0)?;
    Ok(writer.out)
}

fn word(value: &Value) -> String {
    match value.kind() {
        ValueKind::None => "null".into(),
        ValueKind::Bool => value.is_true().to_string(),
        _ => value.to_string(),
    }
}

impl Writer<'_> {
    fn push(&mut self, text: &str) -> Result<(), Error> {
        self.budget.take(text.len())?;
        self.out.push_str(text);
        Ok(())
    }

    fn text(&mut self, text: &str) -> Result<(), Error> {
        // The longest escape of a byte has six.
        self.budget.take(text.len().saturating_mul(6).saturating_add(2))?;
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\x08' => self.out.push_str("\\b"),
                '\x0c' => self.out.push_str("\\f"),
                c if c < ' ' => self.out.push_str(&format!("\\u{:04x}", u32::from(c))),
                c => self.out.push(c),
            }
        }
        self.out.push('"');
        Ok(())
    }

    fn new_line(&mut self, depth: usize) -> Result<(), Error> {
        let Some(indent) = self.indent else { return Ok(()) };
        self.push(&format!("\n{}", " ".repeat(indent * depth)))
    }

    fn key(&mut self, key: &Value) -> Result<(), Error> {
        match key.kind() {
            ValueKind::String => self.text(key.as_str().unwrap_or("")),
            ValueKind::Number | ValueKind::Bool | ValueKind::None => self.text(&word(key)),
            kind => Err(invalid(format!("tojson: {kind} cannot be a key"))),
        }
    }

    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(invalid("tojson: the value is nested too deeply"));
        }
        match value.kind() {
            ValueKind::String => self.text(value.as_str().unwrap_or("")),
            ValueKind::None | ValueKind::Bool | ValueKind::Number => self.push(&word(value)),
            ValueKind::Map => {
                let mut keys = self.budget.items(value)?;
                if self.sort_keys {
                    keys.sort();
                }
                self.group('{', '}', keys, depth, |w, key| {
                    w.key(&key)?;
                    let after = w.after_key.clone();
                    w.push(&after)?;
                    w.value(&value.get_item(&key)?, depth + 1)
                })
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let items = self.budget.items(value)?;
                self.group('[', ']', items, depth, |w, item| w.value(&item, depth + 1))
            }
            kind => Err(invalid(format!("tojson: {kind} is not JSON"))),
        }
    }

    fn group(
        &mut self,
        open: char,
        close: char,
        items: Vec<Value>,
        depth: usize,
        one: impl Fn(&mut Self, Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let empty = items.is_empty();
        self.push(open.encode_utf8(&mut [0; 4]))?;
        for (i, item) in items.into_iter().enumerate() {
            if i > 0 {
                let between = self.between.clone();
                self.push(&between)?;
            }
            self.new_line(depth + 1)?;
            one(self, item)?;
        }
        if !empty {
            self.new_line(depth)?;
        }
        self.push(close.encode_utf8(&mut [0; 4]))
    }
}
