//! Sinks over the log in memory, into a table that refuses, loses answers, and is slow.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use proptest::prelude::*;

use super::{
    config::StreamConfig,
    job::StreamPorts,
    sink::{Sink, SinkSpec, SinkTable, Written},
    testing::{MemoryLog, NoMetrics},
};
use crate::ports::{
    Commit, EPOCH_MOVED, Env, EventLog, PortError, Result,
    event_log::{LogRecord, TopicPartition, TopicSpec},
};

const TOPIC: &str = "entrada";

/// What happens at a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Refused,
    AnswerLost,
    Broken,
}

/// The table as all members see it.
#[derive(Debug, Default)]
struct Shared {
    /// Partition, offset and value of each row, in order of writing.
    rows: Vec<(i32, i64, Bytes)>,
    positions: BTreeMap<TopicPartition, i64>,
    writes: usize,
    /// By number of the write.
    fates: BTreeMap<usize, Fate>,
    /// Polls while each slow write lasted.
    polls_beside: Vec<u64>,
    /// Most bytes of values that one write has had.
    largest: usize,
}

#[derive(Debug, Clone, Default)]
struct Table {
    shared: Arc<Mutex<Shared>>,
    /// How long a write lasts, on this log's clock.
    slow: Option<(MemoryLog, Duration)>,
}

#[async_trait]
impl SinkTable for Table {
    async fn position(&mut self, at: &TopicPartition) -> Result<Option<i64>> {
        Ok(self.shared.lock().unwrap().positions.get(at).copied())
    }
    async fn write(&mut self, at: &TopicPartition, after: Option<i64>, next: i64, records: &[LogRecord]) -> Result<Written> {
        if let Some((log, duration)) = &self.slow {
            let before = log.polls();
            // In pieces, so that a member which polls beside it has its turns.
            for _ in 0..10 {
                log.env.sleep(*duration / 10).await;
                tokio::task::yield_now().await;
            }
            self.shared.lock().unwrap().polls_beside.push(log.polls() - before);
        }
        let mut shared = self.shared.lock().unwrap();
        shared.writes += 1;
        let ordinal = shared.writes;
        let fate = shared.fates.remove(&ordinal);
        match fate {
            Some(Fate::Refused) => return Err(PortError::retryable("write").code("CONFLICT")),
            Some(Fate::Broken) => return Err(PortError::permanent("write").code("DISK")),
            Some(Fate::AnswerLost) | None => {}
        }
        let seen = shared.positions.get(at).copied();
        if seen.is_some_and(|seen| seen >= next) {
            return Ok(Written { commit: Commit::Already(0), rows: records.len() as u64, left_out: 0 });
        }
        if seen != after {
            return Err(PortError::retryable("write").code(EPOCH_MOVED));
        }
        shared.positions.insert(at.clone(), next);
        let bytes = records.iter().filter_map(|r| r.value.as_ref()).map(Bytes::len).sum();
        shared.largest = shared.largest.max(bytes);
        shared.rows.extend(records.iter().map(|r| (at.partition, r.offset, r.value.clone().unwrap_or_default())));
        match fate {
            Some(Fate::AnswerLost) => Err(PortError::unknown("write").code("ETIMEDOUT")),
            Some(Fate::Refused | Fate::Broken) | None => {
                Ok(Written { commit: Commit::New(0), rows: records.len() as u64, left_out: 0 })
            }
        }
    }
}

fn spec(records_max: usize, bytes_max: usize) -> SinkSpec {
    let config = StreamConfig { sink_records_max: records_max, sink_bytes_max: bytes_max, ..StreamConfig::specification() };
    SinkSpec::of(&config, "prueba", TOPIC, Duration::from_secs(5))
}

async fn log_with(values: &[(i32, Bytes)], partitions: i32) -> MemoryLog {
    let log = MemoryLog::new(1_700_000_000_000, 7);
    let spec = TopicSpec { name: TOPIC.into(), partitions, retention: None, compact: false };
    log.create_topic(&spec).await.unwrap();
    for (partition, value) in values {
        log.append(TOPIC, *partition, "k", Some(value.clone()), 1_700_000_000_000);
    }
    log
}

async fn open(log: &MemoryLog, spec: SinkSpec, member: &str, table: &Table) -> Sink {
    let ports = StreamPorts { env: Arc::new(log.env.clone()), log: Arc::new(log.clone()), metrics: Arc::new(NoMetrics) };
    Sink::open(spec, ports, member, Box::new(table.clone())).await.unwrap()
}

/// Steps until everything is in the table.
async fn drain(sink: &mut Sink) -> Result<()> {
    for _ in 0..2_000 {
        sink.step().await?;
        if sink.is_drained().await? {
            return Ok(());
        }
    }
    panic!("it never ends: {sink:?}");
}

