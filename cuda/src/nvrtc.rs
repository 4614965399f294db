//! NVRTC: the compiler of CUDA as a library, loaded at run time. It makes the kernels for the device that is there, and needs
//! neither a device nor headers to do so.

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::Path;

use crate::library::{Loaded, Missing, Wanted, function_table};

const NVRTC: Wanted = Wanted {
    name: "NVRTC",
    files: &["libnvrtc.so.13", "libnvrtc.so.12"],
    variable: Some("NVRTC_LIB_PATH"),
    wheel: &["nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"],
    hint: "install it (PyPI: nvidia-cuda-nvrtc), or set NVRTC_LIB_PATH to the file or its directory",
};

type RawProgram = *mut c_void;
type RawResult = c_int;

function_table! {
    /// The functions, as in `nvrtc.h`.
    Functions {
        version: "nvrtcVersion" (*mut c_int, *mut c_int) -> RawResult;
        create: "nvrtcCreateProgram" (
            *mut RawProgram, *const c_char, *const c_char, c_int, *const *const c_char, *const *const c_char
        ) -> RawResult;
        destroy: "nvrtcDestroyProgram" (*mut RawProgram) -> RawResult;
        compile: "nvrtcCompileProgram" (RawProgram, c_int, *const *const c_char) -> RawResult;
        log_size: "nvrtcGetProgramLogSize" (RawProgram, *mut usize) -> RawResult;
        log: "nvrtcGetProgramLog" (RawProgram, *mut c_char) -> RawResult;
        ptx_size: "nvrtcGetPTXSize" (RawProgram, *mut usize) -> RawResult;
        ptx: "nvrtcGetPTX" (RawProgram, *mut c_char) -> RawResult;
        cubin_size: "nvrtcGetCUBINSize" (RawProgram, *mut usize) -> RawResult;
        cubin: "nvrtcGetCUBIN" (RawProgram, *mut c_char) -> RawResult;
        => optional {}
    }
}

/// For what kernels are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// PTX of this virtual architecture (80 for `compute_80`), which the driver compiles for the device that it has.
    Ptx(u32),
    /// Machine code of this architecture (90 for `sm_90`).
    Cubin(u32),
}

/// Why kernels were not compiled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{call} answered {code}: {log}")]
pub struct CompileError {
    /// Which function.
    pub call: &'static str,
    /// What it answered.
    pub code: i32,
    /// What the compiler had to say.
    pub log: String,
}

/// The kernels, compiled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image(Vec<u8>);

impl Image {
    /// An image that was compiled before: PTX as text, or a cubin.
    pub fn new(mut bytes: Vec<u8>) -> Image {
        // The driver takes PTX to end with a zero, and does not mind one behind a cubin.
        bytes.push(0);
        Image(bytes)
    }

    /// What the driver is given.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The compiler.
pub struct Nvrtc {
    functions: Functions,
    loaded: Loaded,
}

impl Nvrtc {
    /// NVRTC from where `NVRTC_LIB_PATH` says, else by the loader's path, else out of the Python environment that is active.
    pub fn load() -> Result<Nvrtc, Missing> {
        Nvrtc::open(None)
    }

    /// NVRTC from this file and no other.
    pub fn load_from(path: &Path) -> Result<Nvrtc, Missing> {
        Nvrtc::open(Some(path))
    }

    fn open(path: Option<&Path>) -> Result<Nvrtc, Missing> {
        let loaded = NVRTC.load(path)?;
        let functions = Functions::resolve(|symbol| loaded.address(symbol))
            .map_err(|symbol| NVRTC.lacks(&loaded, symbol))?;
        Ok(Nvrtc { functions, loaded })
    }

    /// Which CUDA it is of, as a major and a minor number.
    pub fn version(&self) -> (i32, i32) {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: it writes two integers.
        unsafe { (self.functions.version)(&mut major, &mut minor) };
        (major, minor)
    }

    /// Which file it is.
    pub fn path(&self) -> &str {
        &self.loaded.path
    }

    /// Compiles this crate's kernels.
    pub fn kernels(&self, target: Target) -> Result<Image, CompileError> {
        self.compile(c"buckets.cu", include_str!("../kernels/buckets.cu"), target)
    }

