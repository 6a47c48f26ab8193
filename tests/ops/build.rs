//! What the cmake crate asks a build script's environment for, handed on to the tests.

fn main() {
    println!("cargo:rustc-env=TARGET={}", std::env::var("TARGET").expect("set by cargo"));
    println!("cargo:rerun-if-changed=build.rs");
}
