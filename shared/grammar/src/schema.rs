//! JSON schemas before they are compiled.

use serde_json::{Map, Value, json};

use crate::GrammarError;

/// Deepest nesting of a schema's own JSON.
pub const MAX_SCHEMA_DEPTH: usize = 24;
/// The library's own extension; ours are set with it.
const OPTIONS: &str = "x-guidance";
/// Between two parts of a document: enough for an indented one, and no endless blanks.
const WHITESPACE: &str = r"[\x20\x0A\x0D\x09]{1,20}";

/// A schema with the options that all answers share.
pub(crate) fn read(text: &str) -> Result<Value, GrammarError> {
    let refused = |reason: String| Err(GrammarError::Refused(reason));
    let mut schema = match serde_json::from_str::<Value>(text) {
        Ok(Value::Object(schema)) => schema,
        Ok(_) => return refused("a JSON schema must be an object".into()),
        Err(error) => return refused(format!("it is not JSON: {error}")),
    };
    if schema.contains_key(OPTIONS) {
        return refused(format!("`{OPTIONS}` is not supported; leave it out"));
    }
    let depth = depth_of(&schema);
    if depth > MAX_SCHEMA_DEPTH {
        return refused(format!("it is nested {depth} levels deep, allowed are {MAX_SCHEMA_DEPTH}"));
    }
    schema.insert(OPTIONS.to_owned(), json!({ "whitespace_pattern": WHITESPACE }));
    Ok(Value::Object(schema))
}

/// Levels of objects and lists; `serde_json` reads at most 128.
fn depth_of(schema: &Map<String, Value>) -> usize {
    fn depth(value: &Value) -> usize {
        match value {
            Value::Object(map) => 1 + map.values().map(depth).max().unwrap_or(0),
            Value::Array(list) => 1 + list.iter().map(depth).max().unwrap_or(0),
            _ => 0,
        }
    }
    1 + schema.values().map(depth).max().unwrap_or(0)
}
