//! Kernels, run on the host: each is a function of C, compiled from the source that devices run.

use std::ffi::{CStr, c_char, c_uint, c_void};

use crate::{INVALID_HANDLE, INVALID_VALUE, NOT_FOUND, Result, SUCCESS, give};

type Kernel = unsafe extern "C" fn(*mut *mut c_void);

macro_rules! kernels {
    ($($name:ident $arguments:literal),+ $(,)?) => {
        unsafe extern "C" {
            $(fn $name(arguments: *mut *mut c_void);)+
        }

        /// Each with its name and how many arguments it has. All are of eight bytes.
        const KERNELS: &[(&str, usize, Kernel)] = &[$((stringify!($name), $arguments, $name)),+];
    };
}

kernels! {
    pack_f32 4, pack_bf16 4, pack_f16 4, unpack_bf16 4, unpack_f16 4,
    find_infinite_f32 3, find_infinite_bf16 3, find_infinite_f16 3,
    digest_blocks 5, digest_chunks 5,
}

/// Any image is taken for the one that there is.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(module: *mut *mut c_void, image: *const c_void) -> Result {
    if image.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: the caller gives room for it, as with NVIDIA's.
    unsafe { module.write(std::ptr::without_provenance_mut(1)) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuModuleUnload(module: *mut c_void) -> Result {
    if module.is_null() { INVALID_HANDLE } else { SUCCESS }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(
    function: *mut *mut c_void,
    _module: *mut c_void,
    name: *const c_char,
) -> Result {
    // SAFETY: the caller gives a text.
    let name = unsafe { CStr::from_ptr(name) };
    match KERNELS.iter().position(|(known, _, _)| known.as_bytes() == name.to_bytes()) {
        // SAFETY: as above.
        Some(at) => unsafe { function.write(std::ptr::without_provenance_mut(at + 1)) },
        None => return NOT_FOUND,
    }
    SUCCESS
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: *mut c_void,
    grid_x: c_uint,
    _grid_y: c_uint,
    _grid_z: c_uint,
    block_x: c_uint,
    _block_y: c_uint,
    _block_z: c_uint,
    _shared_bytes: c_uint,
    stream: *mut c_void,
    arguments: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> Result {
    let Some((_, count, kernel)) = (function as usize).checked_sub(1).and_then(|at| KERNELS.get(at)) else {
        return INVALID_HANDLE;
    };
    if grid_x == 0 || block_x == 0 || block_x > 1024 {
        return INVALID_VALUE;
    }
    // The arguments are taken when it is launched, as with NVIDIA's.
    // SAFETY: the caller gives so many pointers to eight bytes each.
    let mut taken: Vec<u64> =
        (0..*count).map(|at| unsafe { (*arguments.add(at)).cast::<u64>().read_unaligned() }).collect();
    let kernel = *kernel;
    give(stream, move || {
        let mut pointers: Vec<*mut c_void> =
            taken.iter_mut().map(|word| std::ptr::from_mut(word).cast()).collect();
        // SAFETY: it takes so many arguments; who launches it keeps the memory that they name until the stream is past it.
        unsafe { kernel(pointers.as_mut_ptr()) };
    })
}
