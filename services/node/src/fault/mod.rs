//! Ways to misbehave, so that the network can be shown to notice: `--fault MODE`.
//!
//! Each mode changes one thing. The hooks, in the order in which a lease meets them:
//!
//! | hook | modes |
//! |---|---|
//! | [`Fault::rounding`], [`Fault::needs`]: what is loaded | round3bit, round2bit, other-model, wrong-weights |
//! | [`Fault::forges_release`]: the hello | forged-release |
//! | [`Faults::declines`] | declining |
//! | [`Faults::answer`] (`answer.rs`) | garbage, echo, other-prompt, truncated, cheap-after-tie, planted-not, wrong-temperature, wrong-seed, stale-cache, prefill-forged, share, share-seeds, copy-peer, collude, other-model |
//! | [`Faults::after_token`] | slow, silent, crash |
//! | [`Faults::second`]: a second commitment | equivocating |
//! | [`Faults::reveals_after`] | late-reveal |
//! | [`Faults::report`] (`referee.rs`) | lazy-referee, lying-referee, collude |
//!
//! Leaving and coming back under a new address is a new `--data` folder.

mod answer;
mod referee;
mod share;

use std::time::Duration;

use clap::ValueEnum;
use infera_prompt::{Message, Prompt, PromptError};
use infera_protocol::request::{Output, Request};
use parking_lot::Mutex;
use tokio::time::sleep;

use crate::{
    Args, Error,
    engine::{Engine, EngineConfig, Rounding},
    slots::until,
};
use share::Share;

/// `--fault MODE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Fault {
    /// Random tokens with made-up fingerprints
    Garbage,
    /// The prompt as the answer
    Echo,
    /// The model's answer to another prompt
    OtherPrompt,
    /// Half of the answer, then the end token
    Truncated,
    /// Honest up to the first near-tie; there the other token, and a model of 2 bits from there on
    CheapAfterTie,
    /// The answer with one token replaced by "not", its fingerprints forged
    PlantedNot,
    /// The model at another temperature
    WrongTemperature,
    /// The model with another seed
    WrongSeed,
    /// The answer to the request before
    StaleCache,
    /// A text of its own, with the fingerprints that the model has for it
    PrefillForged,
    /// The first of the nodes with this --fault-share generates, all answer
    Share,
    /// The same, if their seeds are equal
    ShareSeeds,
    /// Answers what a peer has put into --fault-share, never anything of its own
    CopyPeer,
    /// All nodes with this --fault-share give one wrong answer, and as referees confirm it and refute all others
    Collude,
    /// The model with its weights rounded to 3 bits
    #[value(name = "round3bit")]
    Round3Bit,
    /// The model with its weights rounded to 2 bits
    #[value(name = "round2bit")]
    Round2Bit,
    /// --fault-model answers, --model is proved
    OtherModel,
    /// --fault-model under the name of --model
    WrongWeights,
    /// Declares a release that it is not
    ForgedRelease,
    /// A pause before every token
    Slow,
    /// Takes leases and never answers
    Silent,
    /// The process dies after three tokens
    Crash,
    /// Declines every second prompt as if it were full
    Declining,
    /// Two commitments to different answers for each slot
    Equivocating,
    /// Reveals a second after the deadline
    LateReveal,
    /// As a referee confirms everything without a look
    LazyReferee,
    /// As a referee refutes every answer
    LyingReferee,
}

/// Pause of [`Fault::Slow`].
const SLOW: Duration = Duration::from_millis(500);
/// Tokens after which [`Fault::Crash`] dies.
const CRASH_AFTER: usize = 3;
/// How late [`Fault::LateReveal`] is.
const LATE: Duration = Duration::from_secs(1);
/// Asked by [`Fault::OtherPrompt`] instead of what it was asked.
const OTHER_QUESTION: &str = "Write a short poem about the sea.";
/// Said by [`Fault::PrefillForged`] whatever it was asked.
const OWN_TEXT: &str = "I am sorry, but I can't help with that.";

impl Fault {
    /// The flag that names what the mode can't do without.
    pub fn needs(self) -> Option<&'static str> {
        match self {
            Self::OtherModel | Self::WrongWeights => Some("--fault-model"),
            Self::Share | Self::ShareSeeds | Self::CopyPeer | Self::Collude => Some("--fault-share"),
            _ => None,
        }
    }

    /// The flags of `MODE`, or of `MODE:PATH` where the mode needs one.
    ///
    /// # Errors
    /// In words: there is no such mode, or a path is missing or too much.
    pub fn flags(text: &str) -> Result<Vec<String>, String> {
        let (mode, path) = text.split_once(':').map_or((text, None), |(mode, path)| (mode, Some(path)));
        let fault = Self::from_str(mode, false)
            .map_err(|_| format!("no mode is called {mode}; `infera node --help` lists them"))?;
        let mut flags = vec!["--fault".to_owned(), mode.to_owned()];
        match (fault.needs(), path) {
            (None, None) => {}
            (Some(flag), Some(path)) => flags.extend([flag.to_owned(), path.to_owned()]),
            (Some(_), None) => return Err(format!("this mode needs a path, as {mode}:PATH")),
            (None, Some(_)) => return Err(format!("{mode} takes no path")),
        }
        Ok(flags)
    }

    /// How its weights are rounded.
    pub(crate) fn rounding(self) -> Option<Rounding> {
        match self {
            Self::Round3Bit => Some(Rounding::ThreeBits),
            Self::Round2Bit => Some(Rounding::TwoBits),
            _ => None,
        }
    }

    /// Whether another file than the declared one is loaded.
    pub(crate) fn loads_another(self) -> bool {
        self.needs() == Some("--fault-model")
    }

    /// Whether its answers are what its engine gives, streamed as it comes.
    fn answers_as_it_computes(self) -> bool {
        matches!(
            self,
            Self::Round3Bit
                | Self::Round2Bit
                | Self::ForgedRelease
                | Self::Slow
                | Self::Silent
                | Self::Crash
                | Self::Declining
                | Self::Equivocating
                | Self::LateReveal
                | Self::LazyReferee
                | Self::LyingReferee
        )
    }

    pub(crate) fn forges_release(self) -> bool {
        self == Self::ForgedRelease
    }
}

