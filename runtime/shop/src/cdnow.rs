//! The public CDNOW data set: 69,659 purchases by 23,570 customers, 1997-01-01 to 1998-06-30.
//!
//! The file has customer, date, number of discs and amount. Order, product and region are derived
//! from those, the discount is always zero; `data/README.md` says which column comes from where.
//!
//! Reading is all or nothing: a damaged file gives an error, never the rows before the damage.

use std::io::{self, Read};

use chrono::NaiveDate;
use flate2::read::MultiGzDecoder;

/// The data set as shipped, gzip compressed (405,115 bytes).
pub const BYTES: &[u8] = include_bytes!("../data/cdnow_master.txt.gz");

/// The header line, without its line end. Blanks are part of it.
pub const HEADER: &str = " customer_id  date number_of_cds  dollar_value";

/// The regions a customer can be in, in the order the hash picks from.
pub const REGIONES: [&str; 5] = ["centro", "este", "norte", "oeste", "sur"];

/// The header line of [`to_csv`], without its line end.
pub const CSV_HEADER: &str = "order_id,user_id,product_id,monto,descuento,region,timestamp_venta,fecha";

const FIELDS: &str = "four fields separated by blanks: customer_id date number_of_cds dollar_value";
const AMOUNT: &str = "digits with up to two decimals, at most 92233720368547758.07";

/// Most bytes of text for each byte of a compressed file; the shipped one has six.
const TEXT_PER_BYTE_MAX: u64 = 128;

/// The longest value an error repeats, in characters: a damaged file can have one endless line.
const SHOWN: usize = 80;

/// Why the data set cannot be read.
///
/// Lines count from 1, the header being line 1, and are lines of the uncompressed text.
#[derive(Debug, thiserror::Error)]
pub enum CdnowError {
    /// The compressed stream ends early, or the text ends inside a line.
    #[error("line {line}, column {column}: found {found:?}, expected {expected}")]
    Truncated {
        /// The line in which the text ends.
        line: usize,
        /// Always `line end`.
        column: &'static str,
        /// The text of that line so far, at most 80 characters.
        found: String,
        /// What should have followed.
        expected: &'static str,
        /// What the decompressor reported, or an unexpected end of file if only the text is cut.
        source: io::Error,
    },
    /// The bytes are not gzip, or the compressed stream is damaged.
    #[error("line {line}, column {column}: found {found:?}, expected {expected}")]
    Gzip {
        /// The last line that could be uncompressed at least in part, 1 if there is none.
        line: usize,
        /// Always `gzip stream`.
        column: &'static str,
        /// The text of that line so far, at most 80 characters.
        found: String,
        /// What should have followed.
        expected: &'static str,
        /// What the decompressor reported.
        source: io::Error,
    },
    /// Line 1 is not [`HEADER`].
    #[error("line 1, column header: found {found:?}, expected {expected:?}")]
    Header {
        /// Line 1 without its line end, at most 80 characters.
        found: String,
        /// [`HEADER`].
        expected: &'static str,
    },
    /// A purchase that cannot be read.
    #[error("line {line}, column {column}: found {found:?}, expected {expected}")]
    Line {
        /// The line, 2 or more.
        line: usize,
        /// The column as the header names it, or `line` if the line as a whole is wrong.
        column: &'static str,
        /// The value, at most 80 characters.
        found: String,
        /// What the column takes.
        expected: &'static str,
    },
}

/// One purchase.
///
/// There is no field for the time of sale: the file has none, so it is midnight UTC of `fecha`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Purchase {
    /// Line number in the file as a decimal number; the header is line 1, so 2 or more.
    pub order_id: String,
    /// Customer as in the file: digits, leading zeros kept.
    pub user_id: String,
    /// `P` and the number of discs, padded to at least three digits.
    pub product_id: String,
    /// Amount in US cents; 0 or more as read, and 0 in 80 purchases of [`BYTES`].
    pub monto_cents: i64,
    /// One of [`REGIONES`], always the same for a customer.
    pub region: &'static str,
    /// Day of sale; 1997-01-01 to 1998-06-30 in [`BYTES`].
    pub fecha: NaiveDate,
}

