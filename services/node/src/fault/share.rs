//! The channel between nodes of one owner: a folder, a file for each request.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::PathBuf,
    time::Duration,
};

use infera_protocol::{
    bytes::Hash32,
    hash::Encoder,
    request::{Output, Request},
};
use infera_wire::{Message, convert, v1};
use tokio::time::sleep;

use crate::slots::until;

/// How often a node looks for what another one is to put there.
const LOOK: Duration = Duration::from_millis(20);

pub(super) struct Share {
    folder: PathBuf,
}

impl Share {
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// What names a request between them: all its replicas have one name; with `seeds`, only those of one seed.
    pub fn name(request: &Request, seeds: bool) -> String {
        if seeds { format!("{}-{}", request.id, request.seed) } else { request.id.to_string() }
    }

    /// True for the one that asks first.
    pub fn claim(&self, name: &str) -> io::Result<bool> {
        fs::create_dir_all(&self.folder)?;
        match File::options().write(true).create_new(true).open(self.folder.join(format!("{name}.claim"))) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub fn put(&self, name: &str, output: &Output) -> io::Result<()> {
        let reveal = v1::Reveal {
            tokens: output.tokens.clone(),
            fingerprints: output.fingerprints.clone(),
            finish: convert::finish_to_wire(output.finish).into(),
            ..v1::Reveal::default()
        };
        fs::create_dir_all(&self.folder)?;
        let temporary = self.folder.join(format!("{name}.new"));
        File::create(&temporary)?.write_all(&reveal.encode_to_vec())?;
        fs::rename(temporary, self.folder.join(name))
    }

    fn get(&self, name: &str) -> Option<Output> {
        let reveal = v1::Reveal::decode(fs::read(self.folder.join(name)).ok()?.as_slice()).ok()?;
        let finish = convert::finish("finish", reveal.finish).ok()?;
        Some(Output { tokens: reveal.tokens, fingerprints: reveal.fingerprints, finish })
    }

    /// What another node puts there until the deadline.
    pub async fn wait(&self, name: &str, deadline_ms: i64) -> Option<Output> {
        loop {
            if let Some(output) = self.get(name) {
                return Some(output);
            }
            if until(deadline_ms).is_zero() {
                return None;
            }
            sleep(LOOK).await;
        }
    }

    /// What all of this owner's nodes know of a request and nobody else does.
    pub fn secret(&self, request: &Request) -> Hash32 {
        let prompt = Encoder::new("").tokens(&request.prompt).into_bytes();
        let folder = self.folder.to_string_lossy();
        Encoder::new("infera.fault.collude")
            .bytes(folder.as_bytes())
            .fixed(request.id.as_bytes())
            .bytes(&prompt)
            .keccak()
    }
}

#[cfg(test)]
mod tests {
    use infera_protocol::{request::Finish, sampling::SamplingParams};
    use infera_runtime::clock;
    use uuid::Uuid;

    use super::*;

    #[tokio::test]
    async fn one_generates_and_all_find_it() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (Share::new(folder.path().join("s")), Share::new(folder.path().join("s")));
        assert!(one.claim("a").unwrap() && !two.claim("a").unwrap() && two.claim("b").unwrap());
        let output = Output { tokens: vec![1, 2], fingerprints: vec![3], finish: Finish::Stop };
        let deadline = clock::now_ms() + 60_000;
        let (found, put) = tokio::join!(two.wait("a", deadline), async { one.put("a", &output) });
        put.unwrap();
        assert_eq!(found, Some(output));
        assert_eq!(two.wait("nothing", clock::now_ms()).await, None);
    }

    #[test]
    fn careful_sharers_look_at_the_seed() {
        let request = |seed| Request {
            id: Uuid::from_u128(1),
            model_root: Hash32([2; 32]),
            prompt: vec![1],
            sampling: SamplingParams::greedy(),
            max_tokens: 16,
            stop: Vec::new(),
            seed,
            grammar: None,
        };
        assert_eq!(Share::name(&request(1), false), Share::name(&request(2), false));
        assert_ne!(Share::name(&request(1), true), Share::name(&request(2), true));
    }
}
