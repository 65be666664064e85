//! Recording of the event log and the schema registry: consumers and producers that are made from a recorded log are
//! recorded too.
//!
//! A line holds topics, partitions, offsets and counts, never keys or values. Polls that bring nothing come many times a
//! second, so a row of them is one line, written when something else is polled or the consumer closes.

use std::{collections::BTreeMap, time::Duration};

use async_trait::async_trait;
use serde_json::{Value, json};

use super::{Recorded, Recorder};
use crate::ports::{
    Compatibility, RegisteredSchema, Result, SchemaRegistry, Verdict,
    event_log::{
        EventLog, GroupConsumer, GroupMetadata, GroupSpec, LogRecord, OutRecord, Polled, Producer, TopicPartition, TopicSpec,
    },
};

fn name(partition: &TopicPartition) -> String {
    format!("{}-{}", partition.topic, partition.partition)
}

fn names(partitions: &[TopicPartition]) -> Vec<String> {
    partitions.iter().map(name).collect()
}

fn positions(offsets: &BTreeMap<TopicPartition, i64>) -> BTreeMap<String, i64> {
    offsets.iter().map(|(partition, offset)| (name(partition), *offset)).collect()
}

#[async_trait]
impl EventLog for Recorded<dyn EventLog> {
    async fn create_topic(&self, spec: &TopicSpec) -> Result<()> {
        let result = self.inner.create_topic(spec).await;
        let refs = json!({ "topic": spec.name, "partitions": spec.partitions });
        self.recorder.port("event_log", "create_topic", refs, result)
    }
    async fn offsets(&self, topic: &str) -> Result<BTreeMap<i32, (i64, i64)>> {
        let result = self.inner.offsets(topic).await;
        let refs = json!({ "topic": topic, "offsets": result.as_ref().ok() });
        self.recorder.port("event_log", "offsets", refs, result)
    }
    async fn offsets_at(&self, topic: &str, time_ms: i64) -> Result<BTreeMap<i32, i64>> {
        let result = self.inner.offsets_at(topic, time_ms).await;
        let refs = json!({ "topic": topic, "time_ms": time_ms, "offsets": result.as_ref().ok() });
        self.recorder.port("event_log", "offsets_at", refs, result)
    }
    async fn committed(&self, group: &str, topic: &str) -> Result<BTreeMap<i32, i64>> {
        let result = self.inner.committed(group, topic).await;
        let refs = json!({ "group": group, "topic": topic, "offsets": result.as_ref().ok() });
        self.recorder.port("event_log", "committed", refs, result)
    }
    async fn reset(&self, group: &str, offsets: &BTreeMap<TopicPartition, i64>) -> Result<()> {
        let result = self.inner.reset(group, offsets).await;
        self.recorder.port("event_log", "reset", json!({ "group": group, "offsets": positions(offsets) }), result)
    }
    async fn read(&self, partition: &TopicPartition, offset: i64, max_records: usize) -> Result<(Vec<LogRecord>, i64)> {
        let result = self.inner.read(partition, offset, max_records).await;
        let (records, next) = result.as_ref().ok().map(|(records, next)| (records.len(), *next)).unzip();
        let refs = json!({ "partition": name(partition), "offset": offset, "records": records, "next_offset": next });
        self.recorder.port("event_log", "read", refs, result)
    }
    async fn join(&self, spec: &GroupSpec) -> Result<Box<dyn GroupConsumer>> {
        let result = self.inner.join(spec).await;
        let refs = json!({ "group": spec.group, "member": spec.member, "topics": spec.topics });
        let inner = self.recorder.port("event_log", "join", refs, result)?;
        Ok(Box::new(RecordedConsumer { inner, recorder: self.recorder.clone(), member: spec.member.clone(), quiet: 0 }))
    }
    async fn producer(&self, transactional_id: Option<&str>) -> Result<Box<dyn Producer>> {
        let result = self.inner.producer(transactional_id).await;
        let inner = self.recorder.port("event_log", "producer", json!({ "transactional_id": transactional_id }), result)?;
        let id = transactional_id.map(str::to_owned);
        Ok(Box::new(RecordedProducer { inner, recorder: self.recorder.clone(), id }))
    }
}

#[derive(Debug)]
struct RecordedConsumer {
    inner: Box<dyn GroupConsumer>,
    recorder: Recorder,
    member: String,
    /// Polls in a row that brought nothing.
    quiet: u64,
}

impl RecordedConsumer {
    fn note<T>(&self, call: &str, mut refs: Value, result: Result<T>) -> Result<T> {
        refs["member"] = json!(self.member);
        self.recorder.port("consumer", call, refs, result)
    }
    fn end_quiet(&mut self) {
        match std::mem::take(&mut self.quiet) {
            0 => {}
            polls => self.recorder.record("consumer", "poll", "ok".into(), json!({ "member": self.member, "nothing": polls })),
        }
    }
}

