//! The stream's monitor and its reconciliation over a real Kafka and a real registry, as the built program runs them: a lag
//! and bad shares are found with Kafka's own numbers, told, and over when they are over.
//!
//! The monitor looks each minute, which nothing makes quicker. So the test changes the world between two looks while the asset
//! is paused, and a breaker that tries again each second tells at once when all is well again. Where Kafka or the registry
//! cannot be had, the test says so loudly.
#![expect(clippy::disallowed_methods, reason = "a test starts, stops and waits for programs, and writes their files")]

use std::{
    collections::BTreeSet,
    fs::File,
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use chrono::{DateTime, NaiveDate, Utc};
use simulacro_adapters::{KafkaConfig, KafkaLog, SqliteLedger};
use simulacro_core::{
    assets::{DEAD_LETTER_CHECK, LATE_CHECK, MONITOR, SINK_CHECK},
    contract::check::QualityResult,
    orchestrator::breaker,
    ports::{
        Run, RunLedger, RunState,
        event_log::{EventLog, TopicPartition},
    },
    slo::samples::{LAG_CHECK, RECONCILED, Reconciled},
    streaming::{config::StreamConfig, reconcile::Ratio},
};
use simulacro_shop::cdnow;

use crate::{
    binaries::{output, program, said, source},
    services::{
        alerts::{AlertReceiver, Told},
        kafka::Kafka,
        registry::Registry,
    },
};

/// A day with a little of everything, one that waits, one that is bad, and one that is good and large.
const DAYS: [&str; 4] = ["1997-01-02", "1997-01-03", "1997-01-04", "1997-01-05"];
/// Only so that a failure ends: nothing here depends on how long something takes.
const PATIENCE: Duration = Duration::from_secs(400);

/// A program that runs until it is told to stop.
struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    fn start(arguments: &[&str], log: PathBuf) -> Self {
        let file = File::create(&log).expect("a file");
        let child = program("simulacro")
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .expect("the program starts");
        Self { child, log }
    }

    fn tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        format!("{}:\n{}", self.log.display(), lines[lines.len().saturating_sub(20)..].join("\n"))
    }

    /// Asks it to stop, and waits until it has.
    fn stop(mut self, signal: &str) {
        let asked = Command::new("kill").args([signal, &self.child.id().to_string()]).status();
        assert!(asked.is_ok_and(|status| status.success()), "it has ended by itself; {}", self.tail());
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("it is ours") {
                break status;
            }
            assert!(begun.elapsed() < PATIENCE, "it does not stop; {}", self.tail());
            std::thread::sleep(Duration::from_millis(50));
        };
        assert!(status.success(), "{status}; {}", self.tail());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Services, files and what the test reads of them.
struct World {
    dir: tempfile::TempDir,
    /// The one configuration of all commands.
    config: String,
    kafka: Kafka,
    alerts: AlertReceiver,
    log: KafkaLog,
    stream: StreamConfig,
}

impl World {
    async fn start() -> Option<Self> {
        let registry = Registry::shared_url().await?;
        let kafka = Kafka::start()?;
        let (dir, alerts) = (tempfile::tempdir().expect("a temporary folder"), AlertReceiver::start().await);
        let log = KafkaLog::new(KafkaConfig::new(&kafka.address)).expect("a Kafka client");
        let shop = source(dir.path(), |text| text);
        let text = format!(
            "[source]\nfolder = {shop:?}\n[lake]\ndata = {:?}\n[batch]\ncontract = 'cdnow'\n[kafka]\nbrokers = '{}'\n\
             [registry]\nurl = '{registry}'\n[alerts.webhook]\nurl = '{}'\n\
             [assets.{MONITOR}]\nbreaker = {{ open_s = 1, trials = 10000 }}\n",
            dir.path().join("data"),
            kafka.address,
            alerts.url,
        );
        let path = dir.path().join("platform.toml");
        std::fs::write(&path, text).expect("the configuration is written");
        let config = path.to_str().expect("a path").to_owned();
        Some(Self { dir, config, kafka, alerts, log, stream: StreamConfig::specification() })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, arguments: &[&str]) -> Output {
        output("simulacro", &[arguments, &["--config", &self.config]].concat())
    }

    fn ran(&self, arguments: &[&str]) -> String {
        let run = self.run(arguments);
        assert!(run.status.success(), "{arguments:?}: {}", said(&run));
        String::from_utf8_lossy(&run.stdout).into_owned()
    }

    fn runs(&self) -> String {
        self.ran(&["runs", "--asset", MONITOR])
    }

    fn process(&self, log: &str, arguments: &[&str]) -> Process {
        Process::start(&[arguments, &["--config", &self.config]].concat(), self.path(log))
    }

