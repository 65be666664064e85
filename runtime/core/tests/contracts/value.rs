//! Types, numbers and bounds of contracts.

use proptest::prelude::*;
use simulacro_core::contract::{Bound, Number, PhysicalType};

fn number(text: &str) -> Number {
    text.parse().expect("a number")
}

#[test]
fn types_are_written_as_they_are_read() {
    for text in ["string", "decimal(10,2)", "decimal(38,0)", "timestamp", "date", "int64", "float64", "boolean"] {
        let read: PhysicalType = text.parse().expect("a type");
        assert_eq!(read.to_string(), text);
        assert_eq!(PhysicalType::of(&read.data_type()), Some(read));
    }
    assert_eq!("decimal(12, 2)".parse(), Ok(PhysicalType::Decimal(12, 2)));
    for text in ["decimal(39,2)", "decimal(2,3)", "decimal(0,0)", "decimal", "varchar", ""] {
        assert_eq!(text.parse::<PhysicalType>(), Err(()), "{text}");
    }
}

#[test]
fn between_leaves_its_bounds_out() {
    let between = Bound::Between(number("0"), number("100"));
    assert!(!between.holds(0, 1) && between.holds(1, 1) && between.holds(99, 1) && !between.holds(100, 1));
    let outside = Bound::NotBetween(number("0"), number("100"));
    assert!(outside.holds(0, 1) && !outside.holds(1, 1) && outside.holds(100, 1));
}

#[test]
fn every_operator_decides_below_at_and_above_its_number() {
    let n = number("2");
    for (bound, holds) in [
        (Bound::Equal(n), [false, true, false]),
        (Bound::NotEqual(n), [true, false, true]),
        (Bound::Above(n), [false, false, true]),
        (Bound::AtLeast(n), [false, true, true]),
        (Bound::Below(n), [true, false, false]),
        (Bound::AtMost(n), [true, true, false]),
    ] {
        assert_eq!([1, 2, 3].map(|x| bound.holds(x, 1)), holds, "{bound}");
        assert_eq!(["1", "2", "3"].map(|x| bound.holds_number(&number(x))), holds, "{bound}");
    }
}

#[test]
fn a_share_is_compared_without_rounding() {
    // 5 of 999 is 0.5005 %, 5 of 1000 is 0.5 % exactly.
    let at_most = Bound::AtMost(number("0.5"));
    assert!(at_most.holds(500, 1000) && !at_most.holds(500, 999));
    assert!(at_most.holds(0, 0), "a share of no rows is none");
}

proptest! {
    #[test]
    fn numbers_order_as_integers_do(a in -1_000_000_i64..1_000_000, b in -1_000_000_i64..1_000_000) {
        let cents = |n: i64| number(&format!("{}{}.{:02}", if n < 0 { "-" } else { "" }, n.abs() / 100, n.abs() % 100));
        prop_assert_eq!(cents(a).cmp(&cents(b)), a.cmp(&b));
        prop_assert_eq!(Bound::AtLeast(cents(b)).holds_number(&cents(a)), a >= b);
        prop_assert_eq!(cents(a).to_string().parse::<Number>().expect("round trip"), cents(a));
        prop_assert_eq!(cents(a).ceil(), i128::from(a).div_euclid(100) + i128::from(a.rem_euclid(100) != 0));
        prop_assert_eq!(cents(a * 100), number(&a.to_string()));
    }
}