#[async_trait]
impl GroupConsumer for RecordedConsumer {
    async fn poll(&mut self, wait: Duration) -> Result<Polled> {
        let result = self.inner.poll(wait).await;
        let refs = match &result {
            Ok(Polled::Nothing) => {
                self.quiet += 1;
                return result;
            }
            Ok(Polled::Assigned(partitions)) => json!({ "assigned": names(partitions) }),
            Ok(Polled::Revoked(partitions)) => json!({ "revoked": names(partitions) }),
            Ok(Polled::Lost(partitions)) => json!({ "lost": names(partitions) }),
            Ok(Polled::Records { partition, records, next_offset, end_offset }) => {
                let first = records.first().map(|record| record.offset);
                json!({
                    "partition": name(partition), "first_offset": first, "records": records.len(),
                    "next_offset": next_offset, "end_offset": end_offset,
                })
            }
            Err(_) => json!({}),
        };
        self.end_quiet();
        self.note("poll", refs, result)
    }
    async fn seek(&mut self, partition: &TopicPartition, offset: i64) -> Result<()> {
        let result = self.inner.seek(partition, offset).await;
        self.note("seek", json!({ "partition": name(partition), "offset": offset }), result)
    }
    async fn pause(&mut self, partitions: &[TopicPartition]) -> Result<()> {
        let result = self.inner.pause(partitions).await;
        self.note("pause", json!({ "partitions": names(partitions) }), result)
    }
    async fn resume(&mut self, partitions: &[TopicPartition]) -> Result<()> {
        let result = self.inner.resume(partitions).await;
        self.note("resume", json!({ "partitions": names(partitions) }), result)
    }
    fn metadata(&self) -> GroupMetadata {
        self.inner.metadata()
    }
    async fn close(&mut self) -> Result<()> {
        self.end_quiet();
        let result = self.inner.close().await;
        self.note("close", json!({}), result)
    }
}

#[derive(Debug)]
struct RecordedProducer {
    inner: Box<dyn Producer>,
    recorder: Recorder,
    id: Option<String>,
}

impl RecordedProducer {
    fn note<T>(&self, call: &str, mut refs: Value, result: Result<T>) -> Result<T> {
        refs["transactional_id"] = json!(self.id);
        self.recorder.port("producer", call, refs, result)
    }
}

#[async_trait]
impl Producer for RecordedProducer {
    async fn begin(&mut self) -> Result<()> {
        let result = self.inner.begin().await;
        self.note("begin", json!({}), result)
    }
    async fn send(&mut self, records: Vec<OutRecord>) -> Result<()> {
        let mut by_topic: BTreeMap<String, u64> = BTreeMap::new();
        for record in &records {
            *by_topic.entry(record.topic.clone()).or_default() += 1;
        }
        let result = self.inner.send(records).await;
        self.note("send", json!({ "records": by_topic }), result)
    }
    async fn send_offsets(&mut self, offsets: &BTreeMap<TopicPartition, i64>, group: &GroupMetadata) -> Result<()> {
        let result = self.inner.send_offsets(offsets, group).await;
        let refs = json!({ "offsets": positions(offsets), "group": group.group, "generation": group.generation });
        self.note("send_offsets", refs, result)
    }
    async fn commit(&mut self) -> Result<()> {
        let result = self.inner.commit().await;
        self.note("commit", json!({}), result)
    }
    async fn abort(&mut self) -> Result<()> {
        let result = self.inner.abort().await;
        self.note("abort", json!({}), result)
    }
}

#[async_trait]
impl SchemaRegistry for Recorded<dyn SchemaRegistry> {
    async fn register(&self, subject: &str, schema: &str) -> Result<u32> {
        let result = self.inner.register(subject, schema).await;
        let refs = json!({ "subject": subject, "id": result.as_ref().ok() });
        self.recorder.port("schema_registry", "register", refs, result)
    }
    async fn schema(&self, id: u32) -> Result<String> {
        let result = self.inner.schema(id).await;
        self.recorder.port("schema_registry", "schema", json!({ "id": id }), result)
    }
    async fn latest(&self, subject: &str) -> Result<RegisteredSchema> {
        let result = self.inner.latest(subject).await;
        let version = result.as_ref().ok().map(|schema| schema.version);
        self.recorder.port("schema_registry", "latest", json!({ "subject": subject, "version": version }), result)
    }
    async fn version(&self, subject: &str, version: u32) -> Result<RegisteredSchema> {
        let result = self.inner.version(subject, version).await;
        self.recorder.port("schema_registry", "version", json!({ "subject": subject, "version": version }), result)
    }
    async fn versions(&self, subject: &str) -> Result<Vec<u32>> {
        let result = self.inner.versions(subject).await;
        let refs = json!({ "subject": subject, "versions": result.as_ref().ok() });
        self.recorder.port("schema_registry", "versions", refs, result)
    }
    async fn check(&self, subject: &str, schema: &str) -> Result<Verdict> {
        let result = self.inner.check(subject, schema).await;
        self.recorder.port("schema_registry", "check", json!({ "subject": subject }), result)
    }
    async fn compatibility(&self, subject: &str) -> Result<Compatibility> {
        let result = self.inner.compatibility(subject).await;
        self.recorder.port("schema_registry", "compatibility", json!({ "subject": subject }), result)
    }
    async fn set_compatibility(&self, subject: &str, level: Compatibility) -> Result<()> {
        let result = self.inner.set_compatibility(subject, level).await;
        self.recorder.port("schema_registry", "set_compatibility", json!({ "subject": subject, "level": level }), result)
    }
}
