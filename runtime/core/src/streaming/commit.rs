//! The commit protocol: which call comes next, and what is true after it failed.
//!
//! One transaction carries output, late and dead letters, the changelog and the next offsets. [`Protocol`] decides and does
//! nothing: it takes an [`Event`] and answers with the one [`Action`] to carry out. The rules it holds: dirty state becomes
//! committed only when the transaction is known to have landed; it is thrown away only when the transaction is known not to
//! have; after a commit of unknown outcome the committed offsets decide, and when even they do not, state is read again
//! from the changelog. Every repetition is bounded. Left out: waiting, and the contents of the transaction.

use crate::ports::{Disposition, PortError};

/// Where the protocol stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// No transaction is open.
    Ready,
    /// `begin` was called.
    Beginning,
    /// Records are being sent.
    Sending,
    /// Offsets are being sent.
    SendingOffsets,
    /// `commit` was called.
    Committing,
    /// `abort` was called.
    Aborting,
    /// A new producer of the same id is being made, which decides what the old one left open.
    Reopening,
    /// Committed offsets are being looked up.
    LookingUp,
    /// This worker must not go on.
    Stopped,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    /// There is something to commit and it is time.
    Due,
    /// Partitions are about to be given up; there is something to commit or not.
    Revoked {
        /// Whether there is dirty state.
        dirty: bool,
    },
    /// Partitions are gone.
    Lost,
    /// The call succeeded.
    Done,
    /// The call failed.
    Failed(Failure),
    /// The look-up succeeded.
    LookedUp(Landed),
}

/// How a call failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failure {
    /// Nothing happened.
    Retryable,
    /// It may have happened.
    Unknown,
    /// It will never work.
    Permanent,
    /// A newer producer of the same id exists.
    Fenced,
}

impl Failure {
    /// Reads an error of the producer.
    pub fn of(error: &PortError) -> Self {
        if matches!(error.code.as_deref(), Some("INVALID_PRODUCER_EPOCH" | "PRODUCER_FENCED")) {
            return Failure::Fenced;
        }
        match error.disposition {
            Disposition::Retryable => Failure::Retryable,
            Disposition::Unknown => Failure::Unknown,
            Disposition::Permanent => Failure::Permanent,
        }
    }
}

/// What the committed offsets say about a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Landed {
    /// They are those of the transaction.
    Yes,
    /// They are those from before it.
    No,
    /// Neither: somebody else committed in between.
    Unclear,
}

/// What to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Action {
    /// Nothing.
    Rest,
    /// Call `begin`.
    Begin,
    /// Send the records.
    Send,
    /// Send the offsets.
    SendOffsets,
    /// Call `commit`.
    Commit,
    /// Call `abort`.
    Abort,
    /// Make a new producer of the same id.
    Reopen,
    /// Look up the committed offsets.
    LookUp,
    /// It landed: dirty state is committed state now.
    Apply,
    /// It did not land: throw dirty state away and seek every partition back.
    SeekBack,
    /// Nobody can tell: throw all state away and restore it from the changelog.
    Restore,
    /// Let go of the partitions without writing anything.
    Release,
    /// Stop this worker. State is thrown away; whoever takes over restores it.
    Stop,
}

/// The protocol of one worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Protocol {
    state: State,
    /// Repetitions of the present call.
    attempt: u32,
    attempts_max: u32,
    /// `commit` was called in this transaction, so it may have landed.
    uncertain: bool,
    /// An error that will come again: stop once the outcome is settled.
    doomed: bool,
}

impl Protocol {
    /// A protocol at rest, which repeats a call at most `attempts_max` times.
    pub fn new(attempts_max: u32) -> Self {
        Self { state: State::Ready, attempt: 0, attempts_max, uncertain: false, doomed: false }
    }

    /// Where it stands.
    pub fn state(&self) -> State {
        self.state
    }

    /// Repetitions of the present call; 0 the first time. The driver waits accordingly.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Whether the worker stops once the present outcome was carried out.
    pub fn is_stopped(&self) -> bool {
        self.state == State::Stopped
    }

