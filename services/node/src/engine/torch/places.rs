//! Which place of the cache belongs to whom, and which prompts' beginnings are in it already.
//!
//! A place is contiguous room for one sequence; a batch of next tokens is computed for the places from the first one on,
//! so that its addresses never change. Hence new sequences take the lowest free place, sequences move down when lower
//! places become free, and a beginning that lies in another place, busy or not, is copied instead of computed.

use super::super::kv::Table;

/// Fewer tokens are computed, not copied.
const LEAST: usize = 16;

/// The first `tokens` tokens' keys and values of a place are copied to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct Move {
    pub from: u32,
    pub to: u32,
    pub tokens: usize,
}

#[derive(Debug, Default)]
struct Place {
    busy: bool,
    /// Whose keys and values lie here, from the first on.
    tokens: Vec<u32>,
}

/// All places of a cache.
#[derive(Debug)]
pub(in super::super) struct Places {
    /// Tokens of a place.
    context: usize,
    places: Vec<Place>,
    moves: Vec<Move>,
}

/// Places of the batch that has the first `used` of them: a power of two.
pub(super) fn bucket(used: usize) -> usize {
    used.next_power_of_two()
}

impl Places {
    pub fn new(count: usize, context: usize) -> Self {
        let places = std::iter::repeat_with(Place::default).take(count).collect();
        Self { context, places, moves: Vec::new() }
    }

    /// A place for a sequence of at most `capacity` tokens that begins with `prompt`, with as much of the prompt as some
    /// place has, but never its last token, whose logits are needed. `None` while there is no room.
    pub fn open(&mut self, prompt: &[u32], capacity: usize) -> Option<Table> {
        if capacity > self.context {
            return None;
        }
        let to = self.places.iter().position(|p| !p.busy)?;
        let known = &prompt[..prompt.len().saturating_sub(1)];
        let common = |p: &Place| p.tokens.iter().zip(known).take_while(|(a, b)| a == b).count();
        let found = self.places.iter().map(common).enumerate().max_by_key(|(i, n)| (*n, *i == to));
        let (from, length) = found.filter(|(_, n)| *n >= LEAST).unwrap_or((to, 0));
        self.fill(from, to, length);
        Some(Table::of_place(to as u32, length))
    }

    /// Makes a place busy, with the first tokens of another one or its own.
    fn fill(&mut self, from: usize, to: usize, tokens: usize) {
        if from == to {
            self.places[to].tokens.truncate(tokens);
        } else {
            self.places[to].tokens = self.places[from].tokens[..tokens].to_vec();
            self.moves.push(Move { from: from as u32, to: to as u32, tokens });
        }
        self.places[to].busy = true;
    }

    /// Notes which tokens lie in a sequence's place; `token` gives those up to `table.length`.
    pub fn remember(&mut self, table: &Table, token: impl Fn(usize) -> u32) {
        let tokens = &mut self.places[table.blocks[0] as usize].tokens;
        tokens.truncate(table.length);
        tokens.extend((tokens.len()..table.length).map(token));
    }

    /// Frees a sequence's place; what lies there stays until the place is taken.
    pub fn close(&mut self, table: &Table) {
        self.places[table.blocks[0] as usize].busy = false;
    }

