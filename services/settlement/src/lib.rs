//! Settlement: money that balances, receipts, and the chain that anchors them.

pub mod chain;
