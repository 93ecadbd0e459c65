#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
//! Settlement against real parts: anvil, databases, buses.

mod chain;
