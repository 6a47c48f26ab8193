//! Builds the op library with the cmake crate and tells the tests where it is.

fn main() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for part in ["src", "cpp", "CMakeLists.txt", "Cargo.toml"] {
        println!("cargo:rerun-if-changed={}", root.join(part).display());
    }
    let installed = cmake::Config::new(&root).profile("Release").build();
    println!("cargo:rustc-env=ANNBATCH_INSTALLED={}", installed.display());
}
