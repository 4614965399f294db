//! The native part of the Python package: one member of a job, on threads of its own. Its lease is renewed, its neighbours
//! are watched, and a change of coordinator is followed, whatever holds the interpreter's lock.

use std::time::Duration;

use pyo3::create_exception;
use pyo3::exceptions::{PyException, PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use reknit_trainer::launcher::{Next, SHARED_MAX, World as NativeWorld};
use reknit_trainer::{Credentials, End, LauncherOptions, TrainError};

create_exception!(
    _native,
    Unreachable,
    PyException,
    "No coordinator can be reached, or it does not talk to this node."
);
create_exception!(_native, Refused, PyException, "The coordinator does not let this node into the job.");
create_exception!(_native, JobCompleted, PyException, "The job is over: all nodes have finished.");
create_exception!(_native, JobClosed, PyException, "The job is over: somebody closed it.");
create_exception!(_native, Released, PyException, "This node has left the job as planned.");
create_exception!(_native, WorldOver, PyException, "The world is over; ask for the next one.");

/// How long a wait lasts before Python's signal handlers get their turn.
const SLICE: Duration = Duration::from_millis(100);

/// A place in a world.
#[pyclass(frozen, get_all)]
struct World {
    generation: u64,
    rank: u32,
    size: u32,
}

/// One member of a job.
#[pyclass(frozen)]
struct Launcher {
    /// Nothing once it has left.
    inner: std::sync::Mutex<Option<std::sync::Arc<reknit_trainer::Launcher>>>,
}

fn bad(why: impl std::fmt::Display) -> PyErr {
    PyValueError::new_err(why.to_string())
}

fn patience(seconds: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(seconds).map_err(|_| bad(format!("{seconds} is no time to wait, in seconds")))
}

fn failed(why: &TrainError) -> PyErr {
    let text = why.to_string();
    match why {
        TrainError::Unreachable { .. } | TrainError::Rejected(_) => Unreachable::new_err(text),
        TrainError::Refused(refusal) => match &**refusal {
            reknit_trainer::Refusal::JobClosed(closure) => over(*closure, &text),
            _ => Refused::new_err(text),
        },
        TrainError::Options(_) => bad(text),
        _ => PyOSError::new_err(text),
    }
}

fn over(closure: reknit_trainer::Closure, text: &str) -> PyErr {
    match closure {
        reknit_trainer::Closure::Closed => JobClosed::new_err(text.to_owned()),
        _ => JobCompleted::new_err(text.to_owned()),
    }
}

/// Repeats a wait in slices until it gives something or `seconds` are over, with Python's signal handlers in between.
fn in_slices<T: Send>(
    py: Python<'_>,
    seconds: f64,
    wait: impl Fn(Duration) -> PyResult<Option<T>> + Sync,
) -> PyResult<Option<T>> {
    let until = std::time::Instant::now() + patience(seconds)?;
    loop {
        let left = until.saturating_duration_since(std::time::Instant::now());
        if let Some(seen) = py.detach(|| wait(left.min(SLICE)))? {
            return Ok(Some(seen));
        }
        py.check_signals()?;
        if left.is_zero() {
            return Ok(None);
        }
    }
}

impl Launcher {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<std::sync::Arc<reknit_trainer::Launcher>>> {
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn get(&self) -> PyResult<std::sync::Arc<reknit_trainer::Launcher>> {
        self.lock().clone().ok_or_else(|| bad("this node has left the job"))
    }
}

#[pymethods]
impl Launcher {
    /// Joins a job. Whether the coordinator lets this node in, `next_world` says.
    #[new]
    #[pyo3(signature = (coordinators, job, *, min, max, listen, advertise=None, name=None, ca=None, cert=None, key=None,
                        token_file=None, join_patience=60.0, patience=600.0))]
    #[allow(clippy::too_many_arguments, reason = "all but the first two are keywords")]
    fn new(
        py: Python<'_>,
        coordinators: &str,
        job: &str,
        min: u32,
        max: u32,
        listen: &str,
        advertise: Option<String>,
        name: Option<&str>,
        ca: Option<String>,
        cert: Option<String>,
        key: Option<String>,
        token_file: Option<String>,
        join_patience: f64,
        patience: f64,
    ) -> PyResult<Launcher> {
        let mut credentials =
            Credentials::from_env().map_err(|why| bad(format!("{} ({})", why.text(), why.hint())))?;
        for (named, place) in [
            (ca, &mut credentials.ca),
            (cert, &mut credentials.cert),
            (key, &mut credentials.key),
            (token_file, &mut credentials.token_file),
        ] {
            if let Some(path) = named {
                *place = Some(path.into());
            }
        }
        let listen = listen.parse().map_err(|_| bad(format!("{listen:?} is no address to listen on")))?;
        let mut options = LauncherOptions::new(coordinators, job)
            .and_then(|options| options.members(min, max))
            .map_err(bad)?
            .credentials(credentials)
            .listen(listen, advertise)
            .patience(self::patience(join_patience)?, self::patience(patience)?);
        if let Some(name) = name {
            options = options.name(name).map_err(bad)?;
        }
        let launcher = py.detach(|| reknit_trainer::Launcher::join(options)).map_err(|why| failed(&why))?;
        Ok(Launcher { inner: std::sync::Mutex::new(Some(std::sync::Arc::new(launcher))) })
    }

    /// Waits for a place in the next world. None if there is none within `seconds`: ask again, nothing is lost by it.
    fn next_world(&self, py: Python<'_>, seconds: f64) -> PyResult<Option<World>> {
        let launcher = self.get()?;
        in_slices(py, seconds, |slice| match launcher.next_world(slice) {
            Ok(Next::World(NativeWorld { generation, rank, size })) => {
                Ok(Some(World { generation, rank, size }))
            }
            Ok(Next::NotYet) => Ok(None),
            Ok(Next::End(End::Closed(closure))) => Err(over(closure, "the job is over")),
            Ok(Next::End(_)) => Err(Released::new_err("this node has left the job")),
            Err(why) => Err(failed(&why)),
        })
    }

    /// Gives all nodes of the world what its rank 0 gives here. None if not all have called it within `seconds`.
    fn share<'py>(
        &self,
        py: Python<'py>,
        data: &[u8],
        seconds: f64,
    ) -> PyResult<Option<Bound<'py, PyBytes>>> {
        if data.len() > SHARED_MAX {
            return Err(bad(format!("at most {SHARED_MAX} bytes can be shared, not {}", data.len())));
        }
        let launcher = self.get()?;
        let over = |_| WorldOver::new_err("the world is over; ask for the next one");
        let shared = in_slices(py, seconds, |slice| launcher.share(data, slice).map_err(over))?;
        Ok(shared.map(|bytes| PyBytes::new(py, &bytes)))
    }

    /// Whether the world is over, or is to end.
    fn is_over(&self) -> PyResult<bool> {
        Ok(self.get()?.is_over())
    }

    /// Whether the job, or this node's part in it, is over.
    fn has_ended(&self) -> bool {
        self.get().map_or(true, |launcher| launcher.end().is_some())
    }

    /// Whether the job has a world at present; None if no coordinator says.
    fn job_has_a_world(&self, py: Python<'_>) -> PyResult<Option<bool>> {
        let launcher = self.get()?;
        Ok(py.detach(|| launcher.job_has_a_world()))
    }

    /// This node's machine will be taken in so many seconds: it is left out of the next world.
    fn notice(&self, py: Python<'_>, seconds: f64) -> PyResult<()> {
        let (launcher, left) = (self.get()?, patience(seconds)?);
        py.detach(|| launcher.notice(left));
        Ok(())
    }

    /// Says that this node's part is done, and waits for the others. Returns whether the job is over; if not, leave it.
    fn finish(&self, py: Python<'_>, seconds: f64) -> PyResult<bool> {
        let launcher = self.get()?;
        Ok(in_slices(py, seconds, |slice| Ok(launcher.finish(slice)))?.unwrap_or(false))
    }

    /// Ends the job for all nodes. Returns whether a coordinator has taken that.
    fn close_job(&self, py: Python<'_>) -> PyResult<bool> {
        let launcher = self.get()?;
        Ok(py.detach(|| launcher.close_job()))
    }

    /// Leaves the job.
    fn leave(&self, py: Python<'_>) {
        let left = self.lock().take();
        py.detach(|| drop(left));
    }
}

#[pymodule]
fn _native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    // What the library has to say goes to standard error; REKNIT_LOG says how much of it.
    let filter = tracing_subscriber::EnvFilter::try_from_env("REKNIT_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn"));
    // Whoever embeds this beside another native module may have one already.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
    module.add_class::<World>()?;
    module.add_class::<Launcher>()?;
    let py = module.py();
    module.add("SHARED_MAX", SHARED_MAX)?;
    module.add("Unreachable", py.get_type::<Unreachable>())?;
    module.add("Refused", py.get_type::<Refused>())?;
    module.add("JobCompleted", py.get_type::<JobCompleted>())?;
    module.add("JobClosed", py.get_type::<JobClosed>())?;
    module.add("Released", py.get_type::<Released>())?;
    module.add("WorldOver", py.get_type::<WorldOver>())?;
    Ok(())
}
