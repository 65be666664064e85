//! A consumer group: who is in it, and which partitions each member may hold.
//!
//! The broker decides the assignment; a member reports what it holds and is told what it may hold. A partition moves in
//! two steps, so that it never has two owners: its old owner is told to give it up, and the new one gets it after the old
//! one has reported without it, has left or has timed out. Members keep what they have where the balance allows.

use std::collections::{BTreeMap, BTreeSet};

use simulacro_core::ports::event_log::TopicPartition;

use crate::{
    code::{Code, Refusal},
    protocol::Assignment,
};

#[derive(Debug, Clone, PartialEq, Eq)]
struct Member {
    incarnation: u64,
    topics: BTreeSet<String>,
    session_ms: i64,
    deadline_ms: i64,
    /// Generation that the member was told last.
    generation: i32,
    /// What it may be holding.
    holds: BTreeSet<TopicPartition>,
    /// What it shall hold.
    target: BTreeSet<TopicPartition>,
}

/// A consumer group.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Group {
    members: BTreeMap<String, Member>,
    generation: i32,
}

impl Group {
    pub(crate) fn new(generation: i32) -> Self {
        Self { members: BTreeMap::new(), generation }
    }
    pub(crate) fn generation(&self) -> i32 {
        self.generation
    }
    pub(crate) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }
    pub(crate) fn reads(&self, topic: &str) -> bool {
        self.members.values().any(|m| m.topics.contains(topic))
    }

    /// Takes members out whose session is over; true when there was one.
    pub(crate) fn expire(&mut self, now_ms: i64) -> bool {
        let before = self.members.len();
        self.members.retain(|_, m| m.deadline_ms > now_ms);
        self.members.len() < before
    }

    pub(crate) fn join(&mut self, now_ms: i64, member: &str, incarnation: u64, topics: BTreeSet<String>, session_ms: i64) {
        let deadline_ms = now_ms.saturating_add(session_ms);
        // The one before under this name is fenced by its incarnation, so what it held is free, and is kept for this one.
        let target = self.members.remove(member).map(|before| before.target).unwrap_or_default();
        let joined = Member { incarnation, topics, session_ms, deadline_ms, generation: -1, holds: BTreeSet::new(), target };
        self.members.insert(member.to_owned(), joined);
    }

    pub(crate) fn leave(&mut self, member: &str, incarnation: u64) -> bool {
        let there = self.members.get(member).is_some_and(|m| m.incarnation == incarnation);
        if there {
            self.members.remove(member);
        }
        there
    }

    /// Takes a member out, whatever its incarnation.
    pub(crate) fn expel(&mut self, member: &str) -> bool {
        self.members.remove(member).is_some()
    }

    /// Shares `partitions` out anew and begins a generation.
    pub(crate) fn rebalance(&mut self, partitions: &BTreeSet<TopicPartition>) {
        let may = |m: &Member, p: &TopicPartition| m.topics.contains(&p.topic);
        let mut shares: BTreeMap<String, BTreeSet<TopicPartition>> = BTreeMap::new();
        let mut free = partitions.clone();
        for (name, member) in &self.members {
            // Where it is going stays where it is going, unless that has been taken back since.
            let keeps: BTreeSet<_> = member.target.iter().filter(|p| may(member, p) && free.contains(p)).cloned().collect();
            free.retain(|p| !keeps.contains(p));
            shares.insert(name.clone(), keeps);
        }
        let load = |shares: &BTreeMap<String, BTreeSet<TopicPartition>>, name: &String| shares.get(name).map_or(0, BTreeSet::len);
        for partition in free {
            let least = self.members.iter().filter(|(_, m)| may(m, &partition)).min_by_key(|(name, _)| load(&shares, name));
            if let Some((name, _)) = least {
                shares.entry(name.clone()).or_default().insert(partition);
            }
        }
        // Each move makes the loads more equal, so this ends.
        while let Some((from, to, partition)) = self.members.keys().find_map(|from| {
            self.members.iter().find_map(|(to, taker)| {
                let uneven = load(&shares, from) > load(&shares, to) + 1;
                let partition = uneven.then(|| shares.get(from)?.iter().rev().find(|p| may(taker, p)).cloned()).flatten()?;
                Some((from.clone(), to.clone(), partition))
            })
        }) {
            shares.entry(from).or_default().remove(&partition);
            shares.entry(to).or_default().insert(partition);
        }
        for (name, member) in &mut self.members {
            member.target = shares.remove(name).unwrap_or_default();
        }
        self.generation += 1;
    }

    fn check(&self, group: &str, member: &str, incarnation: u64) -> Result<(), Refusal> {
        let what = || format!("be {member} of {group}");
        match self.members.get(member) {
            None => Err(Refusal::new(Code::UnknownMemberId, what())),
            Some(m) if m.incarnation != incarnation => Err(Refusal::new(Code::FencedInstanceId, what())),
            Some(_) => Ok(()),
        }
    }

    pub(crate) fn heartbeat(
        &mut self,
        now_ms: i64,
        group: &str,
        member: &str,
        incarnation: u64,
        holds: &BTreeSet<TopicPartition>,
    ) -> Result<Assignment, Refusal> {
        self.check(group, member, incarnation)?;
        let others: BTreeSet<_> =
            self.members.iter().filter(|(name, _)| name.as_str() != member).flat_map(|(_, m)| m.holds.iter().cloned()).collect();
        let generation = self.generation;
        let Some(me) = self.members.get_mut(member) else { return Err(Refusal::new(Code::UnknownMemberId, "heartbeat")) };
        me.deadline_ms = now_ms.saturating_add(me.session_ms);
        // Granted before, but the reply may have been lost; or held still; the rest was given up.
        me.holds.retain(|p| holds.contains(p) || me.target.contains(p));
        me.holds.extend(me.target.iter().filter(|p| !others.contains(p)).cloned());
        let partitions: BTreeSet<_> = me.holds.intersection(&me.target).cloned().collect();
        // A member that has something to give up may still commit it, with the generation that it knows.
        if me.generation < 0 || me.holds.is_subset(&me.target) {
            me.generation = generation;
        }
        Ok(Assignment { generation: me.generation, partitions })
    }

    /// Whether `member` may commit offsets with `generation`.
    pub(crate) fn may_commit(&self, group: &str, member: &str, generation: i32) -> Result<(), Refusal> {
        let what = || format!("commit offsets of {group} as {member}, generation {generation}");
        match self.members.get(member) {
            None => Err(Refusal::new(Code::UnknownMemberId, what())),
            Some(m) if m.generation != generation => Err(Refusal::new(Code::IllegalGeneration, what())),
            Some(_) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn partitions(n: i32) -> BTreeSet<TopicPartition> {
        (0..n).map(|partition| TopicPartition { topic: "t".into(), partition }).collect()
    }

    proptest! {
        /// Whatever members do, in whatever order, no partition has two holders, and quiet makes the shares even.
        #[test]
        fn a_partition_never_has_two_holders_and_shares_become_even(
            n in 1..9_i32,
            acts in prop::collection::vec((0..4_usize, 0..4_u8), 1..80),
        ) {
            let all = partitions(n);
            let topics = BTreeSet::from(["t".to_owned()]);
            let mut group = Group::new(0);
            // What each member believes it holds, by incarnation.
            let mut clients: BTreeMap<usize, (u64, BTreeSet<TopicPartition>)> = BTreeMap::new();
            let mut now = 0;
            for (turn, (who, act)) in acts.into_iter().enumerate() {
                now += 10;
                let name = format!("m{who}");
                match act {
                    0 => {
                        group.join(now, &name, turn as u64, topics.clone(), 100_000);
                        group.rebalance(&all);
                        clients.insert(who, (turn as u64, BTreeSet::new()));
                    }
                    1 => {
                        if let Some((incarnation, _)) = clients.remove(&who) {
                            group.leave(&name, incarnation);
                            group.rebalance(&all);
                        }
                    }
                    _ => {
                        if let Some((incarnation, holds)) = clients.get_mut(&who) {
                            let told = group.heartbeat(now, "g", &name, *incarnation, holds).expect("a member");
                            // A lost reply leaves the client as it was.
                            if act == 2 {
                                *holds = told.partitions;
                            }
                        }
                    }
                }
                let held: Vec<_> = clients.values().flat_map(|(_, holds)| holds.iter()).collect();
                let distinct: BTreeSet<_> = held.iter().collect();
                prop_assert_eq!(held.len(), distinct.len());
            }
            for _ in 0..3 {
                for (who, (incarnation, holds)) in &mut clients {
                    *holds = group.heartbeat(now, "g", &format!("m{who}"), *incarnation, holds).expect("a member").partitions;
                }
            }
            if !clients.is_empty() {
                let sizes: Vec<_> = clients.values().map(|(_, holds)| holds.len()).collect();
                prop_assert_eq!(sizes.iter().sum::<usize>(), n as usize);
                prop_assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1, "{:?}", sizes);
            }
        }
    }
}