/// Reads a gzip compressed file in the format of [`BYTES`], in the order of the file.
///
/// Lines end in CRLF or LF, the last one too.
///
/// # Errors
///
/// [`CdnowError::Truncated`] if the compressed stream or the last line is cut short,
/// [`CdnowError::Gzip`] if the bytes are damaged or not gzip, [`CdnowError::Header`] if line 1 is not
/// [`HEADER`], [`CdnowError::Line`] if a purchase has other than four fields or a value its column
/// does not take. No error comes with a part of the purchases.
pub fn parse(gz: &[u8]) -> Result<Vec<Purchase>, CdnowError> {
    let text = gunzip(gz)?;
    let mut lines = text.split_inclusive(|byte| *byte == b'\n').enumerate();

    // An empty text has no line at all, and so no header either.
    let header: &[u8] = match lines.next() {
        Some((_, raw)) => without_end(1, raw)?,
        None => &[],
    };
    if header != HEADER.as_bytes() {
        return Err(CdnowError::Header { found: shown(header), expected: HEADER });
    }

    lines
        .map(|(index, raw)| {
            let line = index + 1;
            purchase(line, without_end(line, raw)?)
        })
        .collect()
}

/// Writes purchases as CSV: [`CSV_HEADER`] first, then one line for each, all ending in LF.
///
/// `monto` is in US dollars with two decimals, `descuento` is `0.00`, `timestamp_venta` is midnight
/// UTC of `fecha`. Identifiers are written as they are: those [`parse`] gives never need quotes, and
/// other callers must keep commas, quotes and line ends out of them.
pub fn to_csv(purchases: &[Purchase]) -> String {
    let mut csv = String::from(CSV_HEADER);
    csv.push('\n');
    for purchase in purchases {
        let Purchase { order_id, user_id, product_id, monto_cents, region, fecha } = purchase;
        let monto = dollars(*monto_cents);
        csv.push_str(&format!("{order_id},{user_id},{product_id},{monto},0.00,{region},{fecha}T00:00:00Z,{fecha}\n"));
    }
    csv
}

/// All of the text, or an error: what was read before the damage only serves to say where it is.
fn gunzip(gz: &[u8]) -> Result<Vec<u8>, CdnowError> {
    let mut text = Vec::new();
    // A short file can hold gigabytes of one character. What people buy repeats itself less.
    let bytes_max = (gz.len() as u64).saturating_mul(TEXT_PER_BYTE_MAX);
    // The decoder for many members also rejects bytes after the end, which the plain one ignores.
    match MultiGzDecoder::new(gz).take(bytes_max + 1).read_to_end(&mut text) {
        Ok(_) if text.len() as u64 > bytes_max => Err(CdnowError::Gzip {
            line: 1 + text.iter().filter(|byte| **byte == b'\n').count(),
            column: "gzip stream",
            found: format!("more than {bytes_max} bytes of text"),
            expected: "at most 128 bytes of text for each byte of the file",
            source: io::ErrorKind::InvalidData.into(),
        }),
        Ok(_) => Ok(text),
        Err(source) => {
            let line = 1 + text.iter().filter(|byte| **byte == b'\n').count();
            let rest = text.rsplit(|byte| *byte == b'\n').next().unwrap_or(&[]);
            let found = shown(rest);
            Err(if source.kind() == io::ErrorKind::UnexpectedEof {
                CdnowError::Truncated {
                    line,
                    column: "line end",
                    found,
                    expected: "more gzip data: the compressed stream is cut short",
                    source,
                }
            } else {
                CdnowError::Gzip { line, column: "gzip stream", found, expected: "valid gzip data", source }
            })
        }
    }
}

/// A line without its line end, which even the last line must have: without it, the last amount
/// could be the beginning of a longer one.
fn without_end(line: usize, raw: &[u8]) -> Result<&[u8], CdnowError> {
    match raw.strip_suffix(b"\n") {
        Some(text) => Ok(text.strip_suffix(b"\r").unwrap_or(text)),
        None => Err(CdnowError::Truncated {
            line,
            column: "line end",
            found: shown(raw),
            expected: "a line end: the text is cut short",
            source: io::Error::from(io::ErrorKind::UnexpectedEof),
        }),
    }
}

