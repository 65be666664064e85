//! Avro's binary encoding, read from bytes that nobody vouches for.
//!
//! Every length is compared with the bytes that are left before it is used, so nothing is allocated or skipped by an
//! untrusted length. What it leaves out: schemas.

use super::decode::RejectReason;

/// The bytes of a record that are still to be read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cursor<'a> {
    pub rest: &'a [u8],
}

type Result<T> = std::result::Result<T, RejectReason>;

impl<'a> Cursor<'a> {
    /// The next `n` bytes.
    #[inline]
    pub fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(n).ok_or(RejectReason::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    #[inline]
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (taken, rest) = self.rest.split_first_chunk::<N>().ok_or(RejectReason::Truncated)?;
        self.rest = rest;
        Ok(*taken)
    }

    /// A zigzag varint of at most ten bytes.
    #[inline]
    pub fn long(&mut self) -> Result<i64> {
        match self.rest.split_first() {
            Some((&first, rest)) if first < 0x80 => {
                self.rest = rest;
                Ok(i64::from(first >> 1) ^ -i64::from(first & 1))
            }
            _ => self.long_of_many(),
        }
    }

    fn long_of_many(&mut self) -> Result<i64> {
        let mut value = 0_u64;
        for (i, &byte) in self.rest.iter().take(10).enumerate() {
            // The tenth byte has room for one bit of the 64, and for no continuation.
            if i == 9 && byte > 1 {
                return Err(RejectReason::Malformed("an integer of more than 64 bits"));
            }
            value |= u64::from(byte & 0x7f) << (7 * i);
            if byte < 0x80 {
                self.rest = &self.rest[i + 1..];
                return Ok((value >> 1) as i64 ^ -((value & 1) as i64));
            }
        }
        Err(RejectReason::Truncated)
    }

    #[inline]
    pub fn int(&mut self) -> Result<i32> {
        i32::try_from(self.long()?).map_err(|_| RejectReason::Malformed("an int of more than 32 bits"))
    }

    #[inline]
    pub fn boolean(&mut self) -> Result<bool> {
        match self.array::<1>()? {
            [0] => Ok(false),
            [1] => Ok(true),
            _ => Err(RejectReason::Malformed("a boolean that is neither 0 nor 1")),
        }
    }

    #[inline]
    pub fn float(&mut self) -> Result<f32> {
        self.array().map(f32::from_le_bytes)
    }

    #[inline]
    pub fn double(&mut self) -> Result<f64> {
        self.array().map(f64::from_le_bytes)
    }

    /// Length and bytes.
    #[inline]
    pub fn bytes(&mut self) -> Result<&'a [u8]> {
        let length = self.long()?;
        if length < 0 {
            return Err(RejectReason::Malformed("a negative length"));
        }
        // A length that does not fit is above what is left.
        self.take(usize::try_from(length).unwrap_or(usize::MAX))
    }

    /// Length and UTF-8: the bytes from the text on, those that follow it included, and its length.
    #[inline]
    pub fn text(&mut self) -> Result<(&'a [u8], usize)> {
        let before = self.rest;
        let value = self.bytes()?;
        utf8(value)?;
        let from = before.len() - self.rest.len() - value.len();
        Ok((&before[from..], value.len()))
    }

    /// The index of a union branch or an enum symbol.
    #[inline]
    pub fn index(&mut self, below: usize, what: &'static str) -> Result<usize> {
        usize::try_from(self.long()?).ok().filter(|i| *i < below).ok_or(RejectReason::Malformed(what))
    }
}

/// Checks UTF-8; short ASCII values take the quick way.
#[inline]
pub(super) fn utf8(bytes: &[u8]) -> Result<()> {
    if bytes.is_ascii() || std::str::from_utf8(bytes).is_ok() {
        Ok(())
    } else {
        Err(RejectReason::Malformed("a string that is no UTF-8"))
    }
}

/// An integer of big-endian two's complement bytes, of any length, with an absolute value below `limit`.
#[inline]
pub(super) fn integer(bytes: &[u8], limit: i128) -> Result<i128> {
    let Some(&first) = bytes.first() else { return Err(RejectReason::Malformed("a decimal of no bytes")) };
    let sign = if first < 0x80 { 0_u8 } else { 0xff };
    if bytes.len() <= 8 {
        // Most amounts: one register is enough.
        let value = i128::from(bytes.iter().fold(if sign == 0 { 0 } else { -1 }, |v: i64, b| v << 8 | i64::from(*b)));
        return if value >= limit || value <= -limit { Err(RejectReason::OutOfRange) } else { Ok(value) };
    }
    // More than 16 bytes are fine as long as the leading ones only repeat the sign.
    let (leading, low) = bytes.split_at(bytes.len().saturating_sub(16));
    let wide = leading.iter().any(|b| *b != sign) || (!leading.is_empty() && low.first().is_some_and(|b| (b ^ sign) >= 0x80));
    let value = low.iter().fold(if sign == 0 { 0 } else { -1 }, |v: i128, b| v << 8 | i128::from(*b));
    if wide || value >= limit || value <= -limit { Err(RejectReason::OutOfRange) } else { Ok(value) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn varints_end_where_64_bits_do() {
        let long = |bytes: &[u8]| Cursor { rest: bytes }.long();
        assert_eq!(long(&[0x01]), Ok(-1));
        assert_eq!(long(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01]), Ok(i64::MIN));
        assert_eq!(long(&[0xff; 9]), Err(RejectReason::Truncated));
        assert!(matches!(long(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02]), Err(RejectReason::Malformed(_))));
        assert!(matches!(long(&[0x80; 10]), Err(RejectReason::Malformed(_))));
        assert!(matches!(Cursor { rest: &[0x80, 0x80, 0x80, 0x80, 0x10] }.int(), Err(RejectReason::Malformed(_))));
    }

    #[test]
    fn a_length_above_what_is_left_is_truncated_and_a_negative_one_malformed() {
        let huge = [0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01, b'x'];
        assert_eq!(Cursor { rest: &huge }.bytes(), Err(RejectReason::Truncated));
        assert_eq!(Cursor { rest: &[0x01, b'x'] }.bytes(), Err(RejectReason::Malformed("a negative length")));
    }

    proptest! {
        #[test]
        fn a_decimal_is_the_integer_whose_bytes_these_are(value in -10_i128.pow(12)..10_i128.pow(12), padding in 0_usize..20) {
            let sign = if value < 0 { 0xff } else { 0 };
            let bytes: Vec<u8> = std::iter::repeat_n(sign, padding).chain(value.to_be_bytes()).collect();
            let inside = value > -(10_i128.pow(12));
            prop_assert_eq!(integer(&bytes, 10_i128.pow(12)), if inside { Ok(value) } else { Err(RejectReason::OutOfRange) });
        }

        #[test]
        fn a_decimal_of_other_leading_bytes_is_out_of_range(value: i128, leading in prop::collection::vec(any::<u8>(), 1..8)) {
            let sign = if value < 0 { 0xff } else { 0 };
            prop_assume!(leading.iter().any(|b| *b != sign));
            let bytes: Vec<u8> = leading.into_iter().chain(value.to_be_bytes()).collect();
            prop_assert_eq!(integer(&bytes, 10_i128.pow(38)), Err(RejectReason::OutOfRange));
        }
    }
}
