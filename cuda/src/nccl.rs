//! NCCL: the functions of it that are used, loaded at run time, and what they answer.

use std::ffi::{CStr, OsString, c_char, c_int, c_void};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use reknit_collectives::{DType, ReduceOp};

use crate::config::Config;
use crate::library::{Loaded, Missing, Wanted, function_table};
use crate::unique_id::UniqueId;
use crate::version::{Feature, Version};

const NCCL: Wanted = Wanted {
    name: "NCCL",
    files: &["libnccl.so.2"],
    variable: Some("NCCL_LIB_PATH"),
    wheel: &["nvidia/nccl/lib"],
    hint: "install it (Debian: libnccl2; PyPI: nvidia-nccl-cu13), or set NCCL_LIB_PATH to the file or its directory",
};

/// A communicator's handle, as NCCL gives it.
pub(crate) type RawComm = *mut c_void;

/// What every function returns.
pub(crate) type RawResult = c_int;

function_table! {
    /// The functions, as in `nccl.h`.
    Functions {
        get_version: "ncclGetVersion" (*mut c_int) -> RawResult;
        get_unique_id: "ncclGetUniqueId" (*mut UniqueId) -> RawResult;
        init_rank_config: "ncclCommInitRankConfig" (*mut RawComm, c_int, UniqueId, c_int, *mut Config) -> RawResult;
        get_async_error: "ncclCommGetAsyncError" (RawComm, *mut RawResult) -> RawResult;
        abort: "ncclCommAbort" (RawComm) -> RawResult;
        finalize: "ncclCommFinalize" (RawComm) -> RawResult;
        destroy: "ncclCommDestroy" (RawComm) -> RawResult;
        count: "ncclCommCount" (RawComm, *mut c_int) -> RawResult;
        user_rank: "ncclCommUserRank" (RawComm, *mut c_int) -> RawResult;
        group_start: "ncclGroupStart" () -> RawResult;
        group_end: "ncclGroupEnd" () -> RawResult;
        all_reduce: "ncclAllReduce"
            (*const c_void, *mut c_void, usize, c_int, c_int, RawComm, *mut c_void) -> RawResult;
        => optional {
            get_last_error: "ncclGetLastError" (RawComm) -> *const c_char;
            shrink: "ncclCommShrink"
                (RawComm, *mut c_int, c_int, *mut RawComm, *mut Config, c_int) -> RawResult;
            revoke: "ncclCommRevoke" (RawComm, c_int) -> RawResult;
            grow: "ncclCommGrow"
                (RawComm, c_int, *const UniqueId, c_int, *mut RawComm, *mut Config) -> RawResult;
            comm_get_unique_id: "ncclCommGetUniqueId" (RawComm, *mut UniqueId) -> RawResult;
        }
    }
}

/// What NCCL said when it could not do as asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NcclCode {
    /// A call into CUDA failed.
    UnhandledCuda,
    /// A call into the system failed.
    System,
    /// A defect of NCCL, or memory that was overwritten.
    Internal,
    /// An argument is wrong. It has changed nothing.
    InvalidArgument,
    /// The calls do not fit together.
    InvalidUsage,
    /// A peer is gone, or failed.
    Remote,
    /// Not an error: it goes on.
    InProgress,
    /// NCCL's own time limit.
    Timeout,
    /// One that is newer than this table.
    Other(i32),
}

impl NcclCode {
    /// The code of an answer, unless it is success.
    pub(crate) fn of(result: RawResult) -> Option<NcclCode> {
        Some(match result {
            0 => return None,
            1 => NcclCode::UnhandledCuda,
            2 => NcclCode::System,
            3 => NcclCode::Internal,
            4 => NcclCode::InvalidArgument,
            5 => NcclCode::InvalidUsage,
            6 => NcclCode::Remote,
            7 => NcclCode::InProgress,
            8 => NcclCode::Timeout,
            other => NcclCode::Other(other),
        })
    }
}

