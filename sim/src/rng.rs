//! Randomness as a tree of named streams: seed, component, purpose.
//!
//! A stream's bytes depend on the path of names that leads to it and on nothing else, so one more draw somewhere does not
//! change the meaning of an old seed elsewhere.

use sha2::{Digest, Sha256};

/// A node of the tree, and the stream that begins at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream {
    key: [u8; 32],
    drawn: u64,
}

impl Stream {
    /// The root of a seed's tree.
    pub fn root(seed: u64) -> Self {
        Self { key: Sha256::digest(seed.to_le_bytes()).into(), drawn: 0 }
    }

    /// The child of this name. Draws from the parent do not matter.
    pub fn child(&self, name: &str) -> Self {
        let mut hash = Sha256::new();
        hash.update(self.key);
        hash.update(name.as_bytes());
        Self { key: hash.finalize().into(), drawn: 0 }
    }

    /// The next number.
    pub fn draw(&mut self) -> u64 {
        let mut hash = Sha256::new();
        hash.update(self.key);
        hash.update(self.drawn.to_le_bytes());
        self.drawn += 1;
        let mut word = [0; 8];
        word.copy_from_slice(&hash.finalize()[..8]);
        u64::from_le_bytes(word)
    }

    /// A number from `low` to `high`, both inclusive.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.draw() % (high - low + 1)
    }

    /// True in `share.0` of `share.1` draws.
    pub fn chance(&mut self, share: (u64, u64)) -> bool {
        self.draw() % share.1 < share.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_depends_on_its_path_only() {
        let mut parent = Stream::root(7);
        let before = parent.child("faults").draw();
        parent.draw();
        assert_eq!(parent.child("faults").draw(), before);
        assert_ne!(parent.child("workload").draw(), before);
        assert_ne!(Stream::root(8).child("faults").draw(), before);
    }

    #[test]
    fn numbers_stay_in_range() {
        let mut stream = Stream::root(1);
        let drawn: Vec<u64> = (0..200).map(|_| stream.between(3, 6)).collect();
        assert!((3..=6).all(|n| drawn.contains(&n)) && drawn.iter().all(|n| (3..=6).contains(n)));
    }
}
