//! One run of one story: the same processes, links and broker as in [`crate::stream`], with the pipeline of somebody else.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use sha2::{Digest, Sha256};
use simulacro_core::{
    history::{Event, Recorder, recorded_log},
    ports::{
        Env,
        event_log::{EventLog, TopicPartition},
    },
};
use simulacro_log::{Client, Limits, Request, Response, Settings, Stored};

use super::{Evidence, Pipeline, Story};
use crate::{
    broker::SimBroker,
    interpose,
    ports::SimHistory,
    rng::Stream,
    stream::{
        faults::Faults,
        link::HostLink,
        process::{HostEnv, Process, WorldEnv},
    },
    world::{Failure, Judgement},
};

/// How long a worker that gave up stays down.
const RESTART_AFTER: Duration = Duration::from_secs(1);
/// How often the observer looks.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// A process of the story, as the pipeline sees it.
#[derive(Debug)]
pub struct Host {
    /// Its name, which stays over its lives.
    pub name: String,
    /// Its number among those of its kind, from 0.
    pub number: usize,
    /// Its clock, which may be wrong, and its randomness.
    pub env: Arc<dyn Env>,
    /// The event log, over a link that loses messages.
    pub log: Arc<dyn EventLog>,
    /// Where it may write down what happens.
    pub recorder: Recorder,
    process: Arc<Process>,
    stage: Arc<Stage>,
}

impl Host {
    /// A parameter of the story, when it has it.
    pub fn own(&self, name: &str) -> Option<u64> {
        self.stage.story.own.get(name).copied()
    }
    /// Counts a hit of the pipeline's own fault of this name. A story whose own fault is never hit is inconclusive.
    pub fn strike(&self, name: &str) {
        *self.stage.seen().struck.entry(name.to_owned()).or_default() += 1;
    }
    /// Whether it is told to end this life in order.
    pub fn must_leave(&self) -> bool {
        self.process.is_leaving()
    }
}

#[derive(Debug, Default)]
struct Seen {
    feeding: usize,
    struck: BTreeMap<String, u64>,
    drained: bool,
    broken: Vec<String>,
}

#[derive(Debug)]
struct Stage {
    story: Story,
    root: Stream,
    broker: Arc<SimBroker>,
    faults: Arc<Faults>,
    recorder: Recorder,
    seen: Mutex<Seen>,
}

impl Stage {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a process has when it starts; each start has random streams of its own.
    fn host(self: &Arc<Self>, process: &Arc<Process>, number: usize, start: u64) -> (Arc<HostEnv>, Host) {
        let mine = self.root.child(&process.name);
        let random = mine.child(&format!("random {start}"));
        let env = HostEnv::new(self.story.start, process.clone(), self.faults.clone(), random);
        let way = mine.child(&format!("way {start}"));
        let link = HostLink::new(self.broker.clone(), env.clone(), way, self.recorder.clone());
        let log = recorded_log(Arc::new(Client::new(link, Settings::KAFKA)), self.recorder.clone());
        let host = Host {
            name: process.name.clone(),
            number,
            env: env.clone(),
            log,
            recorder: self.recorder.clone(),
            process: process.clone(),
            stage: self.clone(),
        };
        (env, host)
    }

    fn fed(&self) -> Vec<Stream> {
        (0..self.story.producers).map(|n| self.root.child("fed").child(&format!("producer-{n}"))).collect()
    }
}

type Ended = Result<(), Box<dyn std::error::Error>>;

