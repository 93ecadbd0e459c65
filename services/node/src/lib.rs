//! The worker of the network.

pub mod engine;
