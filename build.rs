//! Generates and compiles the C++ side of the cxx bridge; the header lands in `target/cxxbridge`.

fn main() {
    cxx_build::bridge("src/ffi.rs").std("c++20").compile("annbatch_bridge");
    println!("cargo:rerun-if-changed=src/ffi.rs");
}
