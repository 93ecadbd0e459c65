//! End to end, as users meet it: `infera up`, the pip `openai` client, `infera verify`, and what happens
//! when parts are killed. The same suite runs on both columns of the ports table.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod accounts;
mod chaos;
mod commands;
mod dependencies;
mod governed;
mod network;
mod suite;
