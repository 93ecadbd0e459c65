//! Web pages of other origins, that people may sign in from: browsers let them read what these routes answer only if the
//! answers say so (CORS, <https://fetch.spec.whatwg.org/#http-cors-protocol>). Keys go in a header, never in a cookie, so
//! credentials stay off.

use actix_web::body::{BoxBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::Method;
use actix_web::http::header::{
    ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_METHOD, HeaderValue,
    ORIGIN, VARY,
};
use actix_web::middleware::Next;
use actix_web::web::Data;
use actix_web::{Error, HttpResponse, ResponseError};
use infera_protocol::siwe::Origin;
use infera_runtime::http::ApiError;

use crate::app::App;

/// Seconds that a browser may remember what is allowed.
const MAX_AGE: &str = "600";
const METHODS: &str = "GET, POST, DELETE";
const ASKED: &str = "authorization, content-type";
const SHOWN: &str = "content-disposition, link, retry-after, x-request-id";

/// Answers what a browser asks first, and says of every answer which page may read it.
pub(super) async fn allow<B: MessageBody + 'static>(
    app: Data<App>,
    request: ServiceRequest,
    next: Next<B>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    // None where nobody can sign in. The first is the gateway itself.
    let pages = app.sign_in.as_ref().and_then(|sign_in| sign_in.origins.get(1..)).unwrap_or_default();
    let page = request.headers().get(ORIGIN).filter(|page| is_of(pages, page)).cloned();
    let first = request.method() == Method::OPTIONS
        && request.headers().contains_key(ORIGIN)
        && request.headers().contains_key(ACCESS_CONTROL_REQUEST_METHOD);
    let mut response = if first {
        let answer = if page.is_some() { allowed() } else { refused().error_response() };
        request.into_response(answer)
    } else {
        next.call(request).await?.map_into_boxed_body()
    };
    let headers = response.headers_mut();
    headers.append(VARY, HeaderValue::from_static("origin"));
    if let Some(page) = page {
        headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, page);
        headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static(SHOWN));
    }
    Ok(response)
}

fn allowed() -> HttpResponse {
    HttpResponse::NoContent()
        .insert_header((ACCESS_CONTROL_ALLOW_METHODS, METHODS))
        .insert_header((ACCESS_CONTROL_ALLOW_HEADERS, ASKED))
        .insert_header((ACCESS_CONTROL_MAX_AGE, MAX_AGE))
        .finish()
}

fn refused() -> ApiError {
    let message = "pages of this origin may not use the gateway; its operator lists those that may in `sign_in_origins`";
    ApiError::forbidden(message).with_code("origin_not_allowed").with_param("Origin")
}

fn is_of(pages: &[Origin], page: &HeaderValue) -> bool {
    let Ok(page) = page.to_str() else { return false };
    // An origin is written in one way: what has more behind it is none.
    Origin::of(page).is_some_and(|origin| origin.to_string() == page && pages.contains(&origin))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_one_that_is_listed() {
        let pages =
            ["https://app.example.org", "http://127.0.0.1:3000/"].map(|page| Origin::of(page).unwrap());
        for (page, expected) in [
            ("https://app.example.org", true),
            ("http://127.0.0.1:3000", true),
            ("http://app.example.org", false),
            ("https://app.example.org:8443", false),
            ("https://app.example.org.evil.example", false),
            ("https://app.example.org/", false),
            ("https://app.example.org/path", false),
            ("http://127.0.0.1:3001", false),
            ("null", false),
            ("*", false),
            ("", false),
        ] {
            assert_eq!(is_of(&pages, &HeaderValue::from_static(page)), expected, "{page}");
        }
    }
}
