//! Comma-separated values (RFC 4180) that are written while they are read: any number of lines in little memory.

use std::{
    convert::Infallible,
    fmt::Display,
    pin::Pin,
    task::{Context, Poll},
};

use actix_web::{
    HttpResponse,
    body::{BodySize, MessageBody},
    http::header::{CONTENT_DISPOSITION, ContentType},
    web::Bytes,
};
use tokio::sync::mpsc;

/// Parts that wait for a slow client.
const WAITING: usize = 2;

/// What a body's writer sends; a failure ends the connection before the end of the body, so that the client sees it.
pub type Part = Result<Bytes, String>;

/// One line.
#[derive(Debug, Default)]
pub struct Line(String);

impl Line {
    /// Adds a field.
    #[must_use]
    pub fn with(mut self, field: impl Display) -> Self {
        if !self.0.is_empty() {
            self.0.push(',');
        }
        let text = field.to_string();
        if text.contains([',', '"', '\r', '\n']) || (self.0.is_empty() && text.is_empty()) {
            self.0.push('"');
            self.0.push_str(&text.replace('"', "\"\""));
            self.0.push('"');
        } else {
            self.0.push_str(&text);
        }
        self
    }

    /// Adds a field that may be empty.
    #[must_use]
    pub fn or_empty(self, field: Option<impl Display>) -> Self {
        match field {
            Some(field) => self.with(field),
            None => self.with(""),
        }
    }

    /// Writes the line.
    pub fn end(self, into: &mut String) {
        into.push_str(&self.0);
        into.push_str("\r\n");
    }
}

struct Body(mpsc::Receiver<Part>);

impl MessageBody for Body {
    type Error = Box<dyn std::error::Error>;

    fn size(&self) -> BodySize {
        BodySize::Stream
    }

    fn poll_next(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, Self::Error>>> {
        self.0.poll_recv(context).map(|part| part.map(|part| part.map_err(Into::into)))
    }
}

/// An answer whose lines `write` sends; it ends when the client is gone.
pub fn answer<F: Future<Output = Result<(), mpsc::error::SendError<Part>>> + 'static>(
    name: &str,
    write: impl FnOnce(mpsc::Sender<Part>) -> F,
) -> HttpResponse {
    let (parts, body) = mpsc::channel(WAITING);
    let writing = write(parts);
    actix_web::rt::spawn(async move {
        let _: Result<(), Infallible> = writing.await.or(Ok(()));
    });
    HttpResponse::Ok()
        .insert_header(ContentType(
            "text/csv; charset=utf-8; header=present".parse().unwrap_or(actix_web::mime::TEXT_CSV),
        ))
        .insert_header((CONTENT_DISPOSITION, format!("attachment; filename=\"{name}.csv\"")))
        .body(Body(body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_quoted_where_they_must_be() {
        let mut text = String::new();
        Line::default().with("a").with(5).or_empty(None::<i64>).with("x,y").with("say \"no\"").end(&mut text);
        Line::default().with("").with("two\nlines").end(&mut text);
        assert_eq!(text, "a,5,,\"x,y\",\"say \"\"no\"\"\"\r\n\"\",\"two\nlines\"\r\n");
    }
}
