//! The model's own chat template, in the dialect of transformers.
//!
//! transformers renders with Jinja2: `trim_blocks`, `lstrip_blocks`, `break` and `continue`, `raise_exception`,
//! `strftime_now`, its own `tojson`, and `{% generation %}`, which changes nothing in a prompt. The template comes with
//! the model, from anybody: what it may cost is bounded by the constants here and in [`guard`].

mod clock;
mod guard;
mod json;
mod ops;
mod python;

use std::collections::BTreeMap;
use std::sync::Arc;

use minijinja::machinery::{CodeGenerator, Instructions, Vm, make_string_output, parse};
use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, UndefinedBehavior, Value};
use serde::Serialize;

use crate::error::PromptError;
use clock::Moment;
use ops::Budget;
pub(crate) use python::is_space;

/// Largest template, in bytes of its source. The largest of the families served is 5 kB.
pub const MAX_TEMPLATE_BYTES: usize = 256 << 10;
/// Instructions that one rendering may take, besides [`FUEL_PER_MESSAGE`].
pub const MAX_FUEL: u64 = 200_000;
/// Instructions more for each message.
pub const FUEL_PER_MESSAGE: u64 = 2_000;
/// Bytes of text that one rendering may build in all, besides [`BUILT_PER_BYTE`] for each byte of the messages.
pub const MAX_BUILT_BYTES: u64 = 16 << 20;
/// Bytes of text more for each byte of the messages.
pub const BUILT_PER_BYTE: u64 = 64;
/// Calls, loops and blocks inside of each other while rendering.
pub const MAX_RECURSION: usize = 100;

const NAME: &str = "chat";

/// One message of a chat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct Message {
    /// system, user, assistant or tool.
    pub role: String,
    /// Its text.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// What a template reads besides the messages.
#[derive(Debug, Clone, Default)]
pub(crate) struct Names {
    pub bos: Option<String>,
    pub eos: Option<String>,
    pub pad: Option<String>,
    pub unk: Option<String>,
}

/// A chat template that was parsed once without an error.
#[derive(Debug)]
pub(crate) struct Template {
    source: String,
    names: Names,
}

type Compiled<'a> = (Instructions<'a>, BTreeMap<&'a str, Instructions<'a>>);

fn compile(source: &str) -> Result<Compiled<'_>, String> {
    guard::check_depth(source)?;
    let tree = parse(source, NAME, SyntaxConfig, guard::WHITESPACE).map_err(|e| e.to_string())?;
    let tree = guard::statement(&tree)?;
    let mut generator = CodeGenerator::new(NAME, source);
    generator.compile_stmt(&tree);
    Ok(generator.finish())
}

/// `{% generation %}` marks what a model is trained on. It becomes `{% if true %}`, which prints the same.
fn without_generation(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let inner = tag.strip_prefix(['-', '+']).unwrap_or(tag);
        out.push_str(&tag[..tag.len() - inner.len()]);
        let word = inner.trim_start();
        let end = word.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(word.len());
        let (word, after) = word.split_at(end);
        let closed = after.trim_start().trim_start_matches(['-', '+']).starts_with("%}");
        let new = match word {
            "generation" if closed => " if true ",
            "endgeneration" if closed => " endif ",
            _ => {
                rest = inner;
                continue;
            }
        };
        out.push_str(new);
        rest = after.trim_start();
    }
    out.push_str(rest);
    out
}

impl Template {
    pub(crate) fn new(source: &str, names: Names) -> Result<Self, PromptError> {
        let refused = |why: String| PromptError::Unsupported(format!("chat template: {why}"));
        if source.len() > MAX_TEMPLATE_BYTES {
            return Err(refused(format!("{} bytes, the limit is {MAX_TEMPLATE_BYTES}", source.len())));
        }
        // As Jinja2 reads it.
        let source = without_generation(&source.replace("\r\n", "\n").replace('\r', "\n"));
        compile(&source).map_err(refused)?;
        Ok(Self { source, names })
    }

    fn environment(&self, budget: &Arc<Budget>, fuel: u64, now_ms: i64) -> Environment<'static> {
        let mut environment = Environment::empty();
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_recursion_limit(MAX_RECURSION);
        environment.set_fuel(Some(fuel));
        environment.set_debug(false);
        ops::register(&mut environment, budget);
        python::register(&mut environment, budget);
        environment.add_function("strftime_now", move |pattern: String| {
            Moment::at(now_ms).format(&pattern).map_err(ops::invalid)
        });
        environment
    }

    /// The text of a chat. `now_ms`: milliseconds since 1970, for templates that write the day.
    pub(crate) fn render(&self, messages: &[Message], now_ms: i64) -> Result<String, PromptError> {
        let size: usize = messages.iter().map(|m| m.role.len() + m.content.len()).sum();
        let budget = MAX_BUILT_BYTES.saturating_add(BUILT_PER_BYTE.saturating_mul(size as u64));
        let fuel = MAX_FUEL.saturating_add(FUEL_PER_MESSAGE.saturating_mul(messages.len() as u64));
        let environment = self.environment(&Arc::new(Budget::new(budget)), fuel, now_ms);
        let (instructions, blocks) = compile(&self.source).map_err(PromptError::Template)?;
        let mut text = String::new();
        let result = Vm::new(&environment).eval(
            &instructions,
            self.context(messages),
            &blocks,
            &mut make_string_output(&mut text),
            AutoEscape::None,
        );
        match result {
            Ok(_) => Ok(text),
            Err(e) => Err(PromptError::Template(reason(&e, fuel))),
        }
    }

    /// What transformers passes; a special token that the model lacks is not defined.
    fn context(&self, messages: &[Message]) -> Value {
        let mut context = BTreeMap::from([
            ("messages", Value::from_serialize(messages)),
            ("add_generation_prompt", Value::from(true)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ]);
        let names = &self.names;
        let tokens = [
            ("bos_token", &names.bos),
            ("eos_token", &names.eos),
            ("pad_token", &names.pad),
            ("unk_token", &names.unk),
        ];
        for (name, token) in tokens {
            context.extend(token.as_ref().map(|t| (name, Value::from(t.as_str()))));
        }
        Value::from(context)
    }
}

fn reason(error: &Error, fuel: u64) -> String {
    match error.kind() {
        ErrorKind::OutOfFuel => format!("it takes more than {fuel} instructions: an endless loop?"),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests;