    /// A process of the job, with the sink that the monitor watches.
    fn worker(&self, log: &str) -> Process {
        self.process(log, &["stream", "--sinks", "warehouse"])
    }

    /// Sends a day; says how many records it came to, and how many of them are damaged.
    fn produce(&self, day: usize, more: &[&str]) -> (u64, u64) {
        let printed = self.ran(&[&["produce", "--date", DAYS[day]], more].concat());
        let words: Vec<&str> = printed.split_whitespace().collect();
        let before = |word: &str| {
            let at = words.iter().position(|w| *w == word).unwrap_or_else(|| panic!("{word} is not in {printed}"));
            words[at - 1].parse().unwrap_or_else(|_| panic!("no number before {word} in {printed}"))
        };
        (before("records"), before("of"))
    }

    async fn ledger(&self) -> SqliteLedger {
        SqliteLedger::open(&self.path("data/ledger.db")).await.expect("the ledger opens")
    }

    /// The monitor's looks, the newest last.
    async fn looks(&self) -> Vec<Run> {
        self.ledger().await.runs(MONITOR).await.expect("the ledger answers")
    }

    /// The outcomes of a check, the newest last.
    async fn outcomes(&self, check: &str) -> Vec<QualityResult> {
        let days: BTreeSet<NaiveDate> = self.looks().await.iter().map(|run| run.fecha).collect();
        let mut all = Vec::new();
        for day in days {
            all.extend(self.ledger().await.quality(day).await.expect("the ledger answers"));
        }
        all.retain(|outcome| outcome.check == check);
        all
    }

    async fn breaker(&self) -> breaker::Breaker {
        let facts = self.ledger().await.facts(breaker::TOPIC).await.expect("the ledger answers");
        breaker::Breaker::recall(&facts, MONITOR)
    }

    /// What was told of the one incident that the monitor's checks can have.
    fn told(&self) -> Vec<Told> {
        self.alerts.of(&format!("breaker_open:{MONITOR}"))
    }

