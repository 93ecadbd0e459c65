//! Which blocks of the key-value cache belong to whom, and which prompts' beginnings are in it already.
//!
//! A full block is known by the hash of all tokens from the start of the sequence to its end. Blocks of ended sequences
//! stay, least recently used first to go; a new sequence that begins with the same tokens takes them as they are. Since
//! the kernels give the same bits for a token however its prompt was cut, a cached block equals a computed one.

use std::collections::{BTreeMap, HashMap};

use infera_kernels::KvPool;

/// Tokens of a block.
pub(super) const BLOCK: usize = KvPool::BLOCK;

type Hash = [u8; 32];

#[derive(Debug, Clone, Default)]
struct Block {
    users: u32,
    hash: Option<Hash>,
    /// When its last user left.
    left: u64,
}

/// All blocks of a pool.
#[derive(Debug)]
pub(super) struct Blocks {
    blocks: Vec<Block>,
    free: Vec<u32>,
    by_hash: HashMap<Hash, u32>,
    /// Blocks without a user whose content is known, by when the last one left.
    idle: BTreeMap<u64, u32>,
    clock: u64,
}

/// The blocks of one sequence.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub blocks: Vec<u32>,
    /// Tokens whose keys and values are in the cache.
    pub length: usize,
    /// Hash of all full blocks so far that were looked up or registered.
    chain: Hash,
    known: usize,
}

impl Table {
    /// Of a sequence that has one place for all its tokens.
    pub fn of_place(place: u32, length: usize) -> Self {
        Self { blocks: vec![place], length, ..Self::default() }
    }
}

fn extend(chain: &Hash, tokens: &[u32]) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(chain);
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    hasher.finalize().into()
}

impl Blocks {
    pub fn new(count: usize) -> Self {
        Self {
            blocks: vec![Block::default(); count],
            free: (0..count as u32).rev().collect(),
            by_hash: HashMap::new(),
            idle: BTreeMap::new(),
            clock: 0,
        }
    }

    /// Blocks that a new sequence may take.
    pub fn available(&self) -> usize {
        self.free.len() + self.idle.len()
    }

    /// Blocks for a sequence of at most `capacity` tokens that begins with `prompt`; as much of the prompt as the cache
    /// has is in it already, but never its last token, whose logits are needed. `None` while there is no room.
    pub fn open(&mut self, prompt: &[u32], capacity: usize) -> Option<Table> {
        let mut table = Table::default();
        for tokens in prompt[..prompt.len().saturating_sub(1)].chunks_exact(BLOCK) {
            let hash = extend(&table.chain, tokens);
            let Some(block) = self.by_hash.get(&hash).copied() else { break };
            self.take(block);
            table.blocks.push(block);
            table.chain = hash;
        }
        table.known = table.blocks.len();
        table.length = table.known * BLOCK;
        let missing = capacity.div_ceil(BLOCK).saturating_sub(table.known);
        if missing > self.available() {
            self.close(&table);
            return None;
        }
        for _ in 0..missing {
            table.blocks.extend(self.fresh());
        }
        Some(table)
    }

    fn take(&mut self, block: u32) {
        let entry = &mut self.blocks[block as usize];
        if entry.users == 0 {
            self.idle.remove(&entry.left);
        }
        entry.users += 1;
    }

