//! Values that contracts speak of: column types, exact numbers, and the bounds that the standard's operators set.
//!
//! Numbers are decimals, never floats, so that a bound means what is written. What is left out is everything that
//! needs the data: a bound only knows how to judge a number.

use std::{cmp::Ordering, fmt, str::FromStr, sync::Arc};

use arrow::datatypes::{DataType, TimeUnit};

/// A column's type as contracts write it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PhysicalType {
    /// Text, in Unicode.
    String,
    /// `decimal(precision,scale)`, 1 to 38 digits of which `scale` stand after the point.
    Decimal(u8, u8),
    /// An instant in microseconds, UTC.
    Timestamp,
    /// A day.
    Date,
    /// A whole number in 64 bits.
    Int64,
    /// A binary fraction; never money.
    Float64,
    /// True or false.
    Boolean,
}

impl PhysicalType {
    /// What a contract may write, for error messages.
    pub const ALLOWED: &str = "string, decimal(p,s), timestamp, date, int64, float64 or boolean";

    /// The Arrow type of a column.
    pub fn data_type(self) -> DataType {
        match self {
            Self::String => DataType::Utf8,
            Self::Decimal(p, s) => DataType::Decimal128(p, s as i8),
            Self::Timestamp => DataType::Timestamp(TimeUnit::Microsecond, Some(Arc::from("UTC"))),
            Self::Date => DataType::Date32,
            Self::Int64 => DataType::Int64,
            Self::Float64 => DataType::Float64,
            Self::Boolean => DataType::Boolean,
        }
    }

    /// The type of an Arrow column, whichever of Arrow's layouts it has; `None` when contracts have no word for it.
    pub fn of(data_type: &DataType) -> Option<Self> {
        match data_type {
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => Some(Self::String),
            DataType::Decimal128(p, s) => Some(Self::Decimal(*p, u8::try_from(*s).ok()?)),
            DataType::Timestamp(TimeUnit::Microsecond, Some(zone)) if ["UTC", "+00:00"].contains(&zone.as_ref()) => {
                Some(Self::Timestamp)
            }
            DataType::Date32 => Some(Self::Date),
            DataType::Int64 => Some(Self::Int64),
            DataType::Float64 => Some(Self::Float64),
            DataType::Boolean => Some(Self::Boolean),
            _ => None,
        }
    }

    /// The type's name in SQL.
    pub fn sql(self) -> String {
        match self {
            Self::String => "VARCHAR".into(),
            Self::Decimal(p, s) => format!("DECIMAL({p},{s})"),
            Self::Timestamp => "TIMESTAMP".into(),
            Self::Date => "DATE".into(),
            Self::Int64 => "BIGINT".into(),
            Self::Float64 => "DOUBLE".into(),
            Self::Boolean => "BOOLEAN".into(),
        }
    }
}

impl FromStr for PhysicalType {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let text = text.trim();
        Ok(match text {
            "string" => Self::String,
            "timestamp" => Self::Timestamp,
            "date" => Self::Date,
            "int64" => Self::Int64,
            "float64" => Self::Float64,
            "boolean" => Self::Boolean,
            _ => {
                let inner = text.strip_prefix("decimal(").and_then(|t| t.strip_suffix(')')).ok_or(())?;
                let (p, s) = inner.split_once(',').ok_or(())?;
                let (p, s): (u8, u8) = (p.trim().parse().map_err(|_| ())?, s.trim().parse().map_err(|_| ())?);
                if !(1..=38).contains(&p) || s > p {
                    return Err(());
                }
                Self::Decimal(p, s)
            }
        })
    }
}

impl fmt::Display for PhysicalType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::String => f.write_str("string"),
            Self::Decimal(p, s) => write!(f, "decimal({p},{s})"),
            Self::Timestamp => f.write_str("timestamp"),
            Self::Date => f.write_str("date"),
            Self::Int64 => f.write_str("int64"),
            Self::Float64 => f.write_str("float64"),
            Self::Boolean => f.write_str("boolean"),
        }
    }
}

/// An exact decimal number of at most 18 digits: `units / 10^scale`.
#[derive(Debug, Clone, Copy)]
pub struct Number {
    units: i128,
    scale: u32,
}

impl Number {
    /// What a contract may write, for error messages.
    pub const ALLOWED: &str = "a decimal number such as 1000 or 0.5, of at most 18 digits";

    /// `units / 10^scale`, without trailing zeros after the point.
    pub(crate) fn of_units(mut units: i128, mut scale: u32) -> Self {
        while scale > 0 && units % 10 == 0 {
            (units, scale) = (units / 10, scale - 1);
        }
        Self { units, scale }
    }

