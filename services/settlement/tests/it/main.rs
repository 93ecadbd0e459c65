#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
//! Settlement against real parts: anvil, databases, buses.

mod batches;
mod chain;
mod contracts;
mod ledger;
mod network;
mod requests;
mod service;
