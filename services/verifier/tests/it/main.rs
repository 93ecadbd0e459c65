#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod cases;
mod crash;
mod harness;
mod index;