impl fmt::Display for NcclCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            NcclCode::UnhandledCuda => "unhandled CUDA error",
            NcclCode::System => "system error",
            NcclCode::Internal => "internal error",
            NcclCode::InvalidArgument => "invalid argument",
            NcclCode::InvalidUsage => "invalid usage",
            NcclCode::Remote => "remote error: a peer is gone",
            NcclCode::InProgress => "still in progress",
            NcclCode::Timeout => "time-out",
            NcclCode::Other(code) => return write!(f, "code {code}"),
        })
    }
}

/// An answer of NCCL other than success.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {code}{}", if .said.is_empty() { String::new() } else { format!(" ({})", .said) })]
#[non_exhaustive]
pub struct NcclError {
    /// Which function.
    pub call: &'static str,
    /// What it answered.
    pub code: NcclCode,
    /// What NCCL had to say besides.
    pub said: String,
}

/// NCCL, found and of a release that can be used.
#[derive(Clone)]
pub struct Nccl {
    pub(crate) functions: Functions,
    version: Version,
    loaded: Arc<Loaded>,
}

impl Nccl {
    /// NCCL from where `NCCL_LIB_PATH` says, else by the loader's path, else out of the Python environment that is active.
    pub fn load() -> Result<Nccl, Missing> {
        Nccl::open(None)
    }

    /// NCCL from this file and no other.
    pub fn load_from(path: &Path) -> Result<Nccl, Missing> {
        Nccl::open(Some(path))
    }

    fn open(path: Option<&Path>) -> Result<Nccl, Missing> {
        let loaded = NCCL.load(path)?;
        let functions = Functions::resolve(|symbol| loaded.address(symbol))
            .map_err(|symbol| NCCL.lacks(&loaded, symbol))?;
        let mut code = 0;
        // SAFETY: it writes one integer, and needs neither a device nor an earlier call.
        let answer = unsafe { (functions.get_version)(&mut code) };
        let refused = |version: String, why: &str| {
            Err(Missing::Release {
                library: NCCL.name,
                path: loaded.path.clone(),
                version,
                why: why.to_owned(),
            })
        };
        let Some(version) = Version::from_code(code).filter(|_| answer == 0) else {
            return refused(format!("of code {code}"), "its version is none that NCCL has");
        };
        if let Some(why) = version.refused() {
            return refused(version.to_string(), why);
        }
        if let Some(why) = overridden(|variable| std::env::var_os(variable)) {
            return refused(version.to_string(), why);
        }
        Ok(Nccl { functions, version: without_what_is_absent(version, &functions), loaded: Arc::new(loaded) })
    }

    /// Which release it is, or the newest before it that has no more functions than are there.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Which file it is.
    pub fn path(&self) -> &str {
        &self.loaded.path
    }

    /// What NCCL says about an answer.
    pub(crate) fn error(&self, call: &'static str, result: RawResult, comm: Option<RawComm>) -> NcclError {
        let code = NcclCode::of(result).unwrap_or(NcclCode::Other(0));
        NcclError { call, code, said: self.last_error(comm) }
    }

    /// What NCCL says about the last thing that went wrong; of a communicator, if the handle is still alive.
    pub(crate) fn last_error(&self, comm: Option<RawComm>) -> String {
        let comm = comm.unwrap_or(std::ptr::null_mut());
        // SAFETY: the caller gives a handle that it has not given up, or null, which stands for the last of all.
        self.functions.get_last_error.map(|get| unsafe { text(get(comm)) }).unwrap_or_default()
    }
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Nccl({} {})", self.version, self.loaded.path)
    }
}

/// Which variable of NCCL's own takes away what this crate lives by, if one is set.
fn overridden(variable: impl Fn(&str) -> Option<OsString>) -> Option<&'static str> {
    if variable("NCCL_COMM_BLOCKING").is_some_and(|value| value != "0") {
        return Some(
            "NCCL_COMM_BLOCKING is set, so every call would block without a deadline: unset it, or set it to 0",
        );
    }
    if variable("NCCL_COMM_ID").is_some() {
        return Some("NCCL_COMM_ID is set, so every world would have the same seed: unset it");
    }
    None
}