    /// Takes an event and answers with the one action to carry out. An event that cannot come in a state is a mistake of
    /// the driver, and stops it.
    pub fn on(&mut self, event: Event) -> Action {
        use Action as A;
        use Event as E;
        use Failure as F;
        use State as S;
        match (self.state, event) {
            (S::Stopped, _) => A::Stop,

            (S::Ready, E::Due | E::Revoked { dirty: true }) => {
                (self.uncertain, self.doomed) = (false, false);
                self.enter(S::Beginning, A::Begin)
            }
            (S::Ready, E::Revoked { dirty: false } | E::Lost) => A::Release,

            // What is open is finished before partitions go, and thrown away when they have gone.
            (S::Beginning, E::Revoked { .. }) => A::Begin,
            (S::Sending, E::Revoked { .. }) => A::Send,
            (S::SendingOffsets, E::Revoked { .. }) => A::SendOffsets,
            (S::Committing, E::Revoked { .. }) => A::Commit,
            (S::Aborting, E::Revoked { .. } | E::Lost) => A::Abort,
            (S::Reopening, E::Revoked { .. } | E::Lost) => A::Reopen,
            (S::LookingUp, E::Revoked { .. } | E::Lost) => A::LookUp,
            (S::Beginning | S::Sending | S::SendingOffsets | S::Committing, E::Lost) => self.enter(S::Aborting, A::Abort),

            (S::Beginning, E::Done) => self.enter(S::Sending, A::Send),
            (S::Sending, E::Done) => self.enter(S::SendingOffsets, A::SendOffsets),
            (S::SendingOffsets, E::Done) => {
                self.uncertain = true;
                self.enter(S::Committing, A::Commit)
            }
            (S::Committing, E::Done) => self.settle(A::Apply),

            (S::Beginning, E::Failed(F::Retryable)) => self.again(A::Begin),
            (S::Sending, E::Failed(F::Retryable)) => self.again(A::Send),
            (S::SendingOffsets, E::Failed(F::Retryable)) => self.again(A::SendOffsets),
            // Repeating a commit is safe, and mostly tells what the first one did.
            (S::Committing, E::Failed(F::Retryable | F::Unknown)) => self.again(A::Commit),
            (S::Beginning | S::Sending | S::SendingOffsets, E::Failed(F::Unknown)) => self.enter(S::Aborting, A::Abort),
            (S::Beginning | S::Sending | S::SendingOffsets | S::Committing, E::Failed(F::Permanent)) => {
                self.doomed = true;
                self.enter(S::Aborting, A::Abort)
            }

            (S::Aborting | S::Reopening, E::Done) => self.decide(),
            (S::Aborting, E::Failed(F::Retryable | F::Unknown)) => self.again(A::Abort),
            (S::Aborting, E::Failed(F::Permanent)) => self.enter(S::Reopening, A::Reopen),
            (S::Reopening, E::Failed(F::Retryable | F::Unknown)) => self.again(A::Reopen),
            (S::Reopening, E::Failed(F::Permanent)) => self.stop(),

            (S::LookingUp, E::LookedUp(Landed::Yes)) => self.settle(A::Apply),
            (S::LookingUp, E::LookedUp(Landed::No)) => self.settle(A::SeekBack),
            (S::LookingUp, E::LookedUp(Landed::Unclear)) => self.settle(A::Restore),
            (S::LookingUp, E::Failed(F::Retryable | F::Unknown)) => self.again(A::LookUp),
            (S::LookingUp, E::Failed(F::Permanent)) => self.stop(),

            (
                S::Beginning | S::Sending | S::SendingOffsets | S::Committing | S::Aborting | S::Reopening | S::LookingUp,
                E::Failed(F::Fenced),
            ) => self.stop(),

            // The driver's mistakes.
            (S::Ready, E::Done | E::Failed(_) | E::LookedUp(_))
            | (
                S::Beginning | S::Sending | S::SendingOffsets | S::Committing | S::Aborting | S::Reopening,
                E::Due | E::LookedUp(_),
            )
            | (S::LookingUp, E::Due | E::Done) => self.stop(),
        }
    }

