//! What was measured, as a file and as a table.

use std::{fs, io::Write, path::Path};

use serde::Serialize;

use crate::stats::Share;

pub const COMMAND: &str = "make bench-trust";

/// One line of the report. `low` and `high`: Wilson's interval of 95 %.
#[derive(Debug, Clone, Serialize)]
pub struct Metric {
    pub metric: String,
    pub value: f64,
    pub unit: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub low: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub high: Option<f64>,
    /// Answers or requests behind it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<usize>,
    /// The same by cosine alone, or without referees.
    pub baseline: Option<f64>,
    /// Value to baseline; none beside a baseline of 0.
    pub ratio: Option<f64>,
    pub command: &'static str,
}

impl Metric {
    pub fn new(metric: impl Into<String>, value: f64, unit: &'static str) -> Self {
        Self {
            metric: metric.into(),
            value,
            unit,
            low: None,
            high: None,
            count: None,
            baseline: None,
            ratio: None,
            command: COMMAND,
        }
    }

    pub fn share(metric: impl Into<String>, share: Share) -> Self {
        Self {
            low: Some(share.low_pct),
            high: Some(share.high_pct),
            count: Some(share.count),
            ..Self::new(metric, share.pct, "%")
        }
    }

    pub fn beside(mut self, baseline: f64) -> Self {
        self.baseline = Some(baseline);
        self.ratio = Some(self.value / baseline).filter(|ratio| ratio.is_finite());
        self
    }
}

pub fn write(path: &Path, bytes: &[u8]) -> Result<(), String> {
    let failed = |e: std::io::Error| format!("{}: {e}", path.display());
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(failed)?;
    }
    fs::write(path, bytes).map_err(failed)
}

pub fn json<T: Serialize>(path: &Path, value: &T) -> Result<(), String> {
    let mut bytes = serde_json::to_vec_pretty(value).map_err(|e| e.to_string())?;
    bytes.push(b'\n');
    write(path, &bytes)
}

/// Writes metrics into a list of them, in the place of those with the same names.
pub fn merge(path: &Path, metrics: &[Metric]) -> Result<(), String> {
    let mut all: Vec<serde_json::Value> = match fs::read(path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| format!("{}: {e}", path.display()))?,
        Err(_) => Vec::new(),
    };
    for metric in metrics {
        let value = serde_json::to_value(metric).map_err(|e| e.to_string())?;
        match all.iter_mut().find(|one| one["metric"] == value["metric"]) {
            Some(one) => *one = value,
            None => all.push(value),
        }
    }
    json(path, &all)
}

/// Prints the metrics, one a line.
pub fn print(metrics: &[Metric]) -> Result<(), String> {
    let mut out = std::io::stdout().lock();
    for m in metrics {
        let interval = match (m.low, m.high) {
            (Some(low), Some(high)) => format!("[{low:.2}, {high:.2}]"),
            _ => String::new(),
        };
        let count = m.count.map(|c| format!("of {c}")).unwrap_or_default();
        let baseline = m.baseline.map(|b| format!("beside {b:.2}")).unwrap_or_default();
        let line =
            format!("{:<44} {:>10.3} {:<8} {interval:<18} {count:<10} {baseline}", m.metric, m.value, m.unit);
        writeln!(out, "{}", line.trim_end()).map_err(|e| e.to_string())?;
    }
    Ok(())
}
