//! What operators have at stake (protocol sections 8 and 10): a fresh start costs a new stake.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::bytes::Address;

/// As the chain's staking contract says, amounts in 10^-6 INFER.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stakes {
    /// What an operator needs for work; the holders decide it.
    pub minimum_micro: u64,
    /// Of those who have any. What is on its way out does not count.
    pub active_micro: BTreeMap<Address, u64>,
}

impl Stakes {
    pub fn of(&self, operator: &Address) -> u64 {
        self.active_micro.get(operator).copied().unwrap_or(0)
    }

    /// Whether the operator may work.
    pub fn is_enough(&self, operator: &Address) -> bool {
        self.of(operator) >= self.minimum_micro
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_minimum_is_enough_and_nothing_is_where_none_is_asked() {
        let operator = |n: u8| Address([n; 20]);
        let stakes = |minimum_micro| Stakes {
            minimum_micro,
            active_micro: BTreeMap::from([(operator(1), 5), (operator(2), 4)]),
        };
        let enough = |minimum| [1, 2, 3].map(|n| stakes(minimum).is_enough(&operator(n)));
        assert_eq!([enough(0), enough(5)], [[true; 3], [true, false, false]]);
        let text = serde_json::to_string(&stakes(5)).unwrap();
        assert_eq!(serde_json::from_str::<Stakes>(&text).unwrap(), stakes(5));
    }
}