    /// `numerator / denominator` against this number. A denominator of 0 counts as 1: a share of nothing is nothing.
    fn cmp_ratio(&self, numerator: i128, denominator: i128) -> Ordering {
        // Both sides times 10^scale and the denominator. With 18 digits and counts of rows nothing comes near the limit.
        let left = numerator.saturating_mul(10_i128.pow(self.scale));
        left.cmp(&self.units.saturating_mul(denominator.max(1)))
    }
    /// The least whole number that is not below this one.
    pub fn ceil(&self) -> i128 {
        -(-self.units).div_euclid(10_i128.pow(self.scale))
    }
    /// The greatest whole number that is not above this one.
    pub fn floor(&self) -> i128 {
        self.units.div_euclid(10_i128.pow(self.scale))
    }
}

impl FromStr for Number {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let (sign, digits) = text.strip_prefix('-').map_or((1, text), |d| (-1, d));
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        let numeric = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
        if whole.is_empty() || digits.ends_with('.') || whole.len() + fraction.len() > 18 || !numeric(whole) || !numeric(fraction)
        {
            return Err(());
        }
        let units: i128 = format!("{whole}{fraction}").parse().map_err(|_| ())?;
        Ok(Self { units: sign * units, scale: fraction.len() as u32 })
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.units < 0 { "-" } else { "" };
        let digits = format!("{:0>width$}", self.units.unsigned_abs(), width = self.scale as usize + 1);
        let (whole, fraction) = digits.split_at(digits.len() - self.scale as usize);
        write!(f, "{sign}{whole}{}{fraction}", if fraction.is_empty() { "" } else { "." })
    }
}

impl Ord for Number {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.units * 10_i128.pow(other.scale)).cmp(&(other.units * 10_i128.pow(self.scale)))
    }
}

impl PartialOrd for Number {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Number {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Number {}

/// What a measured number must be, one variant per operator of the standard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// `mustBe`.
    Equal(Number),
    /// `mustNotBe`.
    NotEqual(Number),
    /// `mustBeGreaterThan`.
    Above(Number),
    /// `mustBeGreaterOrEqualTo`.
    AtLeast(Number),
    /// `mustBeLessThan`.
    Below(Number),
    /// `mustBeLessOrEqualTo`.
    AtMost(Number),
    /// `mustBeBetween`; the standard leaves both bounds out.
    Between(Number, Number),
    /// `mustNotBeBetween`, the opposite: the bounds are allowed.
    NotBetween(Number, Number),
}

impl Bound {
    /// Whether `numerator / denominator` is within the bound; exact.
    pub fn holds(&self, numerator: i128, denominator: i128) -> bool {
        let cmp = |n: &Number| n.cmp_ratio(numerator, denominator);
        match self {
            Self::Equal(n) => cmp(n).is_eq(),
            Self::NotEqual(n) => cmp(n).is_ne(),
            Self::Above(n) => cmp(n).is_gt(),
            Self::AtLeast(n) => cmp(n).is_ge(),
            Self::Below(n) => cmp(n).is_lt(),
            Self::AtMost(n) => cmp(n).is_le(),
            Self::Between(a, b) => cmp(a).is_gt() && cmp(b).is_lt(),
            Self::NotBetween(a, b) => !(cmp(a).is_gt() && cmp(b).is_lt()),
        }
    }

    /// Whether `number` is within the bound.
    pub fn holds_number(&self, number: &Number) -> bool {
        self.holds(number.units, 10_i128.pow(number.scale))
    }

    /// The bound of a clause that no row may break.
    pub(crate) fn none() -> Self {
        Self::Equal(Number { units: 0, scale: 0 })
    }

    /// Whether this is "none", the bound of a clause that no row may break.
    pub fn is_zero(&self) -> bool {
        matches!(self, Self::Equal(n) if n.units == 0)
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Equal(n) => write!(f, "{n}"),
            Self::NotEqual(n) => write!(f, "not {n}"),
            Self::Above(n) => write!(f, "above {n}"),
            Self::AtLeast(n) => write!(f, "at least {n}"),
            Self::Below(n) => write!(f, "below {n}"),
            Self::AtMost(n) => write!(f, "at most {n}"),
            Self::Between(a, b) => write!(f, "above {a} and below {b}"),
            Self::NotBetween(a, b) => write!(f, "at most {a} or at least {b}"),
        }
    }
}