/// Runs the story in this process. One process runs one story once: globals start fresh. `plant` puts a real clock into the
/// history, which the canary must find.
///
/// # Errors
/// When the world itself breaks; what the pipeline does wrong is in the judgement.
pub fn run<P: Pipeline>(pipeline: &Arc<P>, story: &Story, seed: u64, plant: bool) -> Result<(Judgement, Vec<Event>), Failure> {
    let start = story.start;
    let nanos = |elapsed: Duration| (start + elapsed).timestamp_nanos_opt().unwrap_or_default().cast_unsigned();
    interpose::set_seed(seed);
    interpose::start_virtual(nanos(Duration::ZERO));
    let broker = SimBroker::new(Arc::new(WorldEnv), Limits::KAFKA, Duration::ZERO);
    for topic in pipeline.topics() {
        broker.peek(Request::CreateTopic(topic)).map_err(|refusal| refusal.what)?;
    }
    let history = Arc::new(SimHistory::default());
    let stage = Arc::new(Stage {
        faults: Arc::new(Faults::of(&story.fault, start, pipeline.group(), &broker)),
        story: story.clone(),
        root: Stream::root(seed),
        broker: broker.clone(),
        recorder: Recorder::new(Arc::new(WorldEnv), history.clone()),
        seen: Mutex::new(Seen { feeding: story.producers, ..Seen::default() }),
    });

    let limit = Duration::from_secs(story.healed_s() + story.patience_s);
    let mut sim = turmoil::Builder::new()
        .epoch(start.into())
        .rng_seed(seed)
        .tick_duration(Duration::from_millis(story.tick_ms))
        .simulation_duration(limit * 2 + Duration::from_secs(3_600))
        .build();
    let mut workers = Vec::new();
    for number in 0..story.workers {
        let process = Process::new(format!("worker-{number}"), Some(number));
        let (pipeline, stage, inside, starts) = (pipeline.clone(), stage.clone(), process.clone(), Arc::new(AtomicU64::new(0)));
        sim.host(process.name.clone(), move || {
            work(pipeline.clone(), stage.clone(), inside.clone(), number, starts.fetch_add(1, Ordering::SeqCst))
        });
        workers.push((process, None::<Duration>));
    }
    for (number, random) in stage.fed().into_iter().enumerate() {
        let process = Process::new(format!("producer-{number}"), None);
        let (pipeline, stage) = (pipeline.clone(), stage.clone());
        sim.host(process.name.clone(), move || feed(pipeline.clone(), stage.clone(), process.clone(), number, random.clone()));
    }
    {
        let (pipeline, stage, process) = (pipeline.clone(), stage.clone(), Process::new("observer", None));
        sim.host("observer", move || observe(pipeline.clone(), stage.clone(), process.clone()));
    }

    loop {
        sim.step().map_err(|e| format!("the simulation stopped: {e}"))?;
        let elapsed = sim.elapsed();
        interpose::set_virtual(nanos(elapsed));
        let note = |call: &str, host: &str| {
            stage.recorder.record("world", call, "ok".into(), serde_json::json!({ "host": host }));
        };
        for (number, deed) in stage.faults.due(elapsed) {
            workers[number].0.suffer(deed, elapsed);
            note("strike", &workers[number].0.name);
        }
        for (process, back_at) in &mut workers {
            process.wake_when_due(elapsed);
            match (process.down(), *back_at) {
                (Some(down), None) => {
                    note("crash", &process.name);
                    sim.crash(process.name.as_str());
                    *back_at = Some(elapsed + down);
                }
                (Some(_), Some(at)) if elapsed >= at => {
                    note("restart", &process.name);
                    process.revive();
                    sim.bounce(process.name.as_str());
                    *back_at = None;
                }
                (Some(_) | None, _) => {}
            }
        }
        if stage.seen().drained || elapsed > limit {
            break;
        }
    }
    let virtual_s = sim.elapsed().as_secs();
    drop(sim);
    if plant {
        stage.recorder.record("planted", "real_clock", interpose::real_nanos().to_string(), serde_json::Value::Null);
    }
    let judgement = judge(pipeline.as_ref(), &stage, virtual_s)?;
    let events = history.events.lock().map_err(|_| "the history panicked")?.clone();
    Ok((judgement, events))
}

async fn work<P: Pipeline>(pipeline: Arc<P>, stage: Arc<Stage>, process: Arc<Process>, number: usize, start: u64) -> Ended {
    let (env, host) = stage.host(&process, number, start);
    loop {
        if process.is_leaving() {
            env.sleep(Duration::from_millis(100)).await;
            continue;
        }
        if let Err(error) = pipeline.work(&host).await {
            stage.recorder.record("world", "worker_stopped", error.chain(), serde_json::json!({ "host": process.name }));
            env.sleep(RESTART_AFTER).await;
        }
    }
}

