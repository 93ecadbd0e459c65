#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
//! Settlement against real parts: anvil, databases, buses.

mod agreement;
mod anvil_world;
mod batches;
mod books;
mod chain;
mod charges;
mod contracts;
mod crash;
mod escrow;
mod faults;
mod followers;
mod governance;
mod keeper;
mod ledger;
mod network;
mod operators;
mod proxy;
mod random;
mod requests;
mod schedules;
mod service;
mod sim;
mod stakes;
mod statements;
mod thieves;
mod wallets;