/// A library that was built without a function that its release should have is one of before.
fn without_what_is_absent(version: Version, functions: &Functions) -> Version {
    let absent = [
        (functions.shrink.is_none(), Feature::Shrink, Version::new(2, 27, 2)),
        (functions.revoke.is_none(), Feature::Revoke, Version::new(2, 28, 6)),
        (
            functions.grow.is_none() || functions.comm_get_unique_id.is_none(),
            Feature::Grow,
            Version::new(2, 29, 1),
        ),
    ];
    let before = absent.into_iter().filter(|(absent, feature, _)| *absent && version.has(*feature));
    before.map(|(_, _, before)| before).min().unwrap_or(version)
}

/// # Safety
/// `text` is null or ends with a zero, and stays as it is during the call.
unsafe fn text(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: as the caller says.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

/// The type, as NCCL numbers it.
pub(crate) fn dtype_code(dtype: DType) -> c_int {
    match dtype {
        DType::U8 => 1,
        DType::I32 => 2,
        DType::I64 => 4,
        DType::F16 => 6,
        DType::F32 => 7,
        DType::F64 => 8,
        DType::Bf16 => 9,
    }
}

/// The operation, as NCCL numbers it.
pub(crate) fn op_code(op: ReduceOp) -> c_int {
    match op {
        ReduceOp::Sum => 0,
        ReduceOp::Max => 2,
        ReduceOp::Min => 3,
        ReduceOp::Mean => 4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Nobody calls it: tables of it only say what is there.
    fn anything(symbol: &str) -> Option<*mut c_void> {
        Some(symbol.as_ptr().cast_mut().cast())
    }

    #[test]
    fn a_function_that_must_be_there_is_named_when_it_is_not() {
        for symbol in Functions::SYMBOLS.0 {
            let without = Functions::resolve(|asked| if asked == *symbol { None } else { anything(asked) });
            assert_eq!(without.err(), Some(*symbol));
        }
    }

    #[test]
    fn a_function_that_is_absent_takes_its_feature_along() {
        let version = Version::new(2, 30, 7);
        let without = |symbol: &'static str| {
            let found = Functions::resolve(|asked| if asked == symbol { None } else { anything(asked) });
            without_what_is_absent(version, &found.unwrap())
        };
        assert_eq!(without("none"), version);
        assert_eq!(without("ncclGetLastError"), version);
        assert!(!without("ncclCommShrink").has(Feature::Shrink));
        assert!(
            !without("ncclCommRevoke").has(Feature::Revoke) && without("ncclCommRevoke").has(Feature::Shrink)
        );
        for symbol in ["ncclCommGrow", "ncclCommGetUniqueId"] {
            assert!(!without(symbol).has(Feature::Grow) && without(symbol).has(Feature::Revoke), "{symbol}");
        }
    }

    #[test]
    fn variables_that_would_make_calls_block_or_seeds_alike_are_refused() {
        let with = |name: &'static str, value: &'static str| {
            overridden(move |asked| (asked == name).then(|| OsString::from(value)))
        };
        assert!(with("NCCL_COMM_BLOCKING", "1").unwrap().contains("set it to 0"));
        assert_eq!(with("NCCL_COMM_BLOCKING", "0"), None);
        assert!(with("NCCL_COMM_ID", "10.0.0.1:5000").unwrap().contains("unset it"));
        assert_eq!(with("NCCL_DEBUG", "INFO"), None);
    }

    #[test]
    fn another_library_is_not_taken_for_nccl() {
        let missing = Nccl::load_from(Path::new("libc.so.6")).unwrap_err();
        assert!(matches!(missing, Missing::Symbol { symbol: "ncclGetVersion", .. }), "{missing}");
    }

    #[test]
    fn numbers_are_those_of_the_header() {
        assert_eq!(DType::ALL.map(dtype_code), [7, 8, 6, 9, 2, 4, 1]);
        assert_eq!(ReduceOp::ALL.map(op_code), [0, 4, 3, 2]);
        assert_eq!(NcclCode::of(0), None);
        assert_eq!(NcclCode::of(6), Some(NcclCode::Remote));
        assert_eq!(NcclCode::of(7), Some(NcclCode::InProgress));
        assert_eq!(NcclCode::of(9), Some(NcclCode::Other(9)));
    }
}