/// Each record is there exactly once, and those of a partition in order.
fn check(table: &Table, log: &MemoryLog, partitions: i32) {
    let shared = table.shared.lock().unwrap();
    for partition in 0..partitions {
        let found: Vec<_> = shared.rows.iter().filter(|r| r.0 == partition).map(|r| (r.1, r.2.clone())).collect();
        let expected: Vec<_> = {
            let at = TopicPartition { topic: TOPIC.into(), partition };
            let read = futures::executor::block_on(log.read(&at, 0, usize::MAX)).unwrap().0;
            read.into_iter().map(|r| (r.offset, r.value.unwrap_or_default())).collect()
        };
        assert_eq!(found, expected, "partition {partition}");
    }
}

fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(test);
}

fn values(n: usize, partitions: i32, bytes: usize) -> Vec<(i32, Bytes)> {
    (0..n).map(|i| (i as i32 % partitions, Bytes::from(format!("{i:0bytes$}")))).collect()
}

fn fates() -> impl Strategy<Value = BTreeMap<usize, Fate>> {
    prop::collection::btree_map(1usize..40, prop::sample::select(vec![Fate::Refused, Fate::AnswerLost, Fate::Broken]), 0..8)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn each_record_is_written_once_whatever_fails_and_whoever_takes_over(
        n in 0usize..200,
        partitions in 1i32..4,
        records_max in 1usize..40,
        fates in fates(),
        hand_over in prop::collection::vec(1usize..30, 0..5),
    ) {
        run(async {
            let log = log_with(&values(n, partitions, 4), partitions).await;
            let table = Table::default();
            table.shared.lock().unwrap().fates = fates;
            let spec = spec(records_max, 1 << 20);
            for (i, steps) in hand_over.into_iter().enumerate() {
                let mut sink = open(&log, spec.clone(), &format!("m{i}"), &table).await;
                for _ in 0..steps {
                    if sink.step().await.is_err() {
                        break;
                    }
                }
                // It dies with what it holds.
                log.expel(&format!("m{i}"));
            }
            loop {
                let mut last = open(&log, spec.clone(), "last", &table).await;
                if drain(&mut last).await.is_ok() {
                    break;
                }
            }
            check(&table, &log, partitions);
        });
    }
}

#[test]
fn a_member_back_from_the_dead_writes_nothing_and_goes_on_where_the_table_is() {
    run(async {
        let log = log_with(&values(60, 1, 4), 1).await;
        let table = Table::default();
        let mut zombie = open(&log, spec(1_000, 1 << 20), "zombie", &table).await;
        for _ in 0..4 {
            zombie.step().await.unwrap();
        }
        assert!(zombie.bytes() > 0 && table.shared.lock().unwrap().rows.is_empty(), "it holds records");
        // Another writes some of them, in other pieces, and all of the rest.
        let mut other = Table { shared: table.shared.clone(), slow: None };
        let at = TopicPartition { topic: TOPIC.into(), partition: 0 };
        let records = log.read(&at, 0, 10).await.unwrap().0;
        other.write(&at, None, 10, &records).await.unwrap();
        zombie.flush_all().await.unwrap();
        assert_eq!(table.shared.lock().unwrap().rows.len(), 10, "nothing is there twice");
        drain(&mut zombie).await.unwrap();
        check(&table, &log, 1);
    });
}

#[test]
fn memory_is_bounded_whatever_waits_in_the_topic() {
    run(async {
        let log = log_with(&values(2_000, 2, 1_000), 2).await;
        let table = Table::default();
        let bytes_max = 20_000;
        let mut sink = open(&log, spec(1_000_000, bytes_max), "m", &table).await;
        let mut most = 0;
        while !sink.is_drained().await.unwrap() {
            sink.step().await.unwrap();
            most = most.max(sink.bytes());
        }
        // One poll of seven records may come on top.
        assert!(most < bytes_max + 7 * 1_200, "{most} bytes held");
        assert!(table.shared.lock().unwrap().largest > 5_000, "but not one by one");
        check(&table, &log, 2);
    });
}

#[test]
fn a_slow_table_slows_the_polls_and_the_group_is_not_lost() {
    run(async {
        let log = log_with(&values(100, 1, 10), 1).await;
        // A write lasts four sessions.
        let table = Table { slow: Some((log.clone(), Duration::from_secs(180))), ..Table::default() };
        let mut sink = open(&log, spec(20, 1 << 20), "m", &table).await;
        drain(&mut sink).await.unwrap();
        check(&table, &log, 1);
        let shared = table.shared.lock().unwrap();
        assert!(shared.writes < 12, "what is due is written together: {}", shared.writes);
        assert!(shared.polls_beside.iter().all(|polls| *polls >= 5), "polled beside each write: {:?}", shared.polls_beside);
    });
}

#[test]
fn a_record_waits_no_longer_than_it_may() {
    run(async {
        let log = log_with(&values(1, 1, 10), 1).await;
        let table = Table::default();
        let mut sink = open(&log, spec(1_000, 1 << 20), "m", &table).await;
        let began = log.env.now();
        while table.shared.lock().unwrap().rows.is_empty() {
            sink.step().await.unwrap();
        }
        let waited = (log.env.now() - began).num_milliseconds();
        assert!((4_900..6_000).contains(&waited), "{waited} ms of virtual time");
    });
}
