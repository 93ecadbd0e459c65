//! Ways to misbehave, so that the network can be shown to notice.

use std::time::Duration;

use infera_protocol::{
    fingerprint::{Entry, Fingerprint},
    request::{Finish, Output, Request},
};

/// `--fault MODE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Fault {
    /// Random tokens with made-up fingerprints
    Garbage,
    /// The prompt as the answer
    Echo,
    /// A pause before every token
    Slow,
    /// Takes leases and never answers
    Silent,
    /// The process dies after three tokens
    Crash,
}

/// Pause of [`Fault::Slow`].
pub const SLOW: Duration = Duration::from_millis(500);
/// Tokens after which [`Fault::Crash`] dies.
pub const CRASH_AFTER: usize = 3;
const GARBAGE_TOKENS: u32 = 12;

/// A whole answer that was not computed; None for faults that compute.
pub fn forged(fault: Fault, request: &Request, vocabulary: u32) -> Option<Output> {
    let tokens: Vec<u32> = match fault {
        Fault::Garbage => {
            let count = GARBAGE_TOKENS.min(request.max_tokens);
            (0..count).map(|_| rand::random_range(0..vocabulary)).collect()
        }
        Fault::Echo => request.prompt.iter().copied().take(request.max_tokens as usize).collect(),
        Fault::Slow | Fault::Silent | Fault::Crash => return None,
    };
    let fingerprints = tokens
        .iter()
        // A certain token: log-probability 0.
        .filter_map(|&token| Fingerprint::new(vec![Entry { token, logprob: 0 }]).ok())
        .flat_map(|print| print.encode())
        .collect();
    // A result that breaks the request's limits would not even count as an outlier.
    let cut = tokens.len() == request.max_tokens as usize;
    let finish = if cut { Finish::Length } else { Finish::Eos };
    Some(Output { tokens, fingerprints, finish })
}
