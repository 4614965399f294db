//! The real libnccl and NVRTC, as far as they go without a GPU: that they are found and have what they should have; that NCCL
//! reads what it is given, and says why it cannot go on; that every kernel compiles for every architecture.
//!
//! Where there is none they are passed over with a notice; if `NCCL_LIB_PATH` or `NVRTC_LIB_PATH` names one, it has to be there.

#![allow(clippy::unwrap_used, reason = "what cannot be set up fails the test")]
#![allow(clippy::print_stdout, reason = "what was found, or passed over, is the other half of the result")]

mod common;

use std::ffi::c_int;

use common::driver;
use reknit_collectives::AbortHandle;
use reknit_cuda::{
    Communicator, Feature, FormError, Left, Nccl, Nvrtc, Options, Target, Trouble, Version, Way, World,
};
use reknit_membership::ids::{Generation, Rank, WorldSize};

fn real() -> Option<Nccl> {
    match Nccl::load() {
        Ok(nccl) => Some(nccl),
        Err(missing) if std::env::var_os("NCCL_LIB_PATH").is_none() => {
            println!("passed over: {missing}");
            None
        }
        Err(missing) => panic!("{missing}"),
    }
}

#[test]
fn it_has_every_function_that_its_release_should_have() {
    let Some(nccl) = real() else { return };
    // SAFETY: it is loaded already.
    let library = unsafe { libloading::Library::new(nccl.path()).unwrap() };
    let mut code = 0;
    // SAFETY: the function has this type, and writes one integer.
    unsafe {
        library.get::<unsafe extern "C" fn(*mut c_int) -> c_int>(b"ncclGetVersion").unwrap()(&mut code)
    };
    println!("{} is NCCL {} ({code})", nccl.path(), nccl.version());
    // A function that was absent would have made it an older one.
    assert_eq!(Version::from_code(code), Some(nccl.version()));
    let has = |symbol: &str| {
        // SAFETY: nothing is called.
        unsafe { library.get::<*mut std::ffi::c_void>(symbol.as_bytes()).is_ok() }
    };
    let pairs = [
        (Feature::Shrink, "ncclCommShrink"),
        (Feature::Revoke, "ncclCommRevoke"),
        (Feature::Grow, "ncclCommGrow"),
    ];
    for (feature, symbol) in pairs {
        assert_eq!(nccl.version().has(feature), has(symbol), "the table of releases is wrong about {symbol}");
    }
}

#[test]
fn it_makes_seeds_and_says_why_it_forms_nothing_without_a_gpu() {
    let Some(nccl) = real() else { return };
    // Its own CUDA looks for the driver by name. Where there is one, this is not the test to run.
    if reknit_cuda::Driver::load().is_ok() {
        println!("passed over: there is a driver here; see cuda/check-gpu.sh");
        return;
    }
    let gpus = [driver().gpu(0).unwrap()];
    let mut communicator = Communicator::open(nccl, &gpus, Options::default()).unwrap();
    let ids = [communicator.unique_id().unwrap(), communicator.unique_id().unwrap()];
    assert_ne!(ids[0], ids[1]);
    for (id, generation) in ids.into_iter().zip([1, 2]) {
        let way = Way::Fresh { id };
        let world =
            World { generation: Generation(generation), size: WorldSize(1), ranks: vec![Rank(0)], way };
        match communicator.form(world, AbortHandle::new()) {
            Err(FormError::Failed { trouble: Trouble::Nccl(error), left: Left::Nothing, .. }) => {
                println!("{error}");
            }
            other => panic!("{other:?}"),
        }
    }
}

const KERNELS: [&str; 10] = [
    "pack_f32",
    "pack_bf16",
    "pack_f16",
    "unpack_bf16",
    "unpack_f16",
    "find_infinite_f32",
    "find_infinite_bf16",
    "find_infinite_f16",
    "digest_blocks",
    "digest_chunks",
];

#[test]
fn every_kernel_compiles_to_ptx_and_for_every_architecture() {
    let nvrtc = match Nvrtc::load() {
        Ok(nvrtc) => nvrtc,
        Err(missing) if std::env::var_os("NVRTC_LIB_PATH").is_none() => {
            println!("passed over: {missing}");
            return;
        }
        Err(missing) => panic!("{missing}"),
    };
    for target in [Target::Ptx(80), Target::Cubin(80), Target::Cubin(90), Target::Cubin(100)] {
        let image = nvrtc.kernels(target).unwrap();
        let bytes = image.as_bytes();
        println!("{nvrtc:?}: {target:?}, {} bytes", bytes.len());
        let holds = |text: &str| bytes.windows(text.len()).any(|window| window == text.as_bytes());
        assert_eq!(bytes.starts_with(b"\x7fELF"), matches!(target, Target::Cubin(_)));
        for kernel in KERNELS {
            let name = if matches!(target, Target::Ptx(_)) {
                format!(".entry {kernel}(")
            } else {
                kernel.to_owned()
            };
            assert!(holds(&name), "{target:?} has no {kernel}");
        }
    }
    let error = nvrtc.kernels(Target::Cubin(3)).unwrap_err();
    assert!(error.call == "nvrtcCompileProgram" && error.log.contains("architecture"), "{error}");
}
