//! A child process that ends with the test.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_millis(20);
/// Bytes of the log that a failing test shows.
const LOG_TAIL: usize = 4000;

/// What to run; [`Spec::spawn`] starts it, as often as you like.
#[derive(Debug, Clone)]
pub struct Spec {
    program: PathBuf,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    log: PathBuf,
}

/// A running child. Dropping it kills it (`SIGKILL`, by its pid) and waits for its end.
#[derive(Debug)]
pub struct Process {
    child: Child,
    log: PathBuf,
    program: PathBuf,
}

impl Process {
    /// Describes a run of `program` that logs to `log` (stdout and stderr, appended).
    pub fn spec(program: impl AsRef<Path>, log: impl AsRef<Path>) -> Spec {
        Spec {
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            env: Vec::new(),
            log: log.as_ref().to_owned(),
        }
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `kill -9`, as a crash of the machine would end it; waits until it is gone.
    pub fn kill9(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Sends SIGTERM, the request to drain and end.
    pub fn terminate(&self) {
        // A process that is gone needs no signal.
        let _ = Command::new("kill").arg("-TERM").arg(self.pid().to_string()).stderr(Stdio::null()).status();
    }

    /// The exit status, or `None` while it runs.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child can be asked for its status")
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it still runs after `deadline`.
    pub async fn wait(&mut self, deadline: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.exited() {
                return status;
            }
            assert!(
                start.elapsed() < deadline,
                "{} still runs after {deadline:?}:\n{}",
                self.name(),
                self.log_tail()
            );
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Waits until `url` answers 200.
    ///
    /// # Panics
    /// When the process ends before, or at `deadline`; with the end of its log.
    pub async fn wait_ready(&mut self, url: &str, deadline: Duration) {
        let client = reqwest::Client::new();
        let start = Instant::now();
        let mut last = "no answer".to_owned();
        while start.elapsed() < deadline {
            if let Some(status) = self.exited() {
                panic!("{} ended ({status}) before {url} was ready:\n{}", self.name(), self.log_tail());
            }
            match client.get(url).timeout(Duration::from_secs(2)).send().await {
                Ok(answer) if answer.status().is_success() => return,
                Ok(answer) => {
                    last = format!("{} {}", answer.status(), answer.text().await.unwrap_or_default())
                }
                Err(error) => last = error.to_string(),
            }
            tokio::time::sleep(PAUSE).await;
        }
        panic!("{url} is not ready after {deadline:?} ({last}):\n{}", self.log_tail());
    }

    /// Everything it has written.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn log_tail(&self) -> String {
        let log = self.log();
        let start = log.char_indices().map(|(at, _)| at).find(|at| log.len() - at <= LOG_TAIL).unwrap_or(0);
        log[start..].to_owned()
    }

    fn name(&self) -> String {
        self.program.display().to_string()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill9();
    }
}

impl Spec {
    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Adds an environment variable to those of the test.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Starts it.
    ///
    /// # Panics
    /// When the program or the log cannot be opened.
    pub fn spawn(&self) -> Process {
        let log = File::options()
            .create(true)
            .append(true)
            .open(&self.log)
            .unwrap_or_else(|error| panic!("{} cannot be written: {error}", self.log.display()));
        let child = Command::new(&self.program)
            .args(&self.args)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("the log can be shared"))
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("{} cannot be started: {error}", self.program.display()));
        Process { child, log: self.log.clone(), program: self.program.clone() }
    }
}
