//! A program of somebody else as the work of an asset: the inference of a model that a team trains and keeps for itself.
//!
//! It is started once for each try, with the day and the run's epoch in its environment, and ends with the lease or the
//! time-out that its try has. What it writes is its own business, and so is that a higher epoch wins. Left out: a shell, which
//! would make words of a value.

use std::{process::Stdio, time::Duration};

use async_trait::async_trait;
use chrono::NaiveDate;
use serde_json::json;
use simulacro_core::{
    orchestrator::{Job, Work, WorkError},
    ports::{PortError, Result},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    process::{Child, Command},
};

/// What a program ends with when the rows that it was to read are bad: `EX_DATAERR` of BSD's sysexits.h. The same rows would be
/// bad the next time, so the day is held.
pub const DATA_ERROR: i32 = 65;
/// Bytes that are kept of the end of what it says.
const SAID_BYTES: usize = 2_000;
/// How long its output is read after it has ended: a child of it may hold the pipe.
const DRAIN: Duration = Duration::from_secs(1);

/// A program as work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExternalProgram {
    /// The program, and its arguments.
    command: Vec<String>,
}

impl ExternalProgram {
    /// A program and its arguments; it is found as a shell finds one.
    ///
    /// # Errors
    /// `Permanent` without a program.
    pub fn new(command: Vec<String>) -> Result<Self> {
        match command.first() {
            Some(program) if !program.is_empty() => Ok(Self { command }),
            Some(_) | None => Err(PortError::permanent("start a program: found none, expected its name and its arguments")),
        }
    }