    fn fresh(&mut self) -> Option<u32> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => {
                let (_, block) = self.idle.pop_first()?;
                if let Some(hash) = self.blocks[block as usize].hash.take() {
                    self.by_hash.remove(&hash);
                }
                block
            }
        };
        self.blocks[block as usize].users = 1;
        Some(block)
    }

    /// Makes the blocks that are full by now findable; `tokens` are the sequence's first `table.length` tokens at least.
    pub fn remember(&mut self, table: &mut Table, tokens: impl Fn(usize) -> u32) {
        while (table.known + 1) * BLOCK <= table.length {
            let start = table.known * BLOCK;
            let content: Vec<u32> = (start..start + BLOCK).map(&tokens).collect();
            table.chain = extend(&table.chain, &content);
            let block = table.blocks[table.known];
            // Another sequence may have computed the same at the same time: then this copy stays unknown.
            if let std::collections::hash_map::Entry::Vacant(entry) = self.by_hash.entry(table.chain) {
                entry.insert(block);
                self.blocks[block as usize].hash = Some(table.chain);
            }
            table.known += 1;
        }
    }

    /// Gives a sequence's blocks back.
    pub fn close(&mut self, table: &Table) {
        // The last block first: a beginning is worth more than what followed it.
        for block in table.blocks.iter().rev() {
            let entry = &mut self.blocks[*block as usize];
            entry.users -= 1;
            if entry.users > 0 {
                continue;
            }
            if entry.hash.is_some() {
                self.clock += 1;
                entry.left = self.clock;
                self.idle.insert(self.clock, *block);
            } else {
                self.free.push(*block);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fill(blocks: &mut Blocks, table: &mut Table, tokens: &[u32]) {
        table.length = tokens.len();
        blocks.remember(table, |i| tokens[i]);
    }

    #[test]
    fn a_beginning_is_shared_and_the_last_token_is_computed() {
        let mut blocks = Blocks::new(10);
        let prompt: Vec<u32> = (0..48).collect();
        let mut first = blocks.open(&prompt, 64).unwrap();
        assert_eq!((first.length, first.blocks.len()), (0, 4));
        fill(&mut blocks, &mut first, &prompt);
        let second = blocks.open(&prompt, 64).unwrap();
        assert_eq!(second.length, 32, "the third block has the last token");
        assert_eq!(second.blocks[..2], first.blocks[..2]);
        assert_eq!(blocks.available(), 4);
        let mut other = prompt.clone();
        other[0] = 99;
        assert_eq!(blocks.open(&other, 48).unwrap().length, 0, "a block is known by all that precedes it");
    }

    #[test]
    fn ended_sequences_are_found_until_their_room_is_needed() {
        let mut blocks = Blocks::new(4);
        let (a, b): (Vec<u32>, Vec<u32>) = ((0..33).collect(), (100..133).collect());
        let mut first = blocks.open(&a, 33).unwrap();
        fill(&mut blocks, &mut first, &a);
        assert!(blocks.open(&b, 33).is_none(), "one block is left");
        blocks.close(&first);
        assert_eq!(blocks.available(), 4);
        let again = blocks.open(&a, 33).unwrap();
        assert_eq!(again.length, 32);
        blocks.close(&again);
        let second = blocks.open(&b, 64).unwrap();
        assert_eq!((second.blocks.len(), second.length), (4, 0));
        blocks.close(&second);
        assert_eq!(blocks.open(&a, 33).unwrap().length, 0, "it had to go");
    }

    proptest! {
        #[test]
        fn no_block_is_lost_or_given_twice(steps in proptest::collection::vec((0u32..4, 1usize..80, any::<bool>()), 1..60)) {
            let mut blocks = Blocks::new(12);
            let mut open: Vec<(Table, Vec<u32>)> = Vec::new();
            for (kind, length, close) in steps {
                if close && !open.is_empty() {
                    let (table, _) = open.remove(length % open.len());
                    blocks.close(&table);
                } else {
                    let tokens: Vec<u32> = (0..length as u32).map(|i| i / 20 * kind).collect();
                    if let Some(mut table) = blocks.open(&tokens, length) {
                        fill(&mut blocks, &mut table, &tokens);
                        open.push((table, tokens));
                    }
                }
                // Shared blocks hold the same tokens in the same places.
                let mut seen: HashMap<u32, Vec<u32>> = HashMap::new();
                for (table, tokens) in &open {
                    for (i, block) in table.blocks.iter().enumerate() {
                        let content = tokens[..tokens.len().min((i + 1) * BLOCK)].to_vec();
                        if let Some(other) = seen.insert(*block, content.clone()) {
                            prop_assert_eq!(other, content);
                        }
                    }
                }
                prop_assert_eq!(seen.len() + blocks.available(), 12);
            }
            for (table, _) in open {
                blocks.close(&table);
            }
            prop_assert_eq!(blocks.available(), 12);
        }
    }
}