    /// Looks again until it is so.
    async fn until(&self, what: &str, mut is_so: impl AsyncFnMut() -> bool) {
        let begun = Instant::now();
        while !is_so().await {
            assert!(begun.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}\n{}\n{:?}", self.runs(), self.told());
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Waits until the job has done all there is, in both stages.
    async fn caught_up(&self) {
        // Topics that are being made have no leader for a moment.
        let is_done = async || self.run(&["stream-status"]).stdout.starts_with(b"lag 0 events, 0.0 s\n");
        self.until("the job has caught up", is_done).await;
    }

    /// Waits until the newest look has gone well, but for those that were skipped, and gives it.
    async fn success(&self) -> Run {
        let newest = async || self.looks().await.into_iter().rfind(|run| run.state != RunState::Skipped);
        let is_good = async || newest().await.is_some_and(|run| run.state == RunState::Succeeded);
        self.until("the newest look has gone well", is_good).await;
        newest().await.expect("a look")
    }

    /// Skips looks until they are resumed; one that is under way tries again until all is well.
    fn pause(&self) {
        self.ran(&["pause", MONITOR, "--by", "ana", "--why", "cambio"]);
    }

    /// Changes the world while nobody looks, so that the next look sees the change whole.
    async fn unseen<T>(&self, change: impl AsyncFnOnce() -> T) -> T {
        self.pause();
        let is_over = async || self.looks().await.iter().all(|run| run.state != RunState::Running);
        self.until("no look is under way", is_over).await;
        let changed = change().await;
        self.ran(&["resume", MONITOR]);
        changed
    }

    /// Records of a topic, as they lie in Kafka.
    async fn records(&self, topic: &str) -> u64 {
        let mut count = 0;
        for (partition, (mut offset, end)) in self.log.offsets(topic).await.expect("the topic is there") {
            let at = TopicPartition { topic: topic.to_owned(), partition };
            while offset < end {
                let (records, next) = self.log.read(&at, offset, 10_000).await.expect("records");
                count += records.len() as u64;
                offset = next;
            }
        }
        count
    }

    /// When the oldest record was appended that the group has not committed, of either stage, by the broker's clock.
    async fn waiting_since(&self) -> DateTime<Utc> {
        let mut oldest = Vec::new();
        for topic in [&self.stream.topics.clicks, &self.stream.topics.partials] {
            let ends = self.log.offsets(topic).await.expect("the topic is there");
            for (partition, mut from) in self.log.committed(&self.stream.group, topic).await.expect("the group is known") {
                let at = TopicPartition { topic: topic.clone(), partition };
                // Markers of transactions are skipped by reading on.
                while from < ends[&partition].1 {
                    let (records, next) = self.log.read(&at, from, 1).await.expect("records");
                    if let Some(record) = records.first() {
                        oldest.push(record.appended_ms);
                        break;
                    }
                    from = next;
                }
            }
        }
        oldest.into_iter().min().and_then(DateTime::from_timestamp_millis).expect("something waits")
    }
}

/// The number before a word of a text.
fn number_before(text: &str, word: &str) -> u64 {
    let before = text.split(word).next().unwrap_or_default().trim_end();
    let number = before.rsplit(' ').next().and_then(|n| n.parse().ok());
    number.unwrap_or_else(|| panic!("no number before {word:?} in {text:?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_monitor_finds_in_kafka_what_is_there_and_the_day_is_reconciled() {
    let Some(world) = World::start().await else { return };
    let little = ["--duplicates", "30", "--out-of-order", "20", "--delay-max", "3600", "--malformed", "10"];
    let (quiet, _) = world.produce(0, &[&["--browsing", "500"], &little[..]].concat());
    let worker = world.worker("worker-1.log");
    world.caught_up().await;
    let orchestrator = world.process("orchestrator.log", &["orchestrate"]);

    // All is well. What came before the first look is compared with nothing.
    let look = world.success().await;
    assert_eq!((look.report["lag_records"].as_i64(), look.report["lag_ms"].as_i64()), (Some(0), Some(0)), "{look:?}");
    assert_eq!((world.told(), world.breaker().await), (Vec::new(), breaker::Breaker::Closed));
    assert!(world.runs().contains(" succeeded "), "{}", world.runs());

    a_lag_is_told(&world, worker).await;
    // What is left of the lag when the look ends would be a second one for a look that comes while a slow machine works on it.
    world.pause();
    let worker = world.worker("worker-2.log");
    let look = is_over(&world, 1).await;
    assert!(look.report["lag_records"].as_i64().is_some_and(|records| records <= 5_000), "{look:?}");
    world.caught_up().await;
    // Of the little on the first day, and of nothing on the second. What is compared is complete: each day ends with heartbeats.
    let (first, second) = (reconciled(&world, 0, 0).await, reconciled(&world, 1, 0).await);
    assert!(first.stream < first.batch && second.stream == second.batch, "{first:?} {second:?}");

    bad_shares_are_told(&world, quiet).await;
    world.pause();
    world.produce(3, &["--browsing", "5000"]);
    is_over(&world, 2).await;

    orchestrator.stop("-TERM");
    let looks = world.looks().await;
    let with = |state: RunState| looks.iter().filter(|run| run.state == state).count();
    assert!(with(RunState::Succeeded) >= 3 && with(RunState::Succeeded) + with(RunState::Skipped) == looks.len(), "{looks:?}");
    for check in [LAG_CHECK, LATE_CHECK, DEAD_LETTER_CHECK, SINK_CHECK] {
        let outcomes = world.outcomes(check).await;
        let failed = outcomes.iter().filter(|o| !o.passed).count();
        assert!(outcomes.last().is_some_and(|o| o.passed), "{check}: {outcomes:?}");
        assert_eq!(failed > 0, check != SINK_CHECK, "{check}: {failed} of {}", outcomes.len());
    }
    let sink = world.outcomes(SINK_CHECK).await.pop().expect("an outcome");
    assert!(sink.observed.contains(" records, the oldest for "), "the sink has loaded something: {sink:?}");
    assert!(world.runs().starts_with("leader     none"), "{}", world.runs());

    world.caught_up().await;
    worker.stop("-TERM");
    // More than 5 % of the bad day is not in its windows, which is an exit code of its own, explained or not.
    let third = reconciled(&world, 2, 4).await;
    assert!(third.stream < third.batch, "{third:?}");
}

/// Stops the workers before a day comes: the lag is told as Kafka has it, and nothing else is.
async fn a_lag_is_told(world: &World, worker: Process) {
    let (sent, _) = world
        .unseen(async || {
            worker.stop("-INT");
            world.produce(1, &["--browsing", "1700"])
        })
        .await;
    world.until("the lag is told", async || world.told().len() == 1).await;
    let behind = world.kafka.lag(&world.stream.group, &world.stream.topics.clicks);
    let records: i64 = behind.values().sum();
    // The markers of the transactions count, in Kafka as here.
    assert!(behind.len() == 4 && records > 5_000 && records >= i64::try_from(sent).expect("a number"), "{behind:?}, {sent} sent");
    let told = world.told().remove(0);
    let found = format!("{LAG_CHECK}: found {records} records, the oldest for ");
    assert!(!told.is_over && told.summary.contains(&found), "{told:?} has not {found}");
    assert!(told.summary.contains(" ms, expected at most 5000 records for at most 120000 ms"), "{told:?}");
    for other in [LATE_CHECK, DEAD_LETTER_CHECK, SINK_CHECK] {
        assert!(!told.summary.contains(other), "{told:?}");
    }
    let shown = world.runs();
    assert!(shown.contains(&told.summary) && shown.contains("  breaker ") && shown.contains(" running "), "{shown}");

    // How long it has waited is told from the time at which Kafka appended it.
    let outcomes = world.outcomes(LAG_CHECK).await;
    let first = outcomes.iter().find(|o| !o.passed).expect("it is kept");
    let waited = Duration::from_millis(number_before(&first.observed, " ms"));
    let looked = world.waiting_since().await + waited;
    let look = world.looks().await.into_iter().rfind(|run| run.state == RunState::Running).expect("a look");
    assert!(looked <= first.checked_at && look.scheduled_at.is_some_and(|at| at <= looked), "{first:?} {look:?}");
}

/// Sends a day of which much is late and damaged, and lets the job work on it: both shares are told, of what came since the
/// look with which they are compared.
async fn bad_shares_are_told(world: &World, quiet: u64) {
    let topics = &world.stream.topics;
    let bad = ["--browsing", "900", "--out-of-order", "250", "--delay-max", "7200", "--malformed", "40"];
    let (late_before, dead_before) = (world.records(&topics.late).await, world.records(&topics.dead_letter).await);
    let (sent, damaged) = world
        .unseen(async || {
            let sent = world.produce(2, &bad);
            world.caught_up().await;
            sent
        })
        .await;
    world.until("the shares are told", async || world.told().len() == 3).await;
    let late = world.records(&topics.late).await - late_before;
    let dead = world.records(&topics.dead_letter).await - dead_before;
    assert_eq!(dead, damaged, "what is damaged is dead");
    let told = world.told().remove(2);
    assert!(!told.is_over && !told.summary.contains(LAG_CHECK) && !told.summary.contains(SINK_CHECK), "{told:?}");
    let came_max = world.records(&topics.clicks).await - quiet;
    for (check, part, max) in [(LATE_CHECK, late, "5.00 %"), (DEAD_LETTER_CHECK, dead, "1.00 %")] {
        let of = told.summary.split(&format!("{check}: found {part} of ")).nth(1);
        let of = of.unwrap_or_else(|| panic!("{check} with {part} is not in {told:?}"));
        // A look that is older than the window may have been forgotten.
        let came = number_before(of, " events,");
        assert!((sent..=came_max).contains(&came), "{came} of {sent} to {came_max}: {told:?}");
        let share = Ratio { numerator: part, denominator: came };
        let expected = format!("{came} events, {share}, expected at most {max} in 600 s, from 100 events on");
        assert!(of.starts_with(&expected), "{told:?} has not {expected}");
    }
}

/// The incident with this number has an end, and the breaker is closed; gives the look that has gone well.
async fn is_over(world: &World, incidents: usize) -> Run {
    world.until("the end is told", async || world.told().len() == 2 * incidents).await;
    assert!(world.told().last().is_some_and(|told| told.is_over), "{:?}", world.told());
    let look = world.success().await;
    assert_eq!(world.breaker().await, breaker::Breaker::Closed);
    let shown = world.runs();
    assert!(!shown.contains("breaker") && !shown.contains("raised"), "{shown}");
    look
}

/// Compares a day with the batch: what is late, duplicated or damaged explains every cent, and the ledger has it.
async fn reconciled(world: &World, day: usize, code: i32) -> Reconciled {
    world.ran(&["batch", "run", "--date", DAYS[day]]);
    let run = world.run(&["reconcile", "--date", DAYS[day]]);
    let printed = String::from_utf8_lossy(&run.stdout);
    assert_eq!(run.status.code(), Some(code), "{printed}{}", said(&run));
    assert!(printed.contains("unexplained: 0.00\n"), "{printed}");
    let facts = world.ledger().await.facts(RECONCILED).await.expect("the ledger answers");
    let fact = facts.into_iter().find(|fact| fact.name == DAYS[day]).expect("it is kept");
    let kept: Reconciled = serde_json::from_value(fact.value).expect("a reconciled day");
    let purchases = cdnow::parse(cdnow::BYTES).expect("the shipped file parses");
    let sold: i64 = purchases.iter().filter(|p| p.fecha.to_string() == DAYS[day]).map(|p| p.monto_cents).sum();
    assert_eq!((kept.batch, kept.unexplained), (sold, Some(0)), "{kept:?}");
    kept
}
