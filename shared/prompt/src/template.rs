//! The model's own chat template, in the dialect of transformers.

use minijinja::value::{Value, from_args};
use minijinja::{Environment, Error, ErrorKind, State, UndefinedBehavior};
use serde::Serialize;

use crate::error::PromptError;

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

/// A parsed chat template.
#[derive(Debug)]
pub(crate) struct Template {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

fn raise(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// The few Python methods of strings and maps that chat templates call.
fn method(_: &State<'_, '_>, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let unknown = || Error::new(ErrorKind::UnknownMethod, format!("method {name} is not known"));
    if let Some(text) = value.as_str() {
        return match name {
            "strip" | "lstrip" | "rstrip" => {
                let (set,): (Option<&str>,) = from_args(args)?;
                let drop = |c: char| set.map_or_else(|| c.is_whitespace(), |set| set.contains(c));
                Ok(Value::from(match name {
                    "strip" => text.trim_matches(drop),
                    "lstrip" => text.trim_start_matches(drop),
                    _ => text.trim_end_matches(drop),
                }))
            }
            "startswith" => Ok(Value::from(text.starts_with(from_args::<(&str,)>(args)?.0))),
            "endswith" => Ok(Value::from(text.ends_with(from_args::<(&str,)>(args)?.0))),
            "upper" => Ok(Value::from(text.to_uppercase())),
            "lower" => Ok(Value::from(text.to_lowercase())),
            "replace" => {
                let (from, to): (&str, &str) = from_args(args)?;
                Ok(Value::from(text.replace(from, to)))
            }
            "split" => {
                let (by,): (Option<&str>,) = from_args(args)?;
                Ok(match by {
                    Some("") => return raise("empty separator".into()),
                    Some(by) => text.split(by).collect(),
                    None => text.split_whitespace().collect(),
                })
            }
            _ => Err(unknown()),
        };
    }
    match name {
        "get" => {
            let (key, default): (&Value, Option<&Value>) = from_args(args)?;
            let found = value.get_item(key)?;
            Ok(if found.is_undefined() { default.cloned().unwrap_or_else(|| Value::from(())) } else { found })
        }
        _ => Err(unknown()),
    }
}

impl Template {
    pub(crate) fn new(source: &str, bos: &str, eos: &str) -> Result<Self, PromptError> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_recursion_limit(50);
        environment.set_unknown_method_callback(method);
        environment.add_function("raise_exception", raise);
        environment
            .add_template_owned(NAME, source.to_owned())
            .map_err(|e| PromptError::Unsupported(format!("chat template: {e:#}")))?;
        Ok(Self { environment, bos: bos.into(), eos: eos.into() })
    }

    pub(crate) fn render(&self, messages: &[Message]) -> Result<String, PromptError> {
        let context = minijinja::context! {
            messages => messages,
            add_generation_prompt => true,
            bos_token => self.bos,
            eos_token => self.eos,
        };
        let template = self.environment.get_template(NAME);
        template.and_then(|t| t.render(context)).map_err(|e| PromptError::Template(e.to_string()))
    }
}
