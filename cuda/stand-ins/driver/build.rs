//! Compiles the kernels for the host: the same source as for devices, as C.

fn main() {
    let kernels = "../../kernels";
    println!("cargo::rerun-if-changed={kernels}");
    cc::Build::new()
        .file(format!("{kernels}/buckets.cu"))
        // The compiler does not know the name's ending.
        .flags(["-x", "c", "-std=c11"])
        .extra_warnings(true)
        .opt_level(2)
        .compile("reknit-kernels");
}