    /// Moves sequences down where that makes the batch smaller.
    pub fn compact<'a>(&mut self, tables: impl Iterator<Item = &'a mut Table>) {
        let mut tables: Vec<&mut Table> = tables.collect();
        tables.sort_by_key(|table| table.blocks[0]);
        let all = bucket(tables.len());
        while let Some(last) = tables.pop() {
            let from = last.blocks[0] as usize;
            let free = self.places.iter().position(|p| !p.busy).filter(|free| *free < from);
            let Some(to) = free.filter(|_| bucket(from + 1) > all) else { return };
            self.fill(from, to, last.length);
            self.places[from].busy = false;
            last.blocks[0] = to as u32;
        }
    }

    /// What has to be copied before the next step, in this order.
    pub fn moves(&mut self) -> Vec<Move> {
        std::mem::take(&mut self.moves)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn remember(places: &mut Places, table: &mut Table, tokens: &[u32]) {
        table.length = tokens.len();
        places.remember(table, |i| tokens[i]);
    }

    #[test]
    fn a_beginning_is_copied_and_the_last_token_is_computed() {
        let mut places = Places::new(3, 64);
        let prompt: Vec<u32> = (0..40).collect();
        let mut first = places.open(&prompt, 64).unwrap();
        assert_eq!((first.length, &first.blocks[..]), (0, &[0][..]));
        remember(&mut places, &mut first, &prompt);
        let second = places.open(&prompt, 64).unwrap();
        assert_eq!((second.length, &second.blocks[..]), (39, &[1][..]));
        assert_eq!(places.moves(), [Move { from: 0, to: 1, tokens: 39 }]);
        let other = places.open(&(5..40).collect::<Vec<u32>>(), 64).unwrap();
        assert_eq!((other.length, &other.blocks[..]), (0, &[2][..]));
        assert!(places.open(&prompt, 64).is_none(), "all are busy");
        places.close(&second);
        assert!(places.open(&prompt, 65).is_none(), "too long for a place");
        let again = places.open(&prompt, 64).unwrap();
        assert_eq!((again.length, &again.blocks[..]), (39, &[1][..]));
        assert!(places.moves().is_empty(), "it lies where it is needed");
    }

    #[test]
    fn sequences_move_down_where_the_batch_shrinks() {
        let mut places = Places::new(8, 64);
        let mut tables: Vec<Table> = (0..6u32).map(|i| places.open(&[i], 64).unwrap()).collect();
        for (i, table) in tables.iter_mut().enumerate() {
            remember(&mut places, table, &[i as u32; 5]);
        }
        places.compact(tables.iter_mut());
        assert!(places.moves().is_empty());
        // Left are 1, 4 and 5: a batch of 8 for 3.
        for gone in [3, 2, 0] {
            places.close(&tables.remove(gone));
        }
        places.compact(tables.iter_mut());
        let at: Vec<u32> = tables.iter().map(|t| t.blocks[0]).collect();
        assert_eq!(at, [1, 2, 0]);
        assert_eq!(places.moves(), [Move { from: 5, to: 0, tokens: 5 }, Move { from: 4, to: 2, tokens: 5 }]);
        // A batch of 2 needs places 0 and 1; nothing is won by moving 1 to 0 as long as 2 is busy.
        places.compact(tables.iter_mut());
        assert!(places.moves().is_empty());
    }

    /// What lies in the places if the moves are carried out and every sequence writes its tokens.
    #[derive(Debug)]
    struct Memory(Vec<Vec<u32>>);

    impl Memory {
        fn carry_out(&mut self, places: &mut Places) {
            for Move { from, to, tokens } in places.moves() {
                self.0[to as usize] = self.0[from as usize][..tokens].to_vec();
            }
        }
    }

    proptest! {
        #[test]
        fn every_sequence_finds_its_own_tokens(
            steps in prop::collection::vec((0u32..3, 1usize..60, 0usize..4), 1..80),
        ) {
            let mut places = Places::new(5, 64);
            let mut memory = Memory(vec![Vec::new(); 5]);
            let mut open: Vec<(Table, Vec<u32>)> = Vec::new();
            for (kind, length, what) in steps {
                match what {
                    0 if !open.is_empty() => {
                        let (table, _) = open.remove(length % open.len());
                        places.close(&table);
                    }
                    1 => places.compact(open.iter_mut().map(|(table, _)| table)),
                    _ => {
                        let tokens: Vec<u32> = (0..length as u32).map(|i| i / 25 * kind).collect();
                        let Some(table) = places.open(&tokens, length) else { continue };
                        prop_assert!(table.length < length);
                        open.push((table, tokens));
                    }
                }
                memory.carry_out(&mut places);
                for (table, tokens) in &mut open {
                    let place = &mut memory.0[table.blocks[0] as usize];
                    prop_assert_eq!(&place[..table.length], &tokens[..table.length]);
                    place.truncate(table.length);
                    place.extend(&tokens[table.length..]);
                    remember(&mut places, table, tokens);
                }
                let mut taken: Vec<u32> = open.iter().map(|(table, _)| table.blocks[0]).collect();
                taken.sort_unstable();
                taken.dedup();
                prop_assert_eq!(taken.len(), open.len());
            }
        }
    }
}