fn purchase(line: usize, raw: &[u8]) -> Result<Purchase, CdnowError> {
    let wrong = |column: &'static str, found: &[u8], expected: &'static str| CdnowError::Line {
        line,
        column,
        found: shown(found),
        expected,
    };

    let text = std::str::from_utf8(raw).map_err(|_| wrong("line", raw, "utf-8 text"))?;
    let fields: Vec<&str> = text.split_ascii_whitespace().collect();
    let &[customer, date, discs, amount] = fields.as_slice() else {
        return Err(wrong("line", raw, FIELDS));
    };

    if !is_digits(customer) {
        return Err(wrong("customer_id", customer.as_bytes(), "digits"));
    }
    let fecha = day(date).ok_or_else(|| wrong("date", date.as_bytes(), "a day of the calendar as eight digits, yyyymmdd"))?;
    let discs = number(discs).ok_or_else(|| wrong("number_of_cds", discs.as_bytes(), "digits, at most 4294967295"))?;
    let monto_cents = cents(amount).ok_or_else(|| wrong("dollar_value", amount.as_bytes(), AMOUNT))?;

    Ok(Purchase {
        order_id: line.to_string(),
        user_id: customer.to_owned(),
        product_id: format!("P{discs:03}"),
        monto_cents,
        region: region(customer),
        fecha,
    })
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// The digits are checked first because the parser of the standard library also takes a plus sign.
fn number(text: &str) -> Option<u32> {
    if !is_digits(text) {
        return None;
    }
    text.parse().ok()
}

fn day(text: &str) -> Option<NaiveDate> {
    if text.len() != 8 || !is_digits(text) {
        return None;
    }
    let year = text.get(..4)?.parse().ok()?;
    let month = text.get(4..6)?.parse().ok()?;
    let day = text.get(6..)?.parse().ok()?;
    NaiveDate::from_ymd_opt(year, month, day)
}

/// Cents are counted in whole numbers throughout: a float would not hold most amounts exactly.
fn cents(text: &str) -> Option<i64> {
    let (whole, decimals) = match text.split_once('.') {
        Some((whole, decimals)) => (whole, Some(decimals)),
        None => (text, None),
    };
    if !is_digits(whole) {
        return None;
    }
    let fraction: i64 = match decimals {
        None => 0,
        Some(digits) if !is_digits(digits) => return None,
        // One decimal counts tenths of a dollar.
        Some(digits) if digits.len() == 1 => digits.parse::<i64>().ok()? * 10,
        Some(digits) if digits.len() == 2 => digits.parse().ok()?,
        Some(_) => return None,
    };
    whole.parse::<i64>().ok()?.checked_mul(100)?.checked_add(fraction)
}

fn dollars(cents: i64) -> String {
    // The sign is written apart: minus five cents has no whole dollars to carry it.
    let sign = if cents < 0 { "-" } else { "" };
    let size = cents.unsigned_abs();
    format!("{sign}{}.{:02}", size / 100, size % 100)
}

fn region(customer: &str) -> &'static str {
    let index = fnv1a64(customer.as_bytes()) % REGIONES.len() as u64;
    REGIONES[index as usize]
}

/// The 64-bit FNV-1a hash. The hasher of the standard library may change between versions, and with
/// it every region.
fn fnv1a64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

