//! Inputs that are nearly valid: a seed with a few changes, drawn from a number.
//!
//! The same number gives the same input everywhere, so a failure is named by target and number. What it leaves out is what a
//! fuzzer knows: which changes reach new code.

/// SplitMix64.
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// A number below `bound`; 0 for a bound of 0.
    pub fn below(&mut self, bound: usize) -> usize {
        if bound == 0 { 0 } else { (self.next() % bound as u64) as usize }
    }
}

/// Longest input that is made, in bytes.
pub const INPUT_BYTES_MAX: usize = 1 << 16;

/// Bytes that decoders stumble over: ends of varints, lengths, signs, quotes and brackets.
const TROUBLE: [&[u8]; 22] = [
    &[0],
    &[0xff],
    &[0x7f],
    &[0x80],
    &[0xff, 0xff, 0xff, 0xff],
    &[0x7f, 0xff, 0xff, 0xff],
    &[0x80, 0, 0, 0],
    &[0xff; 8],
    &[0x80; 10],
    &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01],
    b"\"",
    b"{",
    b"[[[[[[[[",
    b"}",
    b"\\u0000",
    b"-",
    b"1e999",
    b"99999999999999999999",
    b"9223372036854775807",
    b"\n",
    b"\xc3",
    b"null",
];

/// The `number`-th input made of these seeds.
pub fn input(seeds: &[Vec<u8>], number: u64) -> Vec<u8> {
    let mut random = Random(number.wrapping_mul(0xd134_2543_de82_ef95));
    let mut bytes = seeds.get(random.below(seeds.len())).cloned().unwrap_or_default();
    for _ in 0..=random.below(4) {
        let (at, rest) = (random.below(bytes.len() + 1), random.next());
        let to = bytes.len().min(at + 1 + (rest >> 8) as usize % 24);
        match rest % 8 {
            0 if at < bytes.len() => bytes[at] ^= 1 << (rest >> 8 & 7),
            1 if at < bytes.len() => bytes[at] = (rest >> 8) as u8,
            2 => drop(bytes.splice(at..at, TROUBLE[(rest >> 8) as usize % TROUBLE.len()].iter().copied())),
            3 => {
                let trouble = TROUBLE[(rest >> 8) as usize % TROUBLE.len()];
                let to = bytes.len().min(at + trouble.len());
                drop(bytes.splice(at..to, trouble.iter().copied()));
            }
            4 => drop(bytes.drain(at..to)),
            5 => {
                let again = bytes[at..to].to_vec();
                drop(bytes.splice(at..at, again));
            }
            6 => bytes.truncate(at),
            _ => {
                // The end of another seed behind the beginning of this one.
                let other = &seeds[(rest >> 8) as usize % seeds.len().max(1)];
                let from = random.below(other.len() + 1);
                bytes.truncate(at);
                bytes.extend_from_slice(&other[from..]);
            }
        }
        bytes.truncate(INPUT_BYTES_MAX);
    }
    bytes
}
