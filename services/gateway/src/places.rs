//! Places for prompts that are read or wait for it, of which no account takes all.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

/// Accounts that find their share when all want as much as they get.
const SHARES: usize = 8;

pub(crate) struct Places {
    most: usize,
    taken: Arc<Mutex<Taken>>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_account: HashMap<String, usize>,
}

/// Why there is no place.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Full {
    All,
    /// This account's share, of so many places.
    Share(usize),
}

impl Places {
    pub(crate) fn new(most: usize) -> Self {
        Self { most, taken: Arc::default() }
    }

    /// A place, until it is dropped. While half of all are free an account gets more than its share.
    ///
    /// # Errors
    /// [`Full`].
    pub(crate) fn take(&self, account: &str) -> Result<Place, Full> {
        let mut taken = self.taken.lock();
        if taken.all >= self.most {
            return Err(Full::All);
        }
        let (own, share) = (taken.by_account.get(account).copied().unwrap_or(0), self.most.div_ceil(SHARES));
        if own >= share && taken.all >= self.most.div_ceil(2) {
            return Err(Full::Share(share));
        }
        taken.all += 1;
        taken.by_account.insert(account.to_owned(), own + 1);
        Ok(Place { account: account.to_owned(), taken: self.taken.clone() })
    }
}

#[derive(Debug)]
pub(crate) struct Place {
    account: String,
    taken: Arc<Mutex<Taken>>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.taken.lock();
        taken.all -= 1;
        let own = taken.by_account.get(&self.account).copied().unwrap_or(0);
        if own > 1 {
            taken.by_account.insert(std::mem::take(&mut self.account), own - 1);
        } else {
            taken.by_account.remove(&self.account);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_gets_half_and_others_their_share() {
        let places = Places::new(64);
        let mut held: Vec<Place> = (0..32).map(|_| places.take("a").unwrap()).collect();
        assert_eq!(places.take("a").unwrap_err(), Full::Share(8));
        for account in ["b", "c", "d", "e"] {
            held.extend((0..8).map(|_| places.take(account).unwrap()));
            assert!(places.take(account).is_err());
        }
        assert_eq!(places.take("f").unwrap_err(), Full::All);
        held.clear();
        assert!(places.taken.lock().by_account.is_empty());
        held.extend((0..32).map(|_| places.take("b").unwrap()));
    }

    #[test]
    fn few_places_are_shared_as_well() {
        let places = Places::new(2);
        let _place = places.take("a").unwrap();
        assert_eq!(places.take("a").unwrap_err(), Full::Share(1));
        let _other = places.take("b").unwrap();
        assert_eq!(places.take("c").unwrap_err(), Full::All);
    }
}
