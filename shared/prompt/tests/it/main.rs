#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod families;
mod hostile;
mod memory;
mod model;
mod support;