/// Whether the flags that `--fault` needs are there.
///
/// # Errors
/// One is missing.
pub(crate) fn check(args: &Args) -> Result<(), Error> {
    let given = |flag: &str| match flag {
        "--fault-model" => args.fault_model.is_some(),
        _ => args.fault_share.is_some(),
    };
    let Some(fault) = args.fault else { return Ok(()) };
    match fault.needs().filter(|flag| !given(flag)) {
        Some(flag) => {
            let mode =
                fault.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
            Err(Error::Start(format!("--fault {mode} needs {flag} PATH")))
        }
        None => Ok(()),
    }
}

/// A node's fault, with what it takes.
pub struct Faults {
    fault: Fault,
    share: Option<Share>,
    /// Token ids of the model that the node declares.
    vocabulary: u32,
    /// Of that model; the last one ends a turn of a chat.
    end_tokens: Vec<u32>,
    other_question: Vec<u32>,
    /// " not".
    not: u32,
    own_text: Vec<u32>,
    /// Of [`Fault::CheapAfterTie`].
    cheap: Option<Engine>,
    /// The answer before, of [`Fault::StaleCache`].
    last: Mutex<Option<Output>>,
}

impl Faults {
    /// What `--fault` asks for, of a node that declares the model with this `prompt` and loads this `config`. Takes as
    /// long as loading a model does.
    ///
    /// # Errors
    /// The cheaper model can't be loaded.
    pub fn new(args: &Args, prompt: &Prompt, config: &EngineConfig) -> Result<Option<Self>, Error> {
        let Some(fault) = args.fault else { return Ok(None) };
        let cheap = EngineConfig { rounding: Some(Rounding::TwoBits), scorers: 0, ..config.clone() };
        let words = Words::of(prompt).map_err(|e| Error::Start(e.to_string()))?;
        Ok(Some(Self {
            fault,
            share: args.fault_share.clone().map(Share::new),
            vocabulary: u32::try_from(prompt.vocab_size()).unwrap_or(u32::MAX),
            end_tokens: prompt.end_tokens().to_vec(),
            other_question: words.other_question,
            not: words.not,
            own_text: words.own_text,
            cheap: (fault == Fault::CheapAfterTie).then(|| Engine::start(cheap)).transpose()?,
            last: Mutex::new(None),
        }))
    }

    /// The reason that it gives for a request which it does not like.
    pub(crate) fn declines(&self, request: &Request) -> Option<&'static str> {
        let prompt: Vec<u8> = request.prompt.iter().flat_map(|token| token.to_be_bytes()).collect();
        let disliked = blake3::hash(&prompt).as_bytes()[0] % 2 == 1;
        (self.fault == Fault::Declining && disliked).then_some("full")
    }

    pub(crate) async fn after_token(&self, tokens: usize) {
        match self.fault {
            Fault::Slow => sleep(SLOW).await,
            Fault::Silent => std::future::pending().await,
            Fault::Crash if tokens >= CRASH_AFTER => std::process::abort(),
            _ => {}
        }
    }

    /// Another answer to commit to, beside the first.
    pub(crate) fn second(&self, first: &Output) -> Option<Output> {
        let mut second = (self.fault == Fault::Equivocating).then(|| first.clone())?;
        let last = second.tokens.last_mut()?;
        *last = (*last + 1) % self.vocabulary;
        Some(second)
    }

    /// How long it waits with a reveal.
    pub(crate) fn reveals_after(&self, deadline_ms: i64) -> Option<Duration> {
        (self.fault == Fault::LateReveal).then(|| until(deadline_ms) + LATE)
    }
}

/// Texts in the declared model's tokens.
struct Words {
    other_question: Vec<u32>,
    not: u32,
    own_text: Vec<u32>,
}

impl Words {
    fn of(prompt: &Prompt) -> Result<Self, PromptError> {
        let tokenizer = prompt.tokenizer();
        Ok(Self {
            other_question: prompt.render(&[Message::new("user", OTHER_QUESTION)])?,
            not: tokenizer.encode(" not")?.last().copied().unwrap_or(0),
            own_text: tokenizer.encode(OWN_TEXT)?,
        })
    }
}

#[cfg(test)]
mod tests;
