//! Whether results end where their request says (protocol section 5): what takes the model's vocabulary to see. The rest
//! is [`infera_protocol::request::check_output`]'s.

use infera_grammar::{GrammarError, Vocabulary};
use infera_prompt::{StopMatcher, Tokenizer};
use infera_protocol::bytes::NodeId;
use infera_protocol::request::{Finish, Output, Request};

/// Results that do not keep to the request's grammar or stop strings, and why. To a grammar that no node could use, none
/// keeps. Some milliseconds a result where there is a grammar.
pub fn unfit(
    request: &Request,
    tokenizer: &Tokenizer,
    vocabulary: &Vocabulary,
    results: Vec<(NodeId, Output)>,
) -> Vec<(NodeId, String)> {
    let compiled = request.grammar.as_ref().map(|grammar| vocabulary.compile(grammar));
    let check = |(node, output): (NodeId, Output)| {
        if let Some(reason) = misses_its_stop(&request.stop, tokenizer, &output) {
            return Some((node, reason.to_owned()));
        }
        let checked = compiled.clone()?.and_then(|matcher| matcher.check(&output.tokens, output.finish));
        match checked {
            Err(error @ (GrammarError::Violated { .. } | GrammarError::Refused(_))) => {
                Some((node, error.to_string()))
            }
            Ok(()) | Err(GrammarError::Stuck(_) | GrammarError::Vocabulary(_)) => None,
        }
    };
    results.into_iter().filter_map(check).collect()
}

/// The first token that completes a stop string is the last one, and says so; control tokens add no text.
fn misses_its_stop(stops: &[String], tokenizer: &Tokenizer, output: &Output) -> Option<&'static str> {
    let mut matcher = StopMatcher::new(stops);
    let mut tokens = output.tokens.iter();
    let completed = tokens.any(|token| matcher.push(tokenizer.token_bytes(*token)).is_some());
    match (completed, output.finish) {
        (true, _) if tokens.len() > 0 => Some("it goes on after a stop string"),
        (true, Finish::Length | Finish::Grammar) => {
            Some("it ends with a stop string and does not say `stop`")
        }
        (false, Finish::Stop) => Some("it says `stop` without a stop string"),
        // An end token may be one that has text.
        (true, Finish::Stop | Finish::Eos) | (false, _) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use infera_prompt::Prompt;

    #[test]
    fn the_first_stop_string_ends() {
        let prompt = Prompt::load(&infera_testkit::model_path()).unwrap();
        let tokenizer = prompt.tokenizer();
        let misses = |text: &str, stops: &[&str], finish| {
            let tokens = tokenizer.encode(text).unwrap();
            let stops: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
            misses_its_stop(&stops, tokenizer, &Output { tokens, fingerprints: Vec::new(), finish })
        };
        let none: [&str; 0] = [];
        for (text, stops, finish, expected) in [
            ("One, two, three", &["three"][..], Finish::Stop, None),
            ("One, two, three", &["three", "four"], Finish::Stop, None),
            ("One, two, three", &["thr", "two, th"], Finish::Stop, None),
            ("One, two", &["three"], Finish::Length, None),
            ("One, two<|im_end|>", &["three"], Finish::Eos, None),
            ("One, two", &none, Finish::Length, None),
            ("One, two", &["three"], Finish::Stop, Some("it says `stop` without a stop string")),
            ("One, two", &none, Finish::Stop, Some("it says `stop` without a stop string")),
            ("One, two, three", &["two"], Finish::Stop, Some("it goes on after a stop string")),
            ("One, two<|im_end|>", &["two"], Finish::Eos, Some("it goes on after a stop string")),
            (
                "One, two",
                &["two"],
                Finish::Length,
                Some("it ends with a stop string and does not say `stop`"),
            ),
            (
                "One, two",
                &["two"],
                Finish::Grammar,
                Some("it ends with a stop string and does not say `stop`"),
            ),
        ] {
            assert_eq!(misses(text, stops, finish), expected, "{text} {stops:?} {finish:?}");
        }
    }
}
