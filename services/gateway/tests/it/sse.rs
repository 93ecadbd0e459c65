//! Streams as a client reads them.

use serde_json::Value;

use crate::support::DEADLINE;

/// The events of a stream as they come.
pub struct Sse {
    response: reqwest::Response,
    buffer: String,
}

impl Sse {
    pub async fn of(response: reqwest::Response) -> Self {
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self { response, buffer: String::new() }
    }

    /// The next block: a `data:` line or a comment. `None` at the end.
    pub async fn block(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.buffer.find("\n\n") {
                let block = self.buffer[..end].to_owned();
                self.buffer.drain(..end + 2);
                assert!(!block.contains('\n'), "one line a block: {block}");
                assert!(block.starts_with("data: ") || block.starts_with(':'), "data or comment: {block}");
                return Some(block);
            }
            let chunk =
                tokio::time::timeout(DEADLINE, self.response.chunk()).await.expect("the stream goes on");
            match chunk.unwrap() {
                Some(bytes) => self.buffer.push_str(std::str::from_utf8(&bytes).unwrap()),
                None => {
                    assert!(self.buffer.is_empty(), "half a block: {}", self.buffer);
                    return None;
                }
            }
        }
    }

    /// The next event's data, without comments; `None` at the end.
    pub async fn data(&mut self) -> Option<String> {
        loop {
            let block = self.block().await?;
            if let Some(data) = block.strip_prefix("data: ") {
                return Some(data.to_owned());
            }
        }
    }

    /// The next event as JSON.
    pub async fn json(&mut self) -> Value {
        serde_json::from_str(&self.data().await.expect("another event")).unwrap()
    }

    /// The next piece of text.
    pub async fn text(&mut self) -> String {
        let event = self.json().await;
        event["choices"][0]["delta"]["content"].as_str().unwrap_or_else(|| panic!("text: {event}")).to_owned()
    }

    /// Everything up to the end.
    pub async fn rest(&mut self) -> Vec<String> {
        let mut rest = Vec::new();
        while let Some(data) = self.data().await {
            rest.push(data);
        }
        rest
    }
}