async fn feed<P: Pipeline>(pipeline: Arc<P>, stage: Arc<Stage>, process: Arc<Process>, number: usize, random: Stream) -> Ended {
    let (_, host) = stage.host(&process, number, 0);
    if let Err(error) = pipeline.feed(&host, random).await {
        stage.seen().broken.push(format!("{} gave up: {}", process.name, error.chain()));
    }
    stage.seen().feeding -= 1;
    Ok(())
}

/// Looks through a link of its own, that no fault strikes, whether all is done.
async fn observe<P: Pipeline>(pipeline: Arc<P>, stage: Arc<Stage>, process: Arc<Process>) -> Ended {
    let (env, host) = stage.host(&process, 0, 0);
    loop {
        env.sleep(LOOK_EVERY).await;
        let is_quiet = stage.seen().feeding == 0 && env.elapsed() >= Duration::from_secs(stage.story.healed_s());
        // The broker may be away: then there is no look.
        if is_quiet && matches!(pipeline.is_done(&host).await, Ok(true)) {
            stage.seen().drained = true;
        }
    }
}

/// All records of a topic, as they stand now.
fn all(broker: &SimBroker, topic: &str) -> Result<BTreeMap<i32, Vec<Stored>>, Failure> {
    let Response::Bounds(bounds) = broker.peek(Request::Bounds { topic: topic.to_owned() }).map_err(|refusal| refusal.what)?
    else {
        return Err(format!("read {topic}: found no bounds").into());
    };
    let mut out: BTreeMap<i32, Vec<Stored>> = BTreeMap::new();
    for (partition, (mut offset, end)) in bounds {
        let records = out.entry(partition).or_default();
        while offset < end {
            let partition = TopicPartition { topic: topic.to_owned(), partition };
            let fetch = Request::Fetch { partition, offset, records_max: 100_000, bytes_max: 64 << 20 };
            let Response::Fetched(fetched) = broker.peek(fetch).map_err(|refusal| refusal.what)? else {
                return Err(format!("read {topic}: found no records").into());
            };
            offset = fetched.next_offset;
            records.extend(fetched.records);
        }
    }
    Ok(out)
}

fn digest(topic: &BTreeMap<i32, Vec<Stored>>) -> String {
    let text = serde_json::to_vec(&format!("{topic:?}")).unwrap_or_default();
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn judge<P: Pipeline>(pipeline: &P, stage: &Stage, virtual_s: u64) -> Result<Judgement, Failure> {
    let mut topics = BTreeMap::new();
    for spec in pipeline.topics() {
        topics.insert(spec.name.clone(), all(&stage.broker, &spec.name)?);
    }
    let hashes = topics.iter().map(|(name, topic)| (name.clone(), digest(topic))).collect();
    let (drained, mut problems, struck) = {
        let seen = stage.seen();
        (seen.drained, seen.broken.clone(), seen.struck.clone())
    };
    let evidence = Evidence { story: &stage.story, fed: stage.fed(), topics, drained };
    let mut broken: Vec<String> = pipeline.judge(&evidence).iter().map(|(name, text)| format!("{name}: {text}")).collect();
    if !drained {
        let patience = stage.story.patience_s;
        broken.push(format!("drained: not done {patience} s after the last fault, at {virtual_s} s"));
    }
    problems.extend(broken.iter().map(|line| format!("invariant {line}")));
    let mut hits = stage.faults.hits(&stage.broker);
    // Own parameters that are no faults say so by a value of 0.
    let own = stage.story.own.iter().filter(|(_, value)| **value > 0);
    hits.extend(own.map(|(name, _)| struck.get(name).copied().unwrap_or(0)));
    let fired = hits.iter().all(|h| *h >= stage.story.fired_min);
    let verdict = match (problems.is_empty(), fired) {
        (false, _) => "violated",
        (true, false) => "inconclusive",
        (true, true) => "holds",
    };
    Ok(Judgement { verdict: verdict.into(), problems, broken, hits, hashes, draws: interpose::draws(), ..Judgement::default() })
}
