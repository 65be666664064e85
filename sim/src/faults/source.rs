//! Faults of the source's server: what PostgreSQL answers when it is ill, with the codes and texts that it was seen to send.
//!
//! A pure state machine: it is asked at each connection and each request, and says what becomes of it. What it leaves out:
//! maintenance windows in which nobody listens, which the server itself keeps, and what the tables hold.

use chrono::{DateTime, Duration, Utc};
use serde::{Deserialize, Serialize};
use simulacro_core::ports::Disposition;

use super::Strikes;

/// A fault of the source's server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum SourceFault {
    /// It is coming back: it listens, and lets nobody in.
    StartingUp {
        /// Start, inclusive.
        from: DateTime<Utc>,
        /// End, exclusive.
        to: DateTime<Utc>,
    },
    /// Others have taken the connections.
    Saturated {
        /// Start, inclusive.
        from: DateTime<Utc>,
        /// End, exclusive.
        to: DateTime<Utc>,
        /// So many connections are refused ...
        refused: u64,
        /// ... of so many.
        of: u64,
    },
    /// It dies in the middle of a read: half of the rows, a warning, the end of the connection. Then nobody listens, and then
    /// it is starting up.
    Crash {
        /// The read, from 1, counted over the whole run.
        nth_read: u64,
        /// Seconds for which nobody listens.
        refused_s: u32,
        /// Seconds for which it lets nobody in after that.
        starting_s: u32,
    },
    /// The password is past its VALID UNTIL: sessions that there are go on, nobody logs in anew.
    PasswordExpired {
        /// Start, inclusive.
        from: DateTime<Utc>,
        /// Connections after the start that still are served, as from a pool.
        pooled: u64,
        /// The rotation, exclusive.
        to: DateTime<Utc>,
    },
    /// The right to read the table is taken away.
    GrantRevoked {
        /// Start, inclusive.
        from: DateTime<Utc>,
        /// End, exclusive.
        to: DateTime<Utc>,
    },
    /// A black hole: connections are taken, and no answer comes.
    Hangs {
        /// Start, inclusive.
        from: DateTime<Utc>,
        /// End, exclusive.
        to: DateTime<Utc>,
    },
    /// Answers end in the middle.
    Truncated {
        /// The first such read, from 1, counted over the whole run.
        nth_read: u64,
        /// So many reads.
        times: u64,
    },
    /// Reads end before their last rows, and nothing says so but the count that was taken in the same snapshot.
    ShortRead {
        /// The first such read, from 1, counted over the whole run.
        nth_read: u64,
        /// So many reads.
        times: u64,
    },
    /// A column was added under a prepared statement; whoever prepares anew is served.
    PlanInvalidated {
        /// The first question for the columns from then on is refused.
        at: DateTime<Utc>,
    },
    /// A migration is seen in the middle of a run: what was there when the schema was asked for is gone when it is read.
    Dropped {
        /// What is gone.
        what: Gone,
        /// The first such read, from 1, counted over the whole run.
        nth_read: u64,
        /// So many reads; then the migration is taken back.
        times: u64,
    },
}

/// What a migration takes away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gone {
    /// The table.
    Table,
    /// A column, by its name.
    Column(String),
}

/// What the server says of its own accord.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerError {
    /// `FATAL`, `ERROR` or `WARNING`.
    pub severity: String,
    /// SQLSTATE.
    pub code: String,
    /// The text.
    pub message: String,
}

fn says(severity: &str, code: &str, message: impl Into<String>) -> ServerError {
    ServerError { severity: severity.into(), code: code.into(), message: message.into() }
}

impl ServerError {
    /// What a caller may do after it, as the adapter of PostgreSQL decides: a test compares the two.
    pub fn disposition(&self) -> Disposition {
        match self.code.as_str() {
            "57P01" | "57P02" | "57P03" | "57014" | "55P03" | "40001" => Disposition::Retryable,
            // Whoever prepares anew is served; every other feature stays unsupported.
            "0A000" if self.message.starts_with("cached plan") => Disposition::Retryable,
            code if code.starts_with("08") || code.starts_with("53") => Disposition::Retryable,
            _ => Disposition::Permanent,
        }
    }
}

/// What a request is about, as far as faults care.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// Whether anybody is there.
    Ping,
    /// The columns.
    Columns,
    /// The rows of a day.
    Read,
}

/// What becomes of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It is answered.
    Answered,
    /// It is refused.
    Refused(ServerError),
    /// Nothing comes, ever.
    Silence,
    /// Half of the answer comes, then perhaps a notice, then the end of the connection.
    Cut(Option<ServerError>),
    /// The last rows are missing, and the answer looks whole.
    Short,
}

/// The faults of one server with what they have done.
#[derive(Debug, Default)]
pub struct SourceState {
    faults: Vec<(SourceFault, Strikes, u64)>,
    reads: u64,
    /// When nobody listens, from inclusive, to exclusive.
    pub down: Vec<(DateTime<Utc>, DateTime<Utc>)>,
    starting: Vec<(DateTime<Utc>, DateTime<Utc>)>,
}

impl SourceState {
    /// A server that these faults will befall, and that does not listen in these windows.
    pub fn new(faults: Vec<SourceFault>, down: Vec<(DateTime<Utc>, DateTime<Utc>)>) -> Self {
        Self { faults: faults.into_iter().map(|f| (f, Strikes::default(), 0)).collect(), reads: 0, down, starting: Vec::new() }
    }

    /// What each fault has done, in the order they were given.
    pub fn strikes(&self) -> Vec<Strikes> {
        self.faults.iter().map(|(_, strikes, _)| *strikes).collect()
    }

