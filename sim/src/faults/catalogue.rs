//! The catalogue: each fault with what the platform sees of it, what must save the day, and an example.

use super::Entry;

/// Every fault there is. A test parses each example, and compares the list with the enumeration.
pub const CATALOGUE: [Entry; 41] = [
    Entry {
        mode: "source_unavailable",
        failure: 1,
        seen: "ECONNREFUSED on connect",
        defence: "wait for the source until a deadline, one alert",
        example: "mode = \"source_unavailable\"\nfrom = \"2024-03-18T02:00:00Z\"\nto = \"2024-03-18T04:00:00Z\"",
    },
    Entry {
        mode: "source, kind starting_up",
        failure: 1,
        seen: "FATAL 57P03 the database system is starting up",
        defence: "wait for the source until a deadline, one alert",
        example: "mode = \"source\"\nkind = \"starting_up\"\nfrom = \"2024-03-18T03:00:00Z\"\nto = \"2024-03-18T03:02:00Z\"",
    },
    Entry {
        mode: "source, kind saturated",
        failure: 1,
        seen: "FATAL 53300 sorry, too many clients already, for a share of the connections",
        defence: "wait for the source; a run that it refuses is tried again with full jitter",
        example: "mode = \"source\"\nkind = \"saturated\"\nfrom = \"2024-03-18T03:00:00Z\"\nto = \"2024-03-18T03:20:00Z\"\nrefused = 4\nof = 5",
    },
    Entry {
        mode: "source, kind crash",
        failure: 1,
        seen: "WARNING 57P01 and the end of the connection in the middle of a read, then ECONNREFUSED, then 57P03",
        defence: "nothing of a read that did not end is visible; wait, and read again",
        example: "mode = \"source\"\nkind = \"crash\"\nnth_read = 1\nrefused_s = 60\nstarting_s = 120",
    },
    Entry {
        mode: "dimension_api",
        failure: 1,
        seen: "503 with Retry-After, 429, 401, silence, truncated or foreign bodies: see the faults of the API",
        defence: "asked again as it asks; then the version before serves for a day, with one alert and a mark",
        example: "mode = \"dimension_api\"\nfrom = \"2024-03-18T03:00:00Z\"\nto = \"2024-03-18T03:20:00Z\"\n\
                  fault = { mode = \"refused\", status = 503, retry_after_s = 30, times = 3 }",
    },
    Entry {
        mode: "renamed_column",
        failure: 2,
        seen: "another list of columns",
        defence: "the contract holds the day before anything is written",
        example: "mode = \"renamed_column\"\nfrom = \"region\"\nto = \"zona\"",
    },
    Entry {
        mode: "null_region",
        failure: 2,
        seen: "NULL where the contract has none",
        defence: "rows are quarantined with their clause; above a share the day is held",
        example: "mode = \"null_region\"\nevery = 50",
    },
    Entry {
        mode: "source, kind plan_invalidated",
        failure: 2,
        seen: "ERROR 0A000 cached plan must not change result type",
        defence: "prepare anew, once, then compare with the contract",
        example: "mode = \"source\"\nkind = \"plan_invalidated\"\nat = \"2024-03-18T02:00:00Z\"",
    },
    Entry {
        mode: "source, kind dropped",
        failure: 2,
        seen: "ERROR 42703 or 42P01 on read, although the schema was as agreed a moment before",
        defence: "fail at once, alert; run again when the migration is taken back",
        example: "mode = \"source\"\nkind = \"dropped\"\nwhat = { column = \"region\" }\nnth_read = 1\ntimes = 1",
    },
    Entry {
        mode: "data, kind added_column",
        failure: 2,
        seen: "a column more",
        defence: "the contract holds the day before anything is written",
        example: "mode = \"data\"\nkind = \"added_column\"\nname = \"canal\"\nfrom = \"2024-03-18T02:00:00Z\"\nto = \"2024-03-18T05:00:00Z\"",
    },
    Entry {
        mode: "data, kind retyped",
        failure: 2,
        seen: "a column of another type",
        defence: "the contract holds the day before anything is written",
        example: "mode = \"data\"\nkind = \"retyped\"\ncolumn = \"monto\"\nphysical_type = \"string\"\nfrom = \"2024-03-18T02:00:00Z\"\nto = \"2024-03-18T05:00:00Z\"",
    },
    Entry {
        mode: "data, kind cents",
        failure: 2,
        seen: "amounts a hundred times as great, and no error at all",
        defence: "the bound on the mean amount of a day against the days before it holds the day",
        example: "mode = \"data\"\nkind = \"cents\"\nfrom_fecha = \"2024-03-17\"\nto = \"2024-03-18T05:00:00Z\"",
    },
    Entry {
        mode: "data, kind new_region",
        failure: 2,
        seen: "a value that is not among those accepted",
        defence: "rows are quarantined with their clause; above a share the day is held",
        example: "mode = \"data\"\nkind = \"new_region\"\nevery = 40\nname = \"islas\"\nfecha = \"2024-03-17\"\nto = \"2024-03-18T05:00:00Z\"",
    },
    Entry {
        mode: "data, kind dropped_not_null",
        failure: 2,
        seen: "a required column that may be null now",
        defence: "what the source keeps from being null is remembered; the day is held before it is read",
        example: "mode = \"data\"\nkind = \"dropped_not_null\"\ncolumn = \"region\"\nfrom = \"2024-03-18T09:00:00Z\"\nto = \"2024-03-19T05:00:00Z\"",
    },
    Entry {
        mode: "data, kind hot_customer",
        failure: 3,
        seen: "one key a hundred times as often",
        defence: "aggregation in two stages, parts of bounded size: the same figures",
        example: "mode = \"data\"\nkind = \"hot_customer\"\nshare = 9\nof = 10",
    },
    Entry {
        mode: "data, kind big_rows",
        failure: 3,
        seen: "rows many times as long",
        defence: "batches and parts are bounded by bytes",
        example: "mode = \"data\"\nkind = \"big_rows\"\nevery = 7\nchars = 4000",
    },
    Entry {
        mode: "data, kind flood",
        failure: 3,
        seen: "a day a hundred times as long",
        defence: "the volume gate holds the day before a row is read",
        example: "mode = \"data\"\nkind = \"flood\"\nfecha = \"2024-03-17\"\ntimes = 100\nto = \"2024-03-18T05:00:00Z\"",
    },
    Entry {
        mode: "source, kind password_expired",
        failure: 5,
        seen: "FATAL 28P01 password authentication failed, for new connections only",
        defence: "fail at once, one alert, no further login; run again after the rotation",
        example: "mode = \"source\"\nkind = \"password_expired\"\nfrom = \"2024-03-18T00:00:00Z\"\npooled = 2\nto = \"2024-03-18T04:30:00Z\"",
    },
    Entry {
        mode: "source, kind grant_revoked",
        failure: 5,
        seen: "ERROR 42501 permission denied for table ventas",
        defence: "fail at once, one alert; run again after the grant",
        example: "mode = \"source\"\nkind = \"grant_revoked\"\nfrom = \"2024-03-18T00:00:00Z\"\nto = \"2024-03-18T04:30:00Z\"",
    },
    Entry {
        mode: "store, kind token_expired",
        failure: 5,
        seen: "400 ExpiredToken in the middle of the writes of a day",
        defence: "told from a fault that passes, so not tried again; run again after the rotation, every write is idempotent",
        example: "mode = \"store\"\nkind = \"token_expired\"\nfrom = \"2024-03-18T03:00:00Z\"\nafter_puts = 2\nto = \"2024-03-18T04:30:00Z\"",
    },
    Entry {
        mode: "duplicated_rows",
        failure: 6,
        seen: "the same row twice",
        defence: "deduplication by _source_hash",
        example: "mode = \"duplicated_rows\"\nevery = 3",
    },
    Entry {
        mode: "store, kind reply_lost",
        failure: 6,
        seen: "ECONNRESET after the write took effect",
        defence: "deterministic names, If-None-Match, Delta txn: a repeat is safe",
        example: "mode = \"store\"\nkind = \"reply_lost\"\noperation = \"put\"\npath = \"/_delta_log/\"\nafter = 1\ntimes = 3",
    },
    Entry {
        mode: "service, kind ledger_reply_lost",
        failure: 6,
        seen: "08006 after the ledger's commit; the session and what it held are gone",
        defence: "a run is tried again under an epoch of its own; a repeat writes the same",
        example: "mode = \"service\"\nkind = \"ledger_reply_lost\"\ncall = \"finish\"\nafter = 0\ntimes = 1",
    },
    Entry {
        mode: "service, kind warehouse_reply_lost",
        failure: 6,
        seen: "08006 after the load's commit",
        defence: "a load is repeated under the same epoch, which replaces or does nothing",
        example: "mode = \"service\"\nkind = \"warehouse_reply_lost\"\nafter = 0\ntimes = 2",
    },
    Entry {
        mode: "store, kind unavailable",
        failure: 7,
        seen: "503 SlowDown",
        defence: "retries with full jitter and a deadline",
        example: "mode = \"store\"\nkind = \"unavailable\"\noperation = \"get\"\npath = \"\"\nfrom = \"2024-03-18T03:00:00Z\"\nto = \"2024-03-18T03:02:00Z\"\ntimes = 9",
    },
    Entry {
        mode: "store, kind throttled",
        failure: 7,
        seen: "503 SlowDown for a share of the calls",
        defence: "repeats in place, then retries with full jitter and a deadline",
        example: "mode = \"store\"\nkind = \"throttled\"\nfrom = \"2024-03-18T03:00:00Z\"\nto = \"2024-03-18T03:30:00Z\"\nrefused = 1\nof = 40",
    },
    Entry {
        mode: "store, kind black_hole",
        failure: 7,
        seen: "no answer until the client's deadline",
        defence: "each call has a deadline, shorter than the run's",
        example: "mode = \"store\"\nkind = \"black_hole\"\noperation = \"put\"\npath = \"raw/\"\nfrom = \"2024-03-18T03:00:00Z\"\nto = \"2024-03-18T03:02:00Z\"\ntimes = 9",
    },
    Entry {
        mode: "store, kind truncated",
        failure: 7,
        seen: "a body that ends before its length",
        defence: "the length is compared; the read is repeated",
        example: "mode = \"store\"\nkind = \"truncated\"\npath = \"raw/\"\nafter = 1\ntimes = 2",
    },
    Entry {
        mode: "source, kind hangs",
        failure: 7,
        seen: "connections are taken and no answer comes",
        defence: "each call has a deadline; wait for the source",
        example: "mode = \"source\"\nkind = \"hangs\"\nfrom = \"2024-03-18T03:00:00Z\"\nto = \"2024-03-18T03:20:00Z\"",
    },
    Entry {
        mode: "source, kind truncated",
        failure: 7,
        seen: "08006: the connection ends in the middle of the rows",
        defence: "nothing of it is visible; the run is tried again",
        example: "mode = \"source\"\nkind = \"truncated\"\nnth_read = 1\ntimes = 1",
    },
    Entry {
        mode: "source, kind short_read",
        failure: 7,
        seen: "an answer that looks whole and lacks rows",
        defence: "the rows are compared with the count of the same snapshot",
        example: "mode = \"source\"\nkind = \"short_read\"\nnth_read = 1\ntimes = 1",
    },
    Entry {
        mode: "service, kind warehouse_timeout",
        failure: 7,
        seen: "no answer to a load until the client's deadline",
        defence: "a load is repeated under the same epoch",
        example: "mode = \"service\"\nkind = \"warehouse_timeout\"\nafter = 0\ntimes = 2",
    },
    Entry {
        mode: "store, kind no_space",
        failure: 8,
        seen: "ENOSPC on write",
        defence: "conditional publish: no torn object is visible; retries after space is freed",
        example: "mode = \"store\"\nkind = \"no_space\"\nfrom = \"2024-03-18T03:00:00Z\"\nto = \"2024-03-18T03:02:00Z\"\npath = \"/_delta_log/\"",
    },
    Entry {
        mode: "store, kind prefix_removed",
        failure: 9,
        seen: "404 NoSuchKey for what was published, or a table that is not there any more",
        defence: "no day is run into a table that is gone; one command undeletes, goes back in time, or makes the days again from raw",
        example: "mode = \"store\"\nkind = \"prefix_removed\"\nprefix = \"staging/\"\nat = \"2024-03-18T12:00:00Z\"\nfor_good = false",
    },
    Entry {
        mode: "store, kind prefix_cut",
        failure: 9,
        seen: "objects that end in their middle, as an interrupted copy leaves them",
        defence: "what is read is compared with what was written, and a day that cannot be had from there is had another way",
        example: "mode = \"store\"\nkind = \"prefix_cut\"\nprefix = \"raw/ventas/fecha=2024-03-17/\"\nat = \"2024-03-18T12:00:00Z\"",
    },
    Entry {
        mode: "service, kind ledger_full",
        failure: 8,
        seen: "ERROR 53100 could not extend file: No space left on device",
        defence: "no run begins that cannot be written down; tried again after space is freed",
        example: "mode = \"service\"\nkind = \"ledger_full\"\nfrom = \"2024-03-18T03:00:00Z\"\nto = \"2024-03-18T03:02:00Z\"",
    },
    Entry {
        mode: "worker_crash",
        failure: 9,
        seen: "the process is gone, in the middle of a write",
        defence: "idempotent writes, manifests, epochs: run again, same tables",
        example: "mode = \"worker_crash\"\nat_calls = [9, 30]\ndown_s = 30",
    },
    Entry {
        mode: "deploy, kind crashes_at_start",
        failure: 9,
        seen: "the process dies as it starts, again and again, until the deploy is reverted",
        defence: "the turn is not lost: the first process that lives takes it",
        example: "mode = \"deploy\"\nkind = \"crashes_at_start\"\nstarts = 5\ndown_s = 300",
    },
    Entry {
        mode: "deploy, kind rounds",
        failure: 9,
        seen: "a build whose amounts are rounded",
        defence: "the mart's revenue is balanced with the rows' to the cent before anybody sees it; restore and run again",
        example: "mode = \"deploy\"\nkind = \"rounds\"\nfrom = \"2024-03-18T00:00:00Z\"\nto = \"2024-03-18T04:30:00Z\"\neverywhere = false",
    },
    Entry {
        mode: "deploy, kind unknown_feature",
        failure: 9,
        seen: "a Delta protocol with a feature that nobody has",
        defence: "nothing is read by guess: the run fails and says so; the warehouse shows what it showed",
        example: "mode = \"deploy\"\nkind = \"unknown_feature\"\ntable = \"staging/ventas_validadas\"\nfrom = \"2024-03-18T12:00:00Z\"\nto = \"2024-03-19T04:30:00Z\"",
    },
    Entry {
        mode: "clock",
        failure: 10,
        seen: "a wrong time of the worker; beyond a quarter of an hour, 403 RequestTimeTooSkewed",
        defence: "days come from the schedule and the rows, waits from the monotonic clock; run again after NTP",
        example: "mode = \"clock\"\nfrom = \"2024-03-18T00:00:00Z\"\nto = \"2024-03-18T04:30:00Z\"\nby_s = 1200",
    },
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        faults::{Fault, StoreFault, data::DataFault, deploy::DeployFault, service::ServiceFault, source::SourceFault},
        stream,
    };

    fn name(fault: &Fault) -> &'static str {
        match fault {
            Fault::SourceUnavailable { .. } => "source_unavailable",
            Fault::NullRegion { .. } => "null_region",
            Fault::RenamedColumn { .. } => "renamed_column",
            Fault::DuplicatedRows { .. } => "duplicated_rows",
            Fault::Store(StoreFault::Unavailable { .. }) => "store, kind unavailable",
            Fault::Store(StoreFault::ReplyLost { .. }) => "store, kind reply_lost",
            Fault::Store(StoreFault::NoSpace { .. }) => "store, kind no_space",
            Fault::Store(StoreFault::Throttled { .. }) => "store, kind throttled",
            Fault::Store(StoreFault::BlackHole { .. }) => "store, kind black_hole",
            Fault::Store(StoreFault::Truncated { .. }) => "store, kind truncated",
            Fault::Store(StoreFault::TokenExpired { .. }) => "store, kind token_expired",
            Fault::Store(StoreFault::PrefixRemoved { .. }) => "store, kind prefix_removed",
            Fault::Store(StoreFault::PrefixCut { .. }) => "store, kind prefix_cut",
            // What a wrong clock meets at the store.
            Fault::Store(StoreFault::TooSkewed { .. }) | Fault::Clock { .. } => "clock",
            Fault::WorkerCrash { .. } => "worker_crash",
            Fault::Source(SourceFault::StartingUp { .. }) => "source, kind starting_up",
            Fault::Source(SourceFault::Saturated { .. }) => "source, kind saturated",
            Fault::Source(SourceFault::Crash { .. }) => "source, kind crash",
            Fault::Source(SourceFault::PasswordExpired { .. }) => "source, kind password_expired",
            Fault::Source(SourceFault::GrantRevoked { .. }) => "source, kind grant_revoked",
            Fault::Source(SourceFault::Hangs { .. }) => "source, kind hangs",
            Fault::Source(SourceFault::Truncated { .. }) => "source, kind truncated",
            Fault::Source(SourceFault::ShortRead { .. }) => "source, kind short_read",
            Fault::Source(SourceFault::PlanInvalidated { .. }) => "source, kind plan_invalidated",
            Fault::Source(SourceFault::Dropped { .. }) => "source, kind dropped",
            Fault::Data(DataFault::Cents { .. }) => "data, kind cents",
            Fault::Data(DataFault::AddedColumn { .. }) => "data, kind added_column",
            Fault::Data(DataFault::Retyped { .. }) => "data, kind retyped",
            Fault::Data(DataFault::NewRegion { .. }) => "data, kind new_region",
            Fault::Data(DataFault::DroppedNotNull { .. }) => "data, kind dropped_not_null",
            Fault::Data(DataFault::HotCustomer { .. }) => "data, kind hot_customer",
            Fault::Data(DataFault::BigRows { .. }) => "data, kind big_rows",
            Fault::Data(DataFault::Flood { .. }) => "data, kind flood",
            Fault::DimensionApi { .. } => "dimension_api",
            Fault::Service(ServiceFault::LedgerReplyLost { .. }) => "service, kind ledger_reply_lost",
            Fault::Service(ServiceFault::LedgerFull { .. }) => "service, kind ledger_full",
            Fault::Service(ServiceFault::WarehouseReplyLost { .. }) => "service, kind warehouse_reply_lost",
            Fault::Service(ServiceFault::WarehouseTimeout { .. }) => "service, kind warehouse_timeout",
            Fault::Deploy(DeployFault::CrashesAtStart { .. }) => "deploy, kind crashes_at_start",
            Fault::Deploy(DeployFault::Rounds { .. }) => "deploy, kind rounds",
            Fault::Deploy(DeployFault::UnknownFeature { .. }) => "deploy, kind unknown_feature",
        }
    }

    #[test]
    fn the_catalogue_lists_every_fault_with_an_example_that_parses() {
        let names: Vec<&str> = CATALOGUE.iter().map(|e| name(&toml::from_str(e.example).expect(e.example))).collect();
        assert_eq!(names, CATALOGUE.iter().map(|e| e.mode).collect::<Vec<_>>());
        assert_eq!(names.iter().collect::<std::collections::BTreeSet<_>>().len(), CATALOGUE.len());
    }

    #[test]
    fn every_failure_mode_has_a_fault_of_the_batch_or_of_the_stream() {
        for failure in 1..=10 {
            let batch = CATALOGUE.iter().any(|e| e.failure == failure);
            assert!(batch || stream::faults::CATALOGUE.iter().any(|e| e.failure == failure), "failure mode {failure}");
        }
    }
}
