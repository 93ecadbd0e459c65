//! Who is next among the requests for one model.
//!
//! The rule, from the strongest part to the weakest:
//! 1. Accounts take turns: in a round each account that waits is served once. How much an account sends, or bids,
//!    changes nothing about that.
//! 2. Within a round, the account whose first request bids more goes first.
//! 3. Equal bids: the request that was submitted first.
//!
//! Within an account the order is that of submission: a higher bid moves the account forward in the
//! round, not one of its requests past another. A request that the network can't serve now (it asks for more
//! operators than are there) is passed over and keeps its place.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};

use uuid::Uuid;

/// A request's place in its account's line: when it was submitted, then its id.
pub type Place = (i64, Uuid);

/// The accounts that wait for one model.
#[derive(Debug, Default)]
pub struct Lane {
    accounts: BTreeMap<String, Line>,
    /// The turn of the account that was served last.
    round: u64,
}

#[derive(Debug, Default)]
struct Line {
    /// The round in which it is served next.
    turn: u64,
    waiting: BTreeSet<Place>,
}

impl Lane {
    pub fn insert(&mut self, account: &str, place: Place) {
        self.accounts.entry(account.to_owned()).or_default().waiting.insert(place);
    }

    /// Takes a request out without serving it.
    pub fn remove(&mut self, account: &str, place: Place) {
        if let Some(line) = self.accounts.get_mut(account) {
            line.waiting.remove(&place);
        }
        self.forget();
    }

    pub fn is_empty(&self) -> bool {
        self.accounts.values().all(|line| line.waiting.is_empty())
    }

    /// The next request by the rule above, among those that `bid` gives a bid for: `None` passes a
    /// request over.
    pub fn next(&self, bid: impl Fn(&Uuid) -> Option<u64>) -> Option<(String, Place)> {
        self.accounts
            .iter()
            .filter_map(|(account, line)| {
                let (place, bid) =
                    line.waiting.iter().find_map(|place| bid(&place.1).map(|bid| (*place, bid)))?;
                // Nobody saves turns while away, or while its requests can't be served.
                let turn = line.turn.max(self.round);
                Some(((turn, Reverse(bid), place), account))
            })
            .min()
            .map(|((_, _, place), account)| (account.clone(), place))
    }

    /// Serves a request: its account has had its turn.
    pub fn serve(&mut self, account: &str, place: Place) {
        if let Some(line) = self.accounts.get_mut(account) {
            line.waiting.remove(&place);
            self.round = self.round.max(line.turn);
            line.turn = self.round + 1;
        }
        self.forget();
    }

    /// An account that neither waits nor was served in this round leaves no trace.
    fn forget(&mut self) {
        let round = self.round;
        self.accounts.retain(|_, line| !line.waiting.is_empty() || line.turn > round);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lane(requests: &[(&str, i64)]) -> Lane {
        let mut lane = Lane::default();
        for (account, at) in requests {
            lane.insert(account, (*at, Uuid::from_u128(u128::try_from(*at).unwrap())));
        }
        lane
    }

    fn order(mut lane: Lane, bid: impl Fn(u128) -> u64) -> Vec<i64> {
        let mut order = Vec::new();
        while let Some((account, place)) = lane.next(|id| Some(bid(id.as_u128()))) {
            lane.serve(&account, place);
            order.push(place.0);
        }
        order
    }

    #[test]
    fn table_of_orders() {
        type Case<'a> = (&'a str, &'a [(&'a str, i64)], fn(u128) -> u64, &'a [i64]);
        let cases: &[Case] = &[
            ("one account: first come first served", &[("a", 3), ("a", 1), ("a", 2)], |_| 0, &[1, 2, 3]),
            (
                "one account: a bid passes nobody of its own",
                &[("a", 1), ("a", 2)],
                |id| u64::from(id == 2),
                &[1, 2],
            ),
            (
                "turns: the flood of one does not hold up another",
                &[("a", 1), ("a", 2), ("a", 3), ("b", 4), ("b", 5)],
                |_| 0,
                &[1, 4, 2, 5, 3],
            ),
            (
                "bids order a round",
                &[("a", 1), ("a", 2), ("b", 3), ("c", 4)],
                |id| u64::try_from(id).unwrap(),
                &[4, 3, 1, 2],
            ),
        ];
        for (name, requests, bid, expected) in cases {
            assert_eq!(order(lane(requests), bid), *expected, "{name}");
        }
    }

    #[test]
    fn who_comes_back_has_saved_nothing_and_who_was_served_waits_for_the_next_round() {
        let mut lane = lane(&[("a", 1), ("b", 2)]);
        let next = |lane: &Lane| lane.next(|_| Some(0)).map(|(account, place)| (account, place.0));
        lane.serve("a", (1, Uuid::from_u128(1)));
        lane.insert("a", (3, Uuid::from_u128(3)));
        assert_eq!(next(&lane), Some(("b".into(), 2)), "a had its turn in this round");
        lane.serve("b", (2, Uuid::from_u128(2)));
        lane.insert("late", (4, Uuid::from_u128(4)));
        assert_eq!(next(&lane), Some(("late".into(), 4)), "late joins the round that is under way");
    }

    #[test]
    fn what_cannot_be_served_keeps_its_place() {
        let lane = lane(&[("a", 1), ("a", 2)]);
        let two = lane.next(|id| (id.as_u128() == 2).then_some(0));
        assert_eq!(two.map(|(_, place)| place.0), Some(2));
        assert_eq!(lane.next(|_| Some(0)).map(|(_, place)| place.0), Some(1));
        assert_eq!(lane.next(|_| None), None);
    }
}
