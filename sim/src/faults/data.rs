//! Faults of what the source holds, and the source as it is from moment to moment.
//!
//! A fault on the data lasts from a moment to a moment, and in between the source's table is another: an [`Era`] is a time in
//! which it does not change. Some faults change what is true (a customer buys a hundred times as much as others), some what
//! is said of it (amounts in another unit); the oracle is told which, so an era has the true rows beside the delivered ones.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, NaiveDate, Utc};
use serde::{Deserialize, Serialize};
use simulacro_core::{contract::Contract, ports::Column};

use super::Fault;
use crate::{oracle, ports::Row};

/// A fault of what the source holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum DataFault {
    /// Amounts come in cents instead of euros, and nothing says so.
    Cents {
        /// Of this day and later ones.
        from_fecha: NaiveDate,
        /// When they are mended, exclusive.
        to: DateTime<Utc>,
    },
    /// A column is added.
    AddedColumn {
        /// Its name.
        name: String,
        /// Start, inclusive.
        from: DateTime<Utc>,
        /// End, exclusive.
        to: DateTime<Utc>,
    },
    /// A column has another type.
    Retyped {
        /// The column.
        column: String,
        /// Its new type, in the contract's words.
        physical_type: String,
        /// Start, inclusive.
        from: DateTime<Utc>,
        /// End, exclusive.
        to: DateTime<Utc>,
    },
    /// Every n-th row has a region that nobody has heard of.
    NewRegion {
        /// 1 changes every row.
        every: usize,
        /// The region.
        name: String,
        /// Only rows of this day.
        fecha: NaiveDate,
        /// When they are mapped to one that is known, exclusive.
        to: DateTime<Utc>,
    },
    /// A column may be null from now on; the table's declaration says so.
    DroppedNotNull {
        /// The column.
        column: String,
        /// Start, inclusive.
        from: DateTime<Utc>,
        /// End, exclusive.
        to: DateTime<Utc>,
    },
    /// One customer makes a share of all purchases. It is so: the oracle counts them.
    HotCustomer {
        /// So many rows ...
        share: usize,
        /// ... of so many.
        of: usize,
    },
    /// Every n-th row has a product with a name of so many characters. It is so: the oracle counts them.
    BigRows {
        /// 1 changes every row.
        every: usize,
        /// Characters.
        chars: usize,
    },
    /// Each row of a day comes so often, each time under an order of its own, as from a join that went wrong.
    Flood {
        /// The day.
        fecha: NaiveDate,
        /// How often.
        times: usize,
        /// When it is mended, exclusive.
        to: DateTime<Utc>,
    },
}

/// The source's table in a time in which it does not change.
#[derive(Debug, Clone)]
pub struct Era {
    /// Since when.
    pub from: DateTime<Utc>,
    /// Columns as declared.
    pub columns: Vec<Column>,
    /// What the declaration keeps from being null; `None` when it does not say.
    pub not_null: Option<BTreeSet<String>>,
    /// Rows as delivered.
    pub rows: Vec<Row>,
    /// Rows as they really are.
    pub truth: Vec<Row>,
    /// Orders whose rows are so spoiled that none may be published.
    pub spoiled: BTreeSet<String>,
    /// Days that the contract must hold as they are delivered.
    pub must_hold: BTreeSet<NaiveDate>,
    /// Faults that can be seen by whoever reads: their number in the scenario, and the days whose rows show it; without days
    /// it shows in the columns.
    pub shows: BTreeMap<usize, BTreeSet<NaiveDate>>,
}

/// What the faults on the data did: the source from era to era, and the rows or columns that each fault changed.
#[derive(Debug)]
pub struct Spoiled {
    /// In order of time; the first has no beginning.
    pub eras: Vec<Era>,
    /// Of each fault of the scenario.
    pub hits: Vec<u64>,
}

impl Spoiled {
    /// The era of a moment.
    pub fn at(&self, now: DateTime<Utc>) -> &Era {
        at(&self.eras, now)
    }
}

/// The era of a moment: the last that has begun; before all of them, the first.
pub fn at(eras: &[Era], now: DateTime<Utc>) -> &Era {
    let begun = eras.iter().take_while(|era| era.from <= now).count();
    &eras[begun.saturating_sub(1)]
}

