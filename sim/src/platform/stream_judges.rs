//! The judges of a platform story's stream: what must hold of it at the end, each by its own name.
//!
//! What the job, the sink and the reconciliation say is compared with what the oracle has added up event by event. What this
//! leaves out: alerts and objectives, which are judged with those of everything else.

use std::collections::BTreeSet;

use simulacro_core::streaming::event::Fate;

use super::{judges::Broken, scenario::PlatformScenario, stream::Outcome};

/// Every day of the story is reconciled, the stream's side is the oracle's, and nothing is left unexplained.
fn reconciled(story: &PlatformScenario, stream: &Outcome) -> Vec<Broken> {
    let mut broken = Vec::new();
    for fecha in story.fechas() {
        let Some(found) = stream.reconciled.get(&fecha) else {
            broken.push(("reconciled", format!("{fecha} was never reconciled")));
            continue;
        };
        let of_day = stream.expected.iter().filter(|((day, _), _)| *day == fecha);
        let wanted: i64 = of_day.map(|(_, totals)| totals.cents).sum();
        let stream = found.stream;
        if stream != wanted {
            broken.push(("reconciled", format!("{fecha}: the stream's side is {stream}, the oracle expects {wanted}")));
        }
        match found.unexplained {
            Some(0) => {}
            Some(cents) => broken.push(("reconciled", format!("{fecha}: {cents} cents are unexplained"))),
            None => broken.push(("reconciled", format!("{fecha}: nobody has said what is unexplained"))),
        }
    }
    broken
}

/// Each event that was sent has one fate, that of the oracle, and what is put aside is where it belongs.
fn stream_fates(_: &PlatformScenario, stream: &Outcome) -> Vec<Broken> {
    let mut broken = Vec::new();
    let mut breaks = |text: String| broken.push(("stream_fates", text));
    let counted: u64 = stream.counted.values().sum();
    if counted != stream.sent {
        breaks(format!("{} events were sent, the job has fates of {counted}", stream.sent));
    }
    // Where timing decides, the oracle does not know.
    if stream.by_timing == 0 && stream.counted != stream.fates {
        breaks(format!("found {:?}, the oracle expects {:?}", stream.counted, stream.fates));
    }
    let of = |fate: Fate| stream.counted.get(&fate).copied().unwrap_or(0);
    let aside = (of(Fate::Late), of(Fate::DeadLettered) + of(Fate::Quarantined) + of(Fate::Rejected));
    if stream.aside != aside {
        breaks(format!("late and dead letters are {:?}, counted were {aside:?}", stream.aside));
    }
    if !stream.is_drained {
        breaks("the job or its sink is not done at the end".into());
    }
    broken
}

/// Windows of regions, those of pages and the warehouse show what the oracle adds up, for every day of the story.
fn stream_windows(story: &PlatformScenario, stream: &Outcome) -> Vec<Broken> {
    let days = story.fecha..=story.last();
    let mut broken = Vec::new();
    let shown = [("windows", &stream.shown), ("pages", &stream.shown_by_page), ("the warehouse", &stream.warehouse)];
    for (name, found) in shown {
        let keys = found.keys().chain(stream.expected.keys()).filter(|(day, _)| days.contains(day));
        let other = keys.collect::<BTreeSet<_>>().into_iter().find(|key| found.get(*key) != stream.expected.get(*key));
        if let Some(key) = other {
            let (found, wanted) = (found.get(key), stream.expected.get(key));
            broken.push(("stream_windows", format!("{name} at {key:?}: found {found:?}, the oracle expects {wanted:?}")));
        }
    }
    broken
}

/// All judges of the stream, in order of the invariants' names.
pub fn judge(story: &PlatformScenario, stream: &Outcome) -> Vec<Broken> {
    [reconciled, stream_fates, stream_windows].iter().flat_map(|judge| judge(story, stream)).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use simulacro_core::slo::samples::Reconciled;

    use super::*;
    use crate::{
        platform::{detection, faults::Mode},
        stream::wire::Totals,
    };

    fn reconciliation(batch: i64, stream: i64) -> Reconciled {
        Reconciled { batch, stream, unexplained: Some(batch.abs_diff(stream)) }
    }

    fn whole(story: &PlatformScenario) -> Outcome {
        let totals = Totals { clicks: 5, purchases: 2, add_to_cart: 1, cents: 700, users: 0 };
        let expected: BTreeMap<_, _> = story.fechas().map(|fecha| ((fecha, "sur".to_owned()), totals)).collect();
        let fates = BTreeMap::from([(Fate::Published, 24), (Fate::Late, 2), (Fate::DeadLettered, 1)]);
        Outcome {
            shown: expected.clone(),
            shown_by_page: expected.clone(),
            warehouse: expected.clone(),
            expected,
            sent: 27,
            fates: fates.clone(),
            counted: fates,
            aside: (2, 1),
            by_timing: 0,
            rows: 9,
            reconciled: story.fechas().map(|fecha| (fecha, reconciliation(700, 700))).collect(),
            crashes: 0,
            stops: 0,
            is_drained: true,
        }
    }

    #[test]
    fn each_judge_of_the_stream_sees_what_it_is_there_for() {
        let story = detection::story(Mode::StreamSlow, 1);
        let (first, last) = (story.fecha, story.last());
        let check = |what: &str, expected: &[&str], change: &dyn Fn(&mut Outcome)| {
            let mut outcome = whole(&story);
            change(&mut outcome);
            let names: Vec<&str> = judge(&story, &outcome).iter().map(|b| b.0).collect();
            assert_eq!(names, expected, "{what}");
        };
        check("nothing is wrong", &[], &|_| {});
        check("a day was never reconciled", &["reconciled"], &|o| {
            o.reconciled.remove(&last);
        });
        check("a cent without a reason", &["reconciled"], &|o| {
            o.reconciled.insert(first, reconciliation(701, 700));
        });
        check("both sides agree on what is wrong", &["reconciled"], &|o| {
            o.reconciled.insert(first, reconciliation(600, 600));
        });
        check("an event without a fate", &["stream_fates"], &|o| o.sent += 1);
        check("a late event that was counted", &["stream_fates", "stream_fates"], &|o| {
            o.counted.insert(Fate::Late, 1);
            o.counted.insert(Fate::Published, 25);
        });
        check("a late event that is nowhere", &["stream_fates"], &|o| o.aside = (1, 1));
        check("work that is left", &["stream_fates"], &|o| o.is_drained = false);
        let key = (first, "sur".to_owned());
        check("a click that is missing", &["stream_windows"], &|o| {
            o.shown.entry(key.clone()).and_modify(|totals| totals.clicks -= 1);
        });
        check("a region that is missing", &["stream_windows"], &|o| {
            o.shown_by_page.remove(&key);
        });
        check("a row that was loaded twice", &["stream_windows"], &|o| {
            o.warehouse.entry(key.clone()).and_modify(|totals| totals.cents *= 2);
        });
    }
}
