//! The same behaviours on both adapters, and of the outbox and inbox on both databases.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod adapters;
mod broker;
mod consuming;
mod crash;
mod in_process;
mod outbox;
mod support;
mod trace;