/// When a fault on the data is there; `None` for the others.
pub fn lasts(fault: &Fault) -> Option<(DateTime<Utc>, DateTime<Utc>)> {
    let (always, never) = (DateTime::<Utc>::MIN_UTC, DateTime::<Utc>::MAX_UTC);
    Some(match fault {
        Fault::NullRegion { to, .. } => (always, to.unwrap_or(never)),
        Fault::RenamedColumn { .. } | Fault::DuplicatedRows { .. } => (always, never),
        Fault::Data(data) => match data {
            DataFault::Cents { to, .. } | DataFault::NewRegion { to, .. } | DataFault::Flood { to, .. } => (always, *to),
            DataFault::AddedColumn { from, to, .. }
            | DataFault::Retyped { from, to, .. }
            | DataFault::DroppedNotNull { from, to, .. } => (*from, *to),
            DataFault::HotCustomer { .. } | DataFault::BigRows { .. } => (always, never),
        },
        Fault::SourceUnavailable { .. }
        | Fault::Store(_)
        | Fault::WorkerCrash { .. }
        | Fault::Source(_)
        | Fault::DimensionApi { .. }
        | Fault::Service(_)
        | Fault::Deploy(_)
        | Fault::Clock { .. } => return None,
    })
}

/// Whether a fault changes what the tables must hold, so that there is no fault-free twin to compare with.
pub fn changes_the_tables(fault: &Fault) -> bool {
    lasts(fault).is_some()
}

/// The source from era to era, given the rows of the shop before any fault.
pub fn spoil(faults: &[Fault], contract: &Contract, shop: &[Row]) -> Spoiled {
    let always = DateTime::<Utc>::MIN_UTC;
    let mut moments: BTreeSet<DateTime<Utc>> = [always].into();
    moments.extend(faults.iter().filter_map(lasts).flat_map(|(from, to)| [from, to]));
    moments.remove(&DateTime::<Utc>::MAX_UTC);
    let mut hits = vec![0; faults.len()];
    let eras = moments
        .into_iter()
        .map(|from| {
            let mut era = Era {
                from,
                columns: contract.columns.clone(),
                not_null: None,
                rows: shop.to_vec(),
                truth: shop.to_vec(),
                spoiled: BTreeSet::new(),
                must_hold: BTreeSet::new(),
                shows: BTreeMap::new(),
            };
            // A declaration that once kept a column from being null is told from then on.
            if faults.iter().any(|f| matches!(f, Fault::Data(DataFault::DroppedNotNull { .. }))) {
                era.not_null = Some(contract.fields.iter().filter(|f| f.required).map(|f| f.name.clone()).collect());
            }
            // What is true comes before what is said of it: a row that is sent twice is twice the same.
            let of_truth =
                |fault: &Fault| matches!(fault, Fault::Data(DataFault::HotCustomer { .. } | DataFault::BigRows { .. }));
            let mut ordered: Vec<(usize, &Fault)> = faults.iter().enumerate().collect();
            ordered.sort_by_key(|(_, fault)| !of_truth(fault));
            for (index, fault) in ordered {
                if lasts(fault).is_some_and(|(begins, ends)| (begins..ends).contains(&from)) {
                    let (changed, days) = apply(fault, &mut era);
                    hits[index] = changed.max(hits[index]);
                    if changed > 0 {
                        era.shows.insert(index, days);
                    }
                }
            }
            if era.columns != contract.columns {
                era.must_hold.extend(shop.iter().map(|r| r.fecha));
            }
            let bounds = (contract.rows_min, contract.rows_max);
            era.must_hold.extend(oracle::days_to_hold(&era.rows, contract.quarantine_share_max, bounds));
            era
        })
        .collect();
    Spoiled { eras, hits }
}

