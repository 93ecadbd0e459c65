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
    /// Of those who have the minimum; nobody where it is 0. What is on its way out does not count.
    pub active_micro: BTreeMap<Address, u64>,
}

impl Stakes {
    /// Those of `active_micro` who matter: anybody may stake next to nothing in as many names as they like.
    pub fn enough(minimum_micro: u64, active_micro: &BTreeMap<Address, u64>) -> Self {
        let enough = |active: u64| minimum_micro > 0 && active >= minimum_micro;
        let active_micro = active_micro.iter().filter(|(_, active)| enough(**active));
        Self {
            minimum_micro,
            active_micro: active_micro.map(|(operator, active)| (*operator, *active)).collect(),
        }
    }

    /// Whether the operator may work.
    pub fn is_enough(&self, operator: &Address) -> bool {
        self.active_micro.get(operator).copied().unwrap_or(0) >= self.minimum_micro
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_minimum_is_enough_and_nothing_is_where_none_is_asked() {
        let operator = |n: u8| Address([n; 20]);
        let all = BTreeMap::from([(operator(1), 5), (operator(2), 4)]);
        let stakes = |minimum| Stakes::enough(minimum, &all);
        let enough = |minimum| [1, 2, 3].map(|n| stakes(minimum).is_enough(&operator(n)));
        assert_eq!([enough(0), enough(5)], [[true; 3], [true, false, false]]);
        assert_eq!([0, 4, 5, 6].map(|minimum| stakes(minimum).active_micro.len()), [0, 2, 1, 0]);
        let text = serde_json::to_string(&stakes(5)).unwrap();
        assert_eq!(serde_json::from_str::<Stakes>(&text).unwrap(), stakes(5));
    }
}
