//! Pages for people: rendered here, without a framework in the browser. They work without JavaScript;
//! with it, the counters follow.

use actix_web::http::StatusCode;
use actix_web::web::{Data, Path};
use actix_web::{HttpRequest, HttpResponse, get};
use askama::Template;
use infera_protocol::document::Status;
use infera_runtime::http::ApiError;

use super::views::{self, Choice, ErrorPage, Home, ReceiptPage};
use super::{Explorer, api};
use crate::format::{infer, time};
use crate::params::Params;
use crate::query::{self, Filter};

/// Receipts of a page of the list.
const LINES: u64 = 25;
/// Hits of a search.
const HITS: usize = 20;
/// Nothing comes from elsewhere, and nothing inline runs.
const POLICY: &str = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; \
    img-src 'self' data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'";
/// Seconds that a browser keeps style and script.
const KEEP: &str = "max-age=300";

#[get("/")]
pub(super) async fn home(explorer: Data<Explorer>, request: HttpRequest) -> HttpResponse {
    let page = home_page(&explorer, &request).await;
    answer(&explorer, page)
}

async fn home_page(explorer: &Explorer, request: &HttpRequest) -> Result<Home, ApiError> {
    let known: Vec<&str> = api::FILTERS.into_iter().chain(["cursor", "q"]).collect();
    let params = Params::parse(request.query_string(), &known)?;
    let (filter, after) = (params.filter()?, params.cursor()?);
    let stats = query::stats(&explorer.db).await.map_err(ApiError::internal)?;
    let models = query::models(&explorer.db).await.map_err(ApiError::internal)?;
    let filters = views::filter_query(&filter);
    let mut page = Home {
        network: explorer.network.clone(),
        counters: views::counters(&stats),
        question: params.text("q").unwrap_or_default().to_owned(),
        models: models
            .into_iter()
            .map(|value| Choice { chosen: filter.model.as_ref() == Some(&value), value })
            .collect(),
        operator: filter.operator.map(|operator| operator.to_string()).unwrap_or_default(),
        node: filter.node.map(|node| node.to_string()).unwrap_or_default(),
        status: match filter.status {
            Some(Status::Pending) => "pending".to_owned(),
            Some(Status::Anchored) => "anchored".to_owned(),
            None => String::new(),
        },
        filtered: filter != Filter::default(),
        title: String::new(),
        lines: Vec::new(),
        empty: String::new(),
        searching: params.text("q").is_some(),
        next: None,
        export_query: if filters.is_empty() { String::new() } else { format!("?{filters}") },
    };
    if let Some(question) = params.text("q") {
        let found = explorer.find(question, HITS, explorer.min_score).await?;
        page.title = "Answers near in meaning".to_owned();
        page.lines = found.iter().map(views::found).collect();
        page.empty = "No verified answer is near to this in meaning. Try other words.".to_owned();
        return Ok(page);
    }
    let (entries, next) = api::page(explorer, &filter, after, LINES).await?;
    page.title = if page.filtered { "Matching receipts" } else { "Latest receipts" }.to_owned();
    page.lines = entries.iter().map(views::line).collect();
    page.empty = if page.filtered {
        "No receipt matches these filters.".to_owned()
    } else {
        "No answer has been verified yet. The first one appears here with its receipt.".to_owned()
    };
    page.next = next.map(|cursor| {
        let and = if filters.is_empty() { "" } else { "&" };
        format!("/?{filters}{and}cursor={cursor}")
    });
    Ok(page)
}

#[get("/receipts/{id}")]
pub(super) async fn receipt(explorer: Data<Explorer>, id: Path<String>) -> HttpResponse {
    let page = receipt_page(&explorer, &id).await;
    answer(&explorer, page)
}

async fn receipt_page(explorer: &Explorer, id: &str) -> Result<ReceiptPage, ApiError> {
    let (entry, batch) = api::detail(explorer, id).await?;
    let r = &entry.receipt;
    Ok(ReceiptPage {
        network: explorer.network.clone(),
        id: r.id.to_string(),
        time: time(r.decided_at_ms),
        took: views::took(r),
        quorum: views::quorum(r),
        tokens: views::all_tokens(r),
        charged: infer(r.charged_micro),
        anchor: batch.map(views::anchor),
        leaf: r.leaf().to_string(),
        nodes: views::nodes(r),
        groups: views::groups(r, &entry.model),
        model: entry.model.clone(),
        receipts_url: explorer.receipts_url.trim_end_matches('/').to_owned(),
        rpc_url: explorer.rpc_url.clone(),
    })
}

#[get("/assets/style.css")]
pub(super) async fn style() -> HttpResponse {
    asset("text/css; charset=utf-8", include_str!("../../assets/style.css"))
}

#[get("/assets/live.js")]
pub(super) async fn script() -> HttpResponse {
    asset("text/javascript; charset=utf-8", include_str!("../../assets/live.js"))
}

fn asset(content_type: &str, text: &'static str) -> HttpResponse {
    HttpResponse::Ok()
        .content_type(content_type)
        .insert_header(("cache-control", KEEP))
        .insert_header(("x-content-type-options", "nosniff"))
        .body(text)
}

/// The page, or a page that says what is wrong.
pub(super) fn answer<T: Template>(explorer: &Explorer, page: Result<T, ApiError>) -> HttpResponse {
    let (status, text) = match page.and_then(|page| page.render().map_err(ApiError::internal)) {
        Ok(text) => (StatusCode::OK, text),
        Err(error) => (error.status, error_text(explorer, &error)),
    };
    HttpResponse::build(status)
        .content_type("text/html; charset=utf-8")
        .insert_header(("content-security-policy", POLICY))
        .insert_header(("referrer-policy", "no-referrer"))
        .insert_header(("x-content-type-options", "nosniff"))
        .body(text)
}

fn error_text(explorer: &Explorer, error: &ApiError) -> String {
    let title = match error.status.as_u16() {
        400 => "This address has a mistake",
        404 => "There is no such receipt",
        429 | 503 => "Busy at the moment",
        _ => "Something failed on our side",
    };
    let page = ErrorPage {
        network: explorer.network.clone(),
        status: error.status.as_u16(),
        title,
        message: error.message.clone(),
    };
    page.render().unwrap_or_else(|_| error.message.clone())
}