/// Lets a fault change an era; gives how many rows or columns it changed, and the days whose rows show it.
fn apply(fault: &Fault, era: &mut Era) -> (u64, BTreeSet<NaiveDate>) {
    let mut days = BTreeSet::new();
    let mut changed = 0;
    match fault {
        Fault::NullRegion { every, fecha, .. } => {
            let rows = era.rows.iter_mut().filter(|r| fecha.is_none_or(|f| r.fecha == f));
            for row in rows.step_by((*every).max(1)) {
                row.region = None;
                era.spoiled.insert(row.order_id.clone());
                days.insert(row.fecha);
                changed += 1;
            }
        }
        Fault::DuplicatedRows { every } => {
            let copies: Vec<Row> = era.rows.iter().step_by((*every).max(1)).cloned().collect();
            days.extend(copies.iter().map(|r| r.fecha));
            changed += copies.len() as u64;
            era.rows.extend(copies);
        }
        Fault::RenamedColumn { from, to } => {
            for column in era.columns.iter_mut().filter(|c| c.name == *from) {
                column.name.clone_from(to);
                changed += 1;
            }
        }
        Fault::Data(DataFault::Cents { from_fecha, .. }) => {
            for row in era.rows.iter_mut().filter(|r| r.fecha >= *from_fecha) {
                row.monto_cents *= 100;
                days.insert(row.fecha);
                changed += 1;
            }
            era.must_hold.extend(days.iter());
        }
        Fault::Data(DataFault::AddedColumn { name, .. }) => {
            era.columns.push(Column { name: name.clone(), physical_type: "string".into() });
            changed += 1;
        }
        Fault::Data(DataFault::Retyped { column, physical_type, .. }) => {
            for column in era.columns.iter_mut().filter(|c| c.name == *column) {
                column.physical_type.clone_from(physical_type);
                changed += 1;
            }
        }
        Fault::Data(DataFault::NewRegion { every, name, fecha, .. }) => {
            for row in era.rows.iter_mut().filter(|r| r.fecha == *fecha).step_by((*every).max(1)) {
                row.region = Some(name.clone());
                era.spoiled.insert(row.order_id.clone());
                days.insert(row.fecha);
                changed += 1;
            }
        }
        Fault::Data(DataFault::DroppedNotNull { column, .. }) => {
            if era.not_null.as_mut().is_some_and(|kept| kept.remove(column)) {
                changed += 1;
                era.must_hold.extend(era.rows.iter().map(|r| r.fecha));
            }
        }
        Fault::Data(DataFault::HotCustomer { share, of }) => {
            // A customer is of one region.
            let region = era.truth.first().and_then(|r| r.region.clone());
            let hot = |(n, _): &(usize, &mut Row)| n % (*of).max(1) < *share;
            for (_, row) in era.rows.iter_mut().enumerate().filter(hot).chain(era.truth.iter_mut().enumerate().filter(hot)) {
                row.user_id = "hot".into();
                row.region.clone_from(&region);
                days.insert(row.fecha);
                changed += 1;
            }
            changed /= 2;
        }
        Fault::Data(DataFault::BigRows { every, chars }) => {
            for row in era.rows.iter_mut().step_by((*every).max(1)) {
                row.product_id = format!("{:x<chars$}", row.product_id);
                days.insert(row.fecha);
                changed += 1;
            }
        }
        Fault::Data(DataFault::Flood { fecha, times, .. }) => {
            let of_day: Vec<Row> = era.rows.iter().filter(|r| r.fecha == *fecha).cloned().collect();
            for copy in 1..*times {
                let again = |r: &Row| Row { order_id: format!("{}-{copy}", r.order_id), ..r.clone() };
                era.rows.extend(of_day.iter().map(again));
                changed += of_day.len() as u64;
            }
            days.insert(*fecha);
        }
        Fault::SourceUnavailable { .. }
        | Fault::Store(_)
        | Fault::WorkerCrash { .. }
        | Fault::Source(_)
        | Fault::DimensionApi { .. }
        | Fault::Service(_)
        | Fault::Deploy(_)
        | Fault::Clock { .. } => {}
    }
    (changed, days)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(n: usize, fecha: &str) -> Row {
        Row {
            order_id: format!("o-{n}"),
            user_id: format!("u-{n}"),
            product_id: "p".into(),
            monto_cents: 1_000,
            region: Some("norte".into()),
            fecha: fecha.parse().expect("a day"),
        }
    }

    fn contract() -> Contract {
        Contract::parse("ventas.yaml", include_str!("../../../contracts/odcs/cdnow/ventas.yaml")).expect("a contract")
    }

    #[test]
    fn a_fault_on_the_data_begins_and_ends() {
        let (from, to) = ("2024-03-18T02:00:00Z".parse().expect("a time"), "2024-03-18T05:00:00Z".parse().expect("a time"));
        let fault = Fault::Data(DataFault::AddedColumn { name: "canal".into(), from, to });
        let spoiled = spoil(&[fault], &contract(), &[row(1, "2024-03-17")]);
        let columns = |at: &str| spoiled.at(at.parse().expect("a time")).columns.len();
        let usual = contract().columns.len();
        assert_eq!(columns("2024-03-18T01:59:59Z"), usual);
        assert_eq!((columns("2024-03-18T02:00:00Z"), columns("2024-03-18T04:59:59Z")), (usual + 1, usual + 1));
        assert_eq!(columns("2024-03-18T05:00:00Z"), usual);
        assert_eq!(spoiled.hits, [1]);
    }

    #[test]
    fn a_row_that_is_sent_twice_is_twice_the_same_whoever_bought_it() {
        let shop: Vec<Row> = (0..10).map(|n| row(n, "2024-03-17")).collect();
        let twice = Fault::DuplicatedRows { every: 3 };
        let hot = Fault::Data(DataFault::HotCustomer { share: 4, of: 5 });
        for faults in [[twice.clone(), hot.clone()], [hot, twice]] {
            let spoiled = spoil(&faults, &contract(), &shop);
            let era = &spoiled.eras[0];
            let different: BTreeSet<(&str, &str)> = era.rows.iter().map(|r| (&*r.order_id, &*r.user_id)).collect();
            assert_eq!((era.rows.len(), different.len()), (14, 10));
            assert_eq!(era.truth.iter().filter(|r| r.user_id == "hot").count(), 8);
        }
    }
}