    fn enter(&mut self, state: State, action: Action) -> Action {
        self.state = state;
        self.attempt = 0;
        action
    }

    /// The same call again, or the way out when it was repeated often enough.
    fn again(&mut self, action: Action) -> Action {
        self.attempt += 1;
        if self.attempt <= self.attempts_max {
            return action;
        }
        match self.state {
            State::Beginning | State::Sending | State::SendingOffsets | State::Committing => {
                self.enter(State::Aborting, Action::Abort)
            }
            State::Aborting => self.enter(State::Reopening, Action::Reopen),
            State::Reopening | State::LookingUp | State::Ready | State::Stopped => self.stop(),
        }
    }

    /// The transaction is closed; what became of it?
    fn decide(&mut self) -> Action {
        if self.uncertain { self.enter(State::LookingUp, Action::LookUp) } else { self.settle(Action::SeekBack) }
    }

    fn settle(&mut self, action: Action) -> Action {
        self.enter(if self.doomed { State::Stopped } else { State::Ready }, action)
    }

    fn stop(&mut self) -> Action {
        self.enter(State::Stopped, Action::Stop)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const ATTEMPTS: u32 = 2;

    const STATES: [State; 9] = [
        State::Ready,
        State::Beginning,
        State::Sending,
        State::SendingOffsets,
        State::Committing,
        State::Aborting,
        State::Reopening,
        State::LookingUp,
        State::Stopped,
    ];

    const EVENTS: [Event; 12] = [
        Event::Due,
        Event::Revoked { dirty: true },
        Event::Revoked { dirty: false },
        Event::Lost,
        Event::Done,
        Event::Failed(Failure::Retryable),
        Event::Failed(Failure::Unknown),
        Event::Failed(Failure::Permanent),
        Event::Failed(Failure::Fenced),
        Event::LookedUp(Landed::Yes),
        Event::LookedUp(Landed::No),
        Event::LookedUp(Landed::Unclear),
    ];

    fn at(state: State, uncertain: bool) -> Protocol {
        Protocol { state, attempt: 0, attempts_max: ATTEMPTS, uncertain, doomed: false }
    }

    /// The whole protocol at a glance: one row per state, one column per event, in the order of the lists above.
    /// `b s o c a r l` call begin, send, offsets, commit, abort, reopen, look up; `A` apply, `S` seek back, `R` restore,
    /// `x` release, `!` stop.
    const TABLE: [&str; 9] = [
        "bbxx!!!!!!!!", // ready
        "!bbasbaa!!!!", // beginning
        "!ssaosaa!!!!", // sending
        "!ooacoaa!!!!", // sending offsets
        "!ccaAcca!!!!", // committing
        "!aaaSaar!!!!", // aborting
        "!rrrSrr!!!!!", // reopening
        "!lll!ll!!ASR", // looking up
        "!!!!!!!!!!!!", // stopped
    ];

    fn letter(action: Action) -> char {
        match action {
            Action::Rest => '.',
            Action::Begin => 'b',
            Action::Send => 's',
            Action::SendOffsets => 'o',
            Action::Commit => 'c',
            Action::Abort => 'a',
            Action::Reopen => 'r',
            Action::LookUp => 'l',
            Action::Apply => 'A',
            Action::SeekBack => 'S',
            Action::Restore => 'R',
            Action::Release => 'x',
            Action::Stop => '!',
        }
    }

    #[test]
    fn every_event_in_every_state_has_its_action() {
        for (state, row) in STATES.into_iter().zip(TABLE) {
            let actual: String = EVENTS.into_iter().map(|event| letter(at(state, false).on(event))).collect();
            assert_eq!(actual, row, "{state:?}");
        }
    }

    #[test]
    fn after_a_commit_was_called_only_a_look_up_decides() {
        assert_eq!(at(State::Aborting, true).on(Event::Done), Action::LookUp);
        assert_eq!(at(State::Reopening, true).on(Event::Done), Action::LookUp);
    }

    #[test]
    fn the_error_table_reads_dispositions_and_fencing() {
        assert_eq!(Failure::of(&PortError::unknown("commit")), Failure::Unknown);
        assert_eq!(Failure::of(&PortError::retryable("begin")), Failure::Retryable);
        assert_eq!(Failure::of(&PortError::permanent("send").code("MESSAGE_TOO_LARGE")), Failure::Permanent);
        assert_eq!(Failure::of(&PortError::permanent("send").code("INVALID_PRODUCER_EPOCH")), Failure::Fenced);
        assert_eq!(Failure::of(&PortError::unknown("send_offsets").code("ILLEGAL_GENERATION")), Failure::Unknown);
    }

    /// What the world can answer to an action.
    fn answers(action: Action) -> Vec<Event> {
        let failures = [Failure::Retryable, Failure::Unknown, Failure::Permanent, Failure::Fenced].map(Event::Failed);
        match action {
            Action::Begin | Action::Send | Action::SendOffsets | Action::Commit | Action::Abort | Action::Reopen => {
                [vec![Event::Done, Event::Revoked { dirty: true }, Event::Lost], failures.to_vec()].concat()
            }
            Action::LookUp => {
                let landed = [Landed::Yes, Landed::No, Landed::Unclear].map(Event::LookedUp);
                [landed.to_vec(), failures.to_vec()].concat()
            }
            Action::Rest | Action::Apply | Action::SeekBack | Action::Restore | Action::Release | Action::Stop => vec![],
        }
    }

    /// Walks every path of answers; `committed` says whether a commit was called and `aborted` whether one was closed.
    fn walk(protocol: &Protocol, action: Action, committed: bool, event: Option<Event>, depth: u32, seen: &mut BTreeSet<Action>) {
        seen.insert(action);
        assert!(depth < 40, "a path of failures must end");
        let looked_up = |landed| event == Some(Event::LookedUp(landed));
        match action {
            Action::Apply => {
                let confirmed = event == Some(Event::Done) && committed;
                assert!(confirmed || looked_up(Landed::Yes), "applied after {event:?}");
            }
            Action::SeekBack => assert!(!committed || looked_up(Landed::No), "threw away what may have landed"),
            Action::Restore => assert!(looked_up(Landed::Unclear)),
            Action::Release | Action::Rest => panic!("{action:?} inside a transaction"),
            Action::Stop => assert!(protocol.is_stopped()),
            Action::Begin
            | Action::Send
            | Action::SendOffsets
            | Action::Commit
            | Action::Abort
            | Action::Reopen
            | Action::LookUp => {}
        }
        let committed = committed || action == Action::Commit;
        for event in answers(action) {
            let mut next = protocol.clone();
            let action = next.on(event);
            // A second notice about partitions changes nothing, and would make paths endless.
            if matches!(event, Event::Revoked { .. }) {
                assert_eq!((&next, action), (protocol, action));
                continue;
            }
            if event == Event::Lost && next == *protocol {
                continue;
            }
            walk(&next, action, committed, Some(event), depth + 1, seen);
        }
    }

    #[test]
    fn every_path_ends_and_none_lies_about_what_landed() {
        let mut protocol = Protocol::new(1);
        let action = protocol.on(Event::Due);
        let mut seen = BTreeSet::new();
        walk(&protocol, action, false, None, 0, &mut seen);
        assert_eq!(seen.len(), 11, "all actions but rest and release are reached: {seen:?}");
    }

    #[test]
    fn a_permanent_error_stops_the_worker_after_its_state_is_settled() {
        let mut protocol = at(State::Sending, false);
        assert_eq!(protocol.on(Event::Failed(Failure::Permanent)), Action::Abort);
        assert_eq!(protocol.on(Event::Done), Action::SeekBack);
        assert!(protocol.is_stopped());
    }

    #[test]
    fn repetitions_are_bounded() {
        let mut protocol = at(State::Committing, true);
        let actions: Vec<_> = (0..9).map(|_| letter(protocol.on(Event::Failed(Failure::Unknown)))).collect();
        assert_eq!(actions.iter().collect::<String>(), "ccaaarrr!");
    }
}
