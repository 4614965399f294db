//! What the figures were measured on, and who else was using it: read from `/proc`.

use std::fs::read_to_string;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

/// A machine, and how busy it was during a measurement.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Machine {
    cpu: String,
    cores: usize,
    memory_bytes: u64,
    kernel: String,
    /// How many processes wanted to run, on average over a minute, before and after the measurement.
    load_before: f64,
    load_after: f64,
    /// How many cores other programs used meanwhile, and the machine's own host took away.
    others_cores: f64,
    stolen_cores: f64,
    took_s: f64,
}

/// Watches how busy the machine is from its making until [`Watch::end`].
pub(super) struct Watch {
    began: Instant,
    load: f64,
    ticks: Ticks,
    own: u64,
}

/// Ticks of the processors, all of them together, since the machine started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ticks {
    busy: u64,
    stolen: u64,
}

impl Watch {
    pub(super) fn begin() -> Result<Watch> {
        Ok(Watch { began: Instant::now(), load: load()?, ticks: ticks()?, own: own_ticks()? })
    }

    /// What it came to. Processes that were started meanwhile count as our own once they have ended.
    pub(super) fn end(&self) -> Result<Machine> {
        let took_s = self.began.elapsed().as_secs_f64().max(1e-3);
        let (now, own) = (ticks()?, own_ticks()?.saturating_sub(self.own));
        let cores = |ticks: u64| ticks as f64 / TICKS_A_SECOND / took_s;
        Ok(Machine {
            cpu: field("/proc/cpuinfo", "model name")?,
            cores: std::thread::available_parallelism()?.get(),
            memory_bytes: kib(&field("/proc/meminfo", "MemTotal")?)?,
            kernel: read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            load_before: self.load,
            load_after: load()?,
            others_cores: cores((now.busy - self.ticks.busy).saturating_sub(own)),
            stolen_cores: cores(now.stolen - self.ticks.stolen),
            took_s,
        })
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Machine { cpu, cores, memory_bytes, kernel, load_before, load_after, .. } = self;
        let Machine { others_cores, stolen_cores, took_s, .. } = self;
        let gib = *memory_bytes as f64 / (1u64 << 30) as f64;
        write!(
            f,
            "{cores} × {cpu}, {gib:.1} GiB, Linux {kernel}; load {load_before:.1} before, {load_after:.1} after; "
        )?;
        write!(
            f,
            "meanwhile others used {others_cores:.2} cores and the host took {stolen_cores:.2}; {took_s:.0} s"
        )
    }
}

/// The kernel's own unit of time in `/proc`, which is 10 ms on every Linux.
const TICKS_A_SECOND: f64 = 100.0;

fn load() -> Result<f64> {
    let text = read_to_string("/proc/loadavg")?;
    let first = text.split_whitespace().next().context("/proc/loadavg is empty")?;
    first.parse().context("/proc/loadavg has no load")
}

fn ticks() -> Result<Ticks> {
    let text = read_to_string("/proc/stat")?;
    total_ticks(&text).context("/proc/stat has no line for all processors")
}

/// user nice system idle iowait irq softirq steal …
fn total_ticks(stat: &str) -> Option<Ticks> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    let fields: Vec<u64> = line.split_whitespace().map_while(|field| field.parse().ok()).collect();
    let busy = [0, 1, 2, 5, 6].iter().map(|i| fields.get(*i)).sum::<Option<u64>>()?;
    Some(Ticks { busy, stolen: *fields.get(7)? })
}

fn own_ticks() -> Result<u64> {
    let stat = read_to_string("/proc/self/stat")?;
    let times = process_ticks(&stat).context("/proc/self/stat cannot be read")?;
    Ok(times.iter().sum())
}

/// utime stime cutime cstime of a process.
fn process_ticks(stat: &str) -> Option<[u64; 4]> {
    // The name before them may hold anything, also spaces and parentheses.
    let (_, fields) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let mut times = [0; 4];
    for (time, field) in times.iter_mut().zip(fields.get(11..15)?) {
        *time = field.parse().ok()?;
    }
    Some(times)
}

/// How long the processors have worked for a process.
pub(super) fn cpu_time(process: u32) -> Result<Duration> {
    let stat = read_to_string(format!("/proc/{process}/stat")).context("the process is gone")?;
    let [user, system, _, _] = process_ticks(&stat).context("the process's times cannot be read")?;
    Ok(Duration::from_secs_f64((user + system) as f64 / TICKS_A_SECOND))
}

/// How much memory a process has that is really there.
pub(super) fn resident_bytes(process: u32) -> Result<u64> {
    kib(&field(&format!("/proc/{process}/status"), "VmRSS")?)
}

/// What stands behind `name:` in one of the kernel's lists.
fn field(path: &str, name: &str) -> Result<String> {
    let text = read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    let value = value_of(&text, name).with_context(|| format!("{path} has no {name}"))?;
    Ok(value.to_owned())
}

fn value_of<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let mut pairs = text.lines().filter_map(|line| line.split_once(':'));
    pairs.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim())
}

fn kib(text: &str) -> Result<u64> {
    let number = text.strip_suffix("kB").context("a size without its unit")?;
    Ok(number.trim().parse::<u64>()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_lists_are_read_rightly() {
        let stat = "cpu  10 1 20 500 7 2 3 4 0 0\ncpu0 5 0 10 250 3 1 1 2 0 0\n";
        assert_eq!(total_ticks(stat), Some(Ticks { busy: 36, stolen: 4 }));
        assert_eq!(total_ticks("cpu  10 1"), None);
        let stat = "42 (a ) b) S 1 42 42 0 -1 4194560 1 2 3 4 11 12 13 14 20 0 1 0 1 2 3";
        assert_eq!(process_ticks(stat), Some([11, 12, 13, 14]));
        assert_eq!(value_of("a: 1\nVmRSS:\t  123 kB\n", "VmRSS"), Some("123 kB"));
        assert_eq!(kib("123 kB").unwrap(), 123 * 1024);
    }

    #[test]
    fn this_process_can_be_measured() {
        assert!(resident_bytes(std::process::id()).unwrap() > 4096);
        cpu_time(std::process::id()).unwrap();
        Watch::begin().unwrap().end().unwrap();
    }
}
