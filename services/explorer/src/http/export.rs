//! `/v1/export.csv` and `/v1/export.jsonl`: everything that matches, newest first, as a stream. A page
//! is in memory at a time; an export that fails in the middle cuts the connection, so that nobody
//! takes the part for the whole.

use actix_web::web::{Bytes, Data};
use actix_web::{HttpRequest, HttpResponse, get};
use infera_protocol::document::Status;
use infera_protocol::receipt::Receipt;
use infera_runtime::http::ApiError;
use sea_orm::DbErr;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::Explorer;
use super::api::FILTERS;
use crate::params::Params;
use crate::query::{self, Entry, Filter};

/// Receipts read at a time.
const PAGE: u64 = 500;
/// Pages that wait for a slow reader.
const BUFFERED: usize = 2;

const COLUMNS: &str = "id,model,status,batch,submitted_at_ms,decided_at_ms,class,attempt,k,verified,unpaid,\
lowest_similarity_millionths,prompt_tokens,output_tokens,price_micro,charged_micro,request_hash,output_hash,\
evidence_root\r\n";

#[get("/v1/export.csv")]
pub(super) async fn csv(explorer: Data<Explorer>, request: HttpRequest) -> Result<HttpResponse, ApiError> {
    stream(explorer, &request, "text/csv; charset=utf-8", "receipts.csv", COLUMNS, csv_row)
}

#[get("/v1/export.jsonl")]
pub(super) async fn jsonl(explorer: Data<Explorer>, request: HttpRequest) -> Result<HttpResponse, ApiError> {
    stream(explorer, &request, "application/jsonl", "receipts.jsonl", "", json_row)
}

type Row = fn(&Entry, &mut Vec<u8>) -> Result<(), DbErr>;

fn stream(
    explorer: Data<Explorer>,
    request: &HttpRequest,
    content_type: &str,
    name: &str,
    head: &'static str,
    row: Row,
) -> Result<HttpResponse, ApiError> {
    let filter = Params::parse(request.query_string(), &FILTERS)?.filter()?;
    let turn = explorer.exports.clone().try_acquire_owned().map_err(|_| {
        ApiError::rate_limited("too many exports run at this time; try again later").retry_after(10)
    })?;
    let (sender, receiver) = mpsc::channel(BUFFERED);
    actix_rt::spawn(async move {
        let _turn = turn;
        if let Err(error) = write(&explorer, &filter, head, row, &sender).await {
            tracing::warn!(%error, "export failed");
            let _ = sender.send(Err(error)).await;
        }
    });
    Ok(HttpResponse::Ok()
        .content_type(content_type)
        .insert_header(("content-disposition", format!("attachment; filename=\"{name}\"")))
        .streaming(ReceiverStream::new(receiver)))
}

/// Writes pages until the end, or until the reader is gone.
async fn write(
    explorer: &Explorer,
    filter: &Filter,
    head: &str,
    row: Row,
    sender: &mpsc::Sender<Result<Bytes, std::io::Error>>,
) -> Result<(), std::io::Error> {
    let mut after = None;
    let mut chunk = head.as_bytes().to_vec();
    loop {
        let entries = query::page(&explorer.db, filter, after, PAGE).await.map_err(std::io::Error::other)?;
        for entry in &entries {
            row(entry, &mut chunk).map_err(std::io::Error::other)?;
        }
        explorer.metrics.exported.inc_by(entries.len() as u64);
        let chunk = std::mem::take(&mut chunk);
        if !chunk.is_empty() && sender.send(Ok(chunk.into())).await.is_err() {
            return Ok(());
        }
        match entries.last() {
            Some(last) if entries.len() as u64 == PAGE => after = Some(last.cursor()),
            _ => return Ok(()),
        }
    }
}

fn csv_row(entry: &Entry, out: &mut Vec<u8>) -> Result<(), DbErr> {
    let r = &entry.receipt;
    let status = match entry.status() {
        Status::Pending => "pending",
        Status::Anchored => "anchored",
    };
    let fields = [
        r.id.to_string(),
        quoted(&entry.model),
        status.to_owned(),
        entry.batch.map(|batch| batch.to_string()).unwrap_or_default(),
        r.submitted_at_ms.to_string(),
        r.decided_at_ms.to_string(),
        quoted(&r.class),
        r.attempt.to_string(),
        r.k.to_string(),
        r.verified.len().to_string(),
        r.unpaid.len().to_string(),
        r.lowest_similarity_millionths.to_string(),
        r.prompt_tokens.to_string(),
        r.output_tokens.to_string(),
        r.price_micro.to_string(),
        r.charged_micro.to_string(),
        r.request_hash.to_string(),
        r.output_hash.to_string(),
        r.evidence_root.to_string(),
    ];
    out.extend_from_slice(fields.join(",").as_bytes());
    out.extend_from_slice(b"\r\n");
    Ok(())
}

/// RFC 4180. A cell that a spreadsheet would take for a formula gets an apostrophe in front.
fn quoted(text: &str) -> String {
    let formula = text.starts_with(['=', '+', '-', '@', '\t', '\r']);
    let text = if formula { format!("'{text}") } else { text.to_owned() };
    if text.contains([',', '"', '\n', '\r']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text }
}

#[derive(Serialize)]
struct Line<'a> {
    model: &'a str,
    status: Status,
    batch: Option<i64>,
    receipt: &'a Receipt,
}

fn json_row(entry: &Entry, out: &mut Vec<u8>) -> Result<(), DbErr> {
    let line =
        Line { model: &entry.model, status: entry.status(), batch: entry.batch, receipt: &entry.receipt };
    serde_json::to_writer(&mut *out, &line).map_err(|error| DbErr::Custom(error.to_string()))?;
    out.push(b'\n');
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_quoted_where_they_must_be() {
        assert_eq!(quoted("plain"), "plain");
        assert_eq!(quoted("a,b"), "\"a,b\"");
        assert_eq!(quoted("a\"b"), "\"a\"\"b\"");
        assert_eq!(quoted("=1+1"), "'=1+1");
    }
}
