//! Money is integers of 10^-6 INFER (protocol section 10).

/// Price of `tokens` on `replicas` nodes; None on overflow.
pub fn cost_micro(price_micro: u64, tokens: u64, replicas: u64) -> Option<u64> {
    price_micro.checked_mul(tokens)?.checked_mul(replicas)
}

/// What is held at admission: k x price x (prompt + max tokens); None on overflow.
pub fn hold_micro(k: u32, price_micro: u64, prompt_tokens: u32, max_tokens: u32) -> Option<u64> {
    cost_micro(price_micro, u64::from(prompt_tokens) + u64::from(max_tokens), u64::from(k))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hold_covers_k_replicas_of_everything_that_may_be_generated() {
        assert_eq!(hold_micro(3, 2, 10, 90), Some(600));
        assert_eq!(hold_micro(3, u64::MAX, 10, 90), None);
    }
}
