//! One transaction, sent until it is known to have landed, and never twice.
//!
//! What a producer loses it may send again only while nobody can have seen it: before a commit was asked for. Afterwards the
//! commit alone is repeated, which is the same as once. Left out: offsets of a group, which are the stream job's own protocol.

use std::time::Duration;

use simulacro_core::ports::{
    Disposition, Env, PortError,
    event_log::{OutRecord, Producer},
};
use tracing::warn;

/// Most tries of a transaction, and of a commit.
const TRIES_MAX: u32 = 5;
/// Wait before the first repetition; it doubles.
const TRY_AGAIN_AFTER: Duration = Duration::from_millis(500);
/// Records of one call of the log.
const SEND_RECORDS: usize = 1_000;

/// Sends `records` as one transaction. `reopen` makes a producer of the same id, which ends what this one left open: an
/// outage longer than a transaction may last makes the broker abort it and refuse the producer from then on.
///
/// # Errors
/// `Permanent` when another producer has taken the id, or a record cannot be kept; any other after the last try. Then the
/// transaction has not landed, unless it was the commit that failed.
pub async fn transact(
    env: &dyn Env,
    producer: &mut Box<dyn Producer>,
    reopen: impl AsyncFn() -> Result<Box<dyn Producer>, PortError>,
    records: &[OutRecord],
) -> Result<(), PortError> {
    let mut attempt = 1;
    while let Err(error) = send(producer.as_mut(), records).await {
        again(env, error, attempt, "transaction is thrown away and sent again").await?;
        if let Err(error) = producer.abort().await {
            warn!(error = %error.chain(), "a new producer ends the transaction");
            *producer = reopen().await?;
        }
        attempt += 1;
    }
    attempt = 1;
    while let Err(error) = producer.commit().await {
        again(env, error, attempt, "commit is asked for again").await?;
        attempt += 1;
    }
    Ok(())
}

async fn send(producer: &mut dyn Producer, records: &[OutRecord]) -> Result<(), PortError> {
    producer.begin().await?;
    for part in records.chunks(SEND_RECORDS) {
        producer.send(part.to_vec()).await?;
    }
    Ok(())
}

async fn again(env: &dyn Env, error: PortError, attempt: u32, what: &'static str) -> Result<(), PortError> {
    if error.disposition == Disposition::Permanent || attempt >= TRIES_MAX {
        return Err(error);
    }
    warn!(error = %error.chain(), attempt, "{what}");
    env.sleep(TRY_AGAIN_AFTER * (1 << (attempt - 1))).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, VecDeque},
        sync::{Arc, Mutex},
    };

    use async_trait::async_trait;
    use chrono::{DateTime, Utc};
    use simulacro_core::ports::{
        Result,
        event_log::{GroupMetadata, TopicPartition},
    };

    use super::*;

    #[derive(Debug)]
    struct Patient;

    #[async_trait]
    impl Env for Patient {
        fn now(&self) -> DateTime<Utc> {
            DateTime::UNIX_EPOCH
        }
        async fn sleep(&self, _: Duration) {}
        fn random(&self) -> u64 {
            0
        }
        fn new_id(&self) -> String {
            String::new()
        }
    }

    /// What the calls answer, in order, and which they were. Without an answer they succeed.
    #[derive(Debug, Clone, Default)]
    struct Script(Arc<Mutex<Answers>>);

    /// What is still to be answered, and what was called.
    type Answers = (VecDeque<Option<PortError>>, Vec<&'static str>);

    impl Script {
        fn new(answers: impl IntoIterator<Item = Option<PortError>>) -> Self {
            Self(Arc::new(Mutex::new((answers.into_iter().collect(), Vec::new()))))
        }
        fn call(&self, name: &'static str) -> Result<()> {
            let (answers, calls) = &mut *self.0.lock().unwrap();
            calls.push(name);
            answers.pop_front().flatten().map_or(Ok(()), Err)
        }
    }

    #[async_trait]
    impl Producer for Script {
        async fn begin(&mut self) -> Result<()> {
            self.call("begin")
        }
        async fn send(&mut self, _: Vec<OutRecord>) -> Result<()> {
            self.call("send")
        }
        async fn send_offsets(&mut self, _: &BTreeMap<TopicPartition, i64>, _: &GroupMetadata) -> Result<()> {
            self.call("send_offsets")
        }
        async fn commit(&mut self) -> Result<()> {
            self.call("commit")
        }
        async fn abort(&mut self) -> Result<()> {
            self.call("abort")
        }
    }

    async fn check(answers: Vec<Option<PortError>>, calls: &str, lands: bool) {
        let script = Script::new(answers);
        let mut producer: Box<dyn Producer> = Box::new(script.clone());
        let reopen = async || -> Result<Box<dyn Producer>> {
            script.call("reopen")?;
            let made: Box<dyn Producer> = Box::new(script.clone());
            Ok(made)
        };
        let record = OutRecord { topic: "t".into(), partition: None, key: None, value: None, headers: vec![] };
        let result = transact(&Patient, &mut producer, reopen, &[record]).await;
        assert_eq!((script.0.lock().unwrap().1.join(" ").as_str(), result.is_ok()), (calls, lands));
    }

    #[tokio::test]
    async fn what_was_not_committed_is_sent_again_and_what_may_have_been_is_not() {
        let (timeout, fenced) = (|| Some(PortError::unknown("send")), || Some(PortError::permanent("abort").code("FENCED")));
        check(vec![], "begin send commit", true).await;
        check(vec![None, timeout()], "begin send abort begin send commit", true).await;
        check(vec![None, None, timeout()], "begin send commit commit", true).await;
        check(vec![None, fenced()], "begin send", false).await;
        check(vec![None, None, fenced()], "begin send commit", false).await;
    }

    #[tokio::test]
    async fn a_producer_that_the_broker_gave_up_during_an_outage_is_replaced() {
        let (timeout, fenced) = (Some(PortError::unknown("send")), Some(PortError::permanent("abort").code("FENCED")));
        check(vec![None, timeout, fenced], "begin send abort reopen begin send commit", true).await;
    }

    #[tokio::test]
    async fn tries_are_bounded() {
        let commits: Vec<_> = [None, None].into_iter().chain((0..9).map(|_| Some(PortError::unknown("commit")))).collect();
        check(commits, "begin send commit commit commit commit commit", false).await;
    }
}