    /// What becomes of a request on a connection of its own.
    pub fn meet(&mut self, now: DateTime<Utc>, asked: Asked) -> Fate {
        let during = |from: &DateTime<Utc>, to: &DateTime<Utc>| (*from..*to).contains(&now);
        let starting = says("FATAL", "57P03", "the database system is starting up");
        if self.starting.iter().any(|(from, to)| during(from, to)) {
            return Fate::Refused(starting);
        }
        self.reads += u64::from(asked == Asked::Read);
        let reads = self.reads;
        let nth = |first: &u64, times: u64| asked == Asked::Read && (*first..first + times).contains(&reads);
        for (fault, strikes, counted) in &mut self.faults {
            let fate = match fault {
                SourceFault::StartingUp { from, to } => during(from, to).then(|| Fate::Refused(starting.clone())),
                SourceFault::Saturated { from, to, refused, of } if during(from, to) => {
                    *counted += 1;
                    let full = says("FATAL", "53300", "sorry, too many clients already");
                    ((*counted - 1) % (*of).max(1) < *refused).then_some(Fate::Refused(full))
                }
                SourceFault::Crash { nth_read, refused_s, starting_s } if nth(nth_read, 1) => {
                    let back = now + Duration::seconds((*refused_s).into());
                    self.down.push((now, back));
                    self.starting.push((back, back + Duration::seconds((*starting_s).into())));
                    let warning = "terminating connection due to immediate shutdown command";
                    Some(Fate::Cut(Some(says("WARNING", "57P01", warning))))
                }
                SourceFault::PasswordExpired { from, pooled, to } if during(from, to) => {
                    *counted += 1;
                    let refused = says("FATAL", "28P01", "password authentication failed for user \"etl\"");
                    (*counted > *pooled).then_some(Fate::Refused(refused))
                }
                SourceFault::GrantRevoked { from, to } if during(from, to) => {
                    (asked == Asked::Read).then(|| Fate::Refused(says("ERROR", "42501", "permission denied for table ventas")))
                }
                SourceFault::Hangs { from, to } => during(from, to).then_some(Fate::Silence),
                SourceFault::Truncated { nth_read, times } => nth(nth_read, *times).then_some(Fate::Cut(None)),
                SourceFault::ShortRead { nth_read, times } => nth(nth_read, *times).then_some(Fate::Short),
                SourceFault::PlanInvalidated { at } => (asked == Asked::Columns && now >= *at && strikes.hits == 0)
                    .then(|| Fate::Refused(says("ERROR", "0A000", "cached plan must not change result type"))),
                SourceFault::Dropped { what, nth_read, times } if nth(nth_read, *times) => Some(Fate::Refused(match what {
                    Gone::Table => says("ERROR", "42P01", "relation \"ventas\" does not exist"),
                    Gone::Column(name) => says("ERROR", "42703", format!("column \"{name}\" does not exist")),
                })),
                SourceFault::Saturated { .. }
                | SourceFault::Crash { .. }
                | SourceFault::PasswordExpired { .. }
                | SourceFault::GrantRevoked { .. }
                | SourceFault::Dropped { .. } => None,
            };
            if let Some(fate) = fate {
                strikes.strike(now);
                return fate;
            }
        }
        Fate::Answered
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> DateTime<Utc> {
        DateTime::UNIX_EPOCH + Duration::seconds(second)
    }

    fn code(fate: &Fate) -> &str {
        match fate {
            Fate::Refused(error) | Fate::Cut(Some(error)) => &error.code,
            Fate::Answered => "answered",
            Fate::Silence => "silence",
            Fate::Cut(None) => "cut",
            Fate::Short => "short",
        }
    }

    #[test]
    fn a_crash_cuts_one_read_and_the_server_comes_back_slowly() {
        let mut state = SourceState::new(vec![SourceFault::Crash { nth_read: 2, refused_s: 10, starting_s: 20 }], Vec::new());
        assert_eq!(code(&state.meet(at(0), Asked::Read)), "answered");
        assert_eq!(code(&state.meet(at(1), Asked::Read)), "57P01");
        assert_eq!(state.down, [(at(1), at(11))]);
        assert_eq!(code(&state.meet(at(11), Asked::Ping)), "57P03");
        assert_eq!(code(&state.meet(at(31), Asked::Ping)), "answered");
        assert_eq!(state.strikes(), [Strikes { hits: 1, first: Some(at(1)) }]);
    }

    #[test]
    fn a_password_that_ran_out_lets_a_pool_go_on_and_nobody_in() {
        let fault = SourceFault::PasswordExpired { from: at(0), pooled: 2, to: at(100) };
        let mut state = SourceState::new(vec![fault], Vec::new());
        let codes: Vec<String> = (0..4).map(|n| code(&state.meet(at(n), Asked::Ping)).to_owned()).collect();
        assert_eq!(codes, ["answered", "answered", "28P01", "28P01"]);
        assert_eq!(code(&state.meet(at(100), Asked::Ping)), "answered");
    }

    #[test]
    fn a_share_of_the_connections_is_refused_and_a_plan_once() {
        let saturated = SourceFault::Saturated { from: at(0), to: at(9), refused: 2, of: 3 };
        let mut state = SourceState::new(vec![saturated], Vec::new());
        let codes: Vec<String> = (0..4).map(|n| code(&state.meet(at(n), Asked::Ping)).to_owned()).collect();
        assert_eq!(codes, ["53300", "53300", "answered", "53300"]);
        let mut state = SourceState::new(vec![SourceFault::PlanInvalidated { at: at(5) }], Vec::new());
        let codes: Vec<String> = [4, 5, 6].map(|n| code(&state.meet(at(n), Asked::Columns)).to_owned()).into();
        assert_eq!(codes, ["answered", "0A000", "answered"]);
    }
}