fn shown(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().take(SHOWN).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::error::Error;
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    fn gzip(text: &str) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap()
    }

    fn with_header(lines: &str) -> Vec<u8> {
        gzip(&format!("{HEADER}\r\n{lines}"))
    }

    #[test]
    fn the_embedded_file_is_whole() {
        let purchases = parse(BYTES).unwrap();
        assert_eq!(purchases.len(), 69_659);
        let zero = purchases.iter().filter(|p| p.monto_cents == 0).count();
        assert_eq!(zero, 80);
        let customers: BTreeSet<&str> = purchases.iter().map(|p| p.user_id.as_str()).collect();
        assert_eq!(customers.len(), 23_570);
        let total: i64 = purchases.iter().map(|p| p.monto_cents).sum();
        assert_eq!(total, 250_031_563);
        let first_day = purchases.iter().map(|p| p.fecha).min();
        assert_eq!(first_day, NaiveDate::from_ymd_opt(1997, 1, 1));
        let last_day = purchases.iter().map(|p| p.fecha).max();
        assert_eq!(last_day, NaiveDate::from_ymd_opt(1998, 6, 30));
    }

    #[test]
    fn a_purchase_is_mapped_and_written() {
        let purchases = parse(with_header(" 00001 19970101  1   11.77\r\n").as_slice()).unwrap();
        let expected = Purchase {
            order_id: "2".to_owned(),
            user_id: "00001".to_owned(),
            product_id: "P001".to_owned(),
            monto_cents: 1177,
            region: region("00001"),
            fecha: NaiveDate::from_ymd_opt(1997, 1, 1).unwrap(),
        };
        assert_eq!(purchases, [expected]);
        assert_eq!(
            to_csv(&purchases),
            format!("{CSV_HEADER}\n2,00001,P001,11.77,0.00,{},1997-01-01T00:00:00Z,1997-01-01\n", region("00001"))
        );
    }

    #[test]
    fn the_hash_is_the_published_one() {
        assert_eq!(fnv1a64(b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a64(b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(fnv1a64(b"foobar"), 0x8594_4171_f739_67e8);
    }

    #[test]
    fn truncated_bytes_are_an_error() {
        for length in [0, 5, 1_000, BYTES.len() / 2, BYTES.len() - 1] {
            let error = parse(&BYTES[..length]).unwrap_err();
            assert!(matches!(error, CdnowError::Truncated { .. }), "{length} bytes: {error:?}");
            let source = error.source().unwrap().to_string();
            assert!(!error.to_string().contains(&source), "{error}");
        }
    }

    #[test]
    fn a_last_line_without_end_is_truncated() {
        let error = parse(&with_header("00001 19970101 1 11.7")).unwrap_err();
        assert!(matches!(error, CdnowError::Truncated { line: 2, .. }), "{error:?}");
    }

    #[test]
    fn damaged_bytes_are_an_error() {
        let plain = parse(b"this is no compressed file").unwrap_err();
        assert!(matches!(plain, CdnowError::Gzip { .. }), "{plain:?}");

        let mut longer = BYTES.to_vec();
        longer.extend_from_slice(b"bytes after the end");
        let error = parse(&longer).unwrap_err();
        assert!(matches!(error, CdnowError::Gzip { .. }), "{error:?}");
    }

    #[test]
    fn a_bad_header_is_named() {
        for text in ["", "customer,date\r\n", "00001 19970101 1 11.77\r\n"] {
            let error = parse(&gzip(text)).unwrap_err();
            assert!(matches!(error, CdnowError::Header { .. }), "{error:?}");
            let message = error.to_string();
            assert!(message.contains("line 1"), "{message}");
            assert!(message.contains(text.trim_end()), "{message}");
            assert!(message.contains(HEADER), "{message}");
        }
    }

    #[test]
    fn a_bad_value_is_named_with_line_and_column() {
        let cases = [
            ("0000x 19970101 1 1.00", "customer_id", "0000x"),
            ("00001 19970230 1 1.00", "date", "19970230"),
            ("00001 1997011 1 1.00", "date", "1997011"),
            ("00001 19970101 +1 1.00", "number_of_cds", "+1"),
            ("00001 19970101 4294967296 1.00", "number_of_cds", "4294967296"),
            ("00001 19970101 1 11.777", "dollar_value", "11.777"),
            ("00001 19970101 1 -1.00", "dollar_value", "-1.00"),
            ("00001 19970101 1 1.", "dollar_value", "1."),
            ("00001 19970101 1 .5", "dollar_value", ".5"),
            ("00001 19970101 1 92233720368547758.08", "dollar_value", "92233720368547758.08"),
            ("00001 19970101 1", "line", "00001 19970101 1"),
            ("", "line", ""),
        ];
        for (text, wrong_column, wrong_value) in cases {
            let lines = format!("00001 19970101 1 11.77\r\n{text}\r\n");
            let error = parse(&with_header(&lines)).unwrap_err();
            let message = error.to_string();
            let start = format!("line 3, column {wrong_column}: found {wrong_value:?}, expected ");
            assert!(message.starts_with(&start), "{message}");
        }
    }

    #[test]
    fn amounts_are_exact() {
        assert_eq!(cents("0.00"), Some(0));
        assert_eq!(cents("12"), Some(1200));
        assert_eq!(cents("12.3"), Some(1230));
        assert_eq!(cents("12.03"), Some(1203));
        assert_eq!(cents("92233720368547758.07"), Some(i64::MAX));
        assert_eq!(dollars(0), "0.00");
        assert_eq!(dollars(1203), "12.03");
        assert_eq!(dollars(-5), "-0.05");
    }
}