    fn start(&self, job: &Job) -> std::io::Result<Child> {
        let mut command = Command::new(&self.command[0]);
        command.args(&self.command[1..]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.env("SIMULACRO_FECHA", job.slot.fecha.to_string());
        command.env("SIMULACRO_RUN_ID", &job.run.run_id);
        command.env("SIMULACRO_EPOCH", job.run.epoch.to_string());
        // A try that is given up, or whose lease is gone, must not go on beside the next one.
        command.kill_on_drop(true).spawn()
    }
}

/// The end of what comes, so that a program that says much takes no memory.
async fn end_of(from: Option<impl AsyncRead + Unpin>, into: &mut Vec<u8>) {
    let Some(mut from) = from else { return };
    let mut piece = vec![0; 8_192];
    while let Ok(read @ 1..) = from.read(&mut piece).await {
        into.extend_from_slice(&piece[..read]);
        into.drain(..into.len().saturating_sub(SAID_BYTES));
    }
}

fn last_line(said: &[u8]) -> String {
    let said = String::from_utf8_lossy(said);
    said.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or("nothing").to_owned()
}

#[async_trait]
impl Work for ExternalProgram {
    async fn floor(&self, _fecha: NaiveDate) -> Result<i64> {
        Ok(0)
    }
    /// The report is the last line that the program wrote to its output, when that is JSON. Any exit code but 0 and
    /// [`DATA_ERROR`] is worth another try.
    async fn run(&self, job: &Job) -> std::result::Result<serde_json::Value, WorkError> {
        let what = || format!("run {} for {}", self.command.join(" "), job.slot.fecha);
        let mut child = self.start(job).map_err(|e| WorkError::Port(PortError::permanent(what()).because(e)))?;
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let ended = {
            let said = async { tokio::join!(end_of(stdout, &mut out), end_of(stderr, &mut err)) };
            tokio::pin!(said);
            let (ended, all_said) = tokio::select! {
                ended = child.wait() => (ended, false),
                _ = &mut said => (child.wait().await, true),
            };
            if !all_said {
                tokio::select! { _ = &mut said => {}, () = tokio::time::sleep(DRAIN) => {} }
            }
            ended.map_err(|e| WorkError::Port(PortError::retryable(what()).because(e)))?
        };
        match ended.code() {
            Some(0) => {
                let report: serde_json::Value = serde_json::from_str(&last_line(&out)).unwrap_or_default();
                Ok(json!({ "program": self.command[0], "report": report }))
            }
            Some(DATA_ERROR) => Err(WorkError::Held { gate: "program".into(), text: last_line(&err) }),
            Some(code) => Err(WorkError::Port(
                PortError::retryable(format!("{}: exit code {code}: {}", what(), last_line(&err))).code("EXIT_CODE"),
            )),
            None => Err(WorkError::Port(PortError::retryable(format!("{}: {ended}", what())).code("SIGNAL"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use simulacro_core::{
        orchestrator::Slot,
        ports::{Disposition, Run, RunState},
    };

    use super::*;

    fn job() -> Job {
        let scheduled = "2024-03-18T07:30:00Z".parse().expect("a time");
        let fecha = "2024-03-17".parse().expect("a day");
        let run = Run {
            pipeline: "ml_inference_daily".into(),
            fecha,
            epoch: 3,
            run_id: "r-7".into(),
            state: RunState::Running,
            started_at: scheduled,
            finished_at: None,
            scheduled_at: Some(scheduled),
            fence: None,
            report: serde_json::Value::Null,
        };
        Job { slot: Slot { scheduled, fecha }, run }
    }

    fn shell(script: &str) -> ExternalProgram {
        ExternalProgram::new(["sh", "-c", script].map(String::from).to_vec()).expect("a program")
    }

    #[tokio::test]
    async fn a_program_is_told_the_day_and_reports_in_its_last_line() {
        let script = r#"echo reading; echo "{\"of\":\"$SIMULACRO_FECHA $SIMULACRO_EPOCH $SIMULACRO_RUN_ID\"}""#;
        let report = shell(script).run(&job()).await.expect("a report");
        assert_eq!(report, json!({ "program": "sh", "report": { "of": "2024-03-17 3 r-7" } }));
    }

    #[tokio::test]
    async fn how_a_program_ends_says_whether_it_is_tried_again() {
        let failed = |error: WorkError| match error {
            WorkError::Port(error) => (error.disposition, error.code.clone(), error.chain()),
            WorkError::Held { gate, text } => panic!("held by {gate}: {text}"),
        };
        let (disposition, code, text) = failed(shell("echo no model >&2; exit 3").run(&job()).await.expect_err("a failure"));
        assert_eq!((disposition, code.as_deref()), (Disposition::Retryable, Some("EXIT_CODE")));
        assert!(text.contains("for 2024-03-17: exit code 3: no model"), "{text}");
        let (disposition, code, _) = failed(shell("kill -9 $$").run(&job()).await.expect_err("a failure"));
        assert_eq!((disposition, code.as_deref()), (Disposition::Retryable, Some("SIGNAL")));
        let gone = ExternalProgram::new(vec!["/there/is/none".into()]).expect("a program");
        let (disposition, _, text) = failed(gone.run(&job()).await.expect_err("a failure"));
        assert!(disposition == Disposition::Permanent && text.contains("/there/is/none"), "{text}");
        match shell("echo 4 rows without a segment >&2; exit 65").run(&job()).await {
            Err(WorkError::Held { text, .. }) => assert_eq!(text, "4 rows without a segment"),
            other => panic!("{other:?}"),
        }
        assert!(ExternalProgram::new(Vec::new()).is_err());
    }

    #[tokio::test]
    async fn a_program_that_says_much_and_leaves_a_child_behind_ends_all_the_same() {
        let script = "seq 1 100000; sleep 30 & echo '{\"scored\":2}'";
        let report = shell(script).run(&job()).await.expect("a report");
        assert_eq!(report["report"], json!({ "scored": 2 }));
    }

    #[tokio::test]
    async fn a_program_ends_with_the_try_that_started_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("pid");
        let program = shell(&format!("echo $$ > {}; exec sleep 60", file.display()));
        let job = job();
        let pid = async {
            loop {
                match std::fs::read_to_string(&file) {
                    Ok(pid) if pid.ends_with('\n') => return pid,
                    Ok(_) | Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        };
        let pid = tokio::select! { pid = pid => pid, ended = program.run(&job) => panic!("{ended:?}") };
        let command = format!("/proc/{}/cmdline", pid.trim());
        let is_gone = || std::fs::read_to_string(&command).map_or(true, |line| !line.starts_with("sleep"));
        for _ in 0..500 {
            if is_gone() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("process {pid} is still there");
    }
}
