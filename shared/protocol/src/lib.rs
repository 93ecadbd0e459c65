//! The rules of the network, in the order in which a request meets them. Pure functions: no I/O, no
//! clock, no randomness of their own. This is what a stranger needs to check the network.
//!
//! | section | module |
//! |---|---|
//! | 1 identities | [`identity`], [`registry`] |
//! | 1 how wallets sign in (ERC-4361) | [`siwe`], [`rfc3339`] |
//! | 2 admission | [`admission`] |
//! | 3 request | [`request`], [`grammar`] |
//! | 4 assignment | [`assignment`], [`vrf`] |
//! | 5 generation | [`sampling`], [`mask`], [`fingerprint`] |
//! | 6 commit and reveal | [`commitment`] |
//! | 7 agreement | [`agreement`], [`calibration`] |
//! | 7, 8 what follows from evidence | [`judgement`] |
//! | 8 referees, canaries | [`referee`], [`margin`], [`canary`] |
//! | 8 trust | [`trust`] |
//! | 1, 6, 10 what contracts check | [`typed`] |
//! | 10 governance | [`governed`] |
//! | 10 settlement | [`evidence`], [`receipt`], [`document`], [`merkle`], [`money`], [`voucher`] |

pub mod admission;
pub mod agreement;
pub mod assignment;
pub mod bytes;
pub mod calibration;
pub mod canary;
pub mod commitment;
pub mod document;
pub mod evidence;
pub mod fingerprint;
pub mod governed;
pub mod grammar;
pub mod hash;
pub mod identity;
pub mod ids;
pub mod judgement;
mod logits;
pub mod margin;
pub mod mask;
pub mod merkle;
pub mod money;
pub mod receipt;
pub mod referee;
pub mod registry;
pub mod request;
pub mod rfc3339;
pub mod sampling;
pub mod siwe;
pub mod slashing;
pub mod stakes;
pub mod trust;
pub mod typed;
pub mod voucher;
pub mod vrf;