    fn compile(&self, name: &std::ffi::CStr, source: &str, target: Target) -> Result<Image, CompileError> {
        let bad = |call| CompileError { call, code: 0, log: "a text holds a zero".to_owned() };
        let source = CString::new(source).map_err(|_| bad("nvrtcCreateProgram"))?;
        let header =
            CString::new(include_str!("../kernels/arithmetic.h")).map_err(|_| bad("nvrtcCreateProgram"))?;
        let (headers, names) = ([header.as_ptr()], [c"arithmetic.h".as_ptr()]);
        let mut program = Program { nvrtc: self, raw: std::ptr::null_mut() };
        // SAFETY: all texts end with a zero, and stay as they are during the call.
        let created = unsafe {
            (self.functions.create)(
                &mut program.raw,
                source.as_ptr(),
                name.as_ptr(),
                1,
                headers.as_ptr(),
                names.as_ptr(),
            )
        };
        program.check("nvrtcCreateProgram", created)?;
        let option = match target {
            Target::Ptx(number) => format!("--gpu-architecture=compute_{number}"),
            Target::Cubin(number) => format!("--gpu-architecture=sm_{number}"),
        };
        let option = CString::new(option).map_err(|_| bad("nvrtcCompileProgram"))?;
        let options = [option.as_ptr()];
        // SAFETY: as above.
        program.check("nvrtcCompileProgram", unsafe {
            (self.functions.compile)(program.raw, 1, options.as_ptr())
        })?;
        let bytes = match target {
            Target::Ptx(_) => program.read("nvrtcGetPTX", self.functions.ptx_size, self.functions.ptx)?,
            Target::Cubin(_) => {
                program.read("nvrtcGetCUBIN", self.functions.cubin_size, self.functions.cubin)?
            }
        };
        Ok(Image::new(bytes))
    }
}

impl std::fmt::Debug for Nvrtc {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (major, minor) = self.version();
        write!(f, "Nvrtc({major}.{minor}, {})", self.path())
    }
}

/// A compilation, given back in the end.
struct Program<'a> {
    nvrtc: &'a Nvrtc,
    raw: RawProgram,
}

impl Program<'_> {
    fn check(&self, call: &'static str, code: RawResult) -> Result<(), CompileError> {
        if code == 0 {
            return Ok(());
        }
        let functions = &self.nvrtc.functions;
        let read = |raw: RawProgram| -> Option<Vec<u8>> {
            let mut size = 0;
            // SAFETY: it writes one number; the handle is alive.
            (unsafe { (functions.log_size)(raw, &mut size) } == 0).then_some(())?;
            let mut log = vec![0u8; size];
            // SAFETY: there is room for as many bytes as it said.
            (unsafe { (functions.log)(raw, log.as_mut_ptr().cast()) } == 0).then_some(log)
        };
        let log = if self.raw.is_null() { None } else { read(self.raw) }.unwrap_or_default();
        let log = String::from_utf8_lossy(&log).trim_end_matches(['\0', '\n']).to_owned();
        Err(CompileError { call, code, log })
    }

    fn read(
        &self,
        call: &'static str,
        size_of: unsafe extern "C" fn(RawProgram, *mut usize) -> RawResult,
        bytes_of: unsafe extern "C" fn(RawProgram, *mut c_char) -> RawResult,
    ) -> Result<Vec<u8>, CompileError> {
        let mut size = 0;
        // SAFETY: it writes one number; the handle is alive.
        self.check(call, unsafe { size_of(self.raw, &mut size) })?;
        let mut bytes = vec![0u8; size];
        // SAFETY: there is room for as many bytes as it said.
        self.check(call, unsafe { bytes_of(self.raw, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        if !self.raw.is_null() {
            // SAFETY: the handle is given up here.
            unsafe { (self.nvrtc.functions.destroy)(&mut self.raw) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_it_is_told_what_to_do() {
        let missing = Nvrtc::load_from(Path::new("/nowhere/libnvrtc.so")).unwrap_err().to_string();
        assert!(missing.contains("/nowhere/libnvrtc.so") && missing.contains("NVRTC_LIB_PATH"), "{missing}");
    }

    #[test]
    fn a_function_that_is_absent_is_named() {
        for symbol in Functions::SYMBOLS.0 {
            let without =
                Functions::resolve(|asked| (asked != *symbol).then(|| asked.as_ptr().cast_mut().cast()));
            assert_eq!(without.err(), Some(*symbol));
        }
    }
}
