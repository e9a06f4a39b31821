//! Compiles the C++ shim that keeps exceptions of llama.cpp from crossing into Rust.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=rust/llama/shim.cpp");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .file("rust/llama/shim.cpp")
        .include(llama_include())
        .warnings(true)
        .compile("llamactor_shim");
}

/// Where llama-cpp-sys-2 installed `llama.h`: beside the CMake package whose place it tells.
fn llama_include() -> PathBuf {
    let cmake = env::var("DEP_LLAMA_GGML_CMAKE_DIR")
        .expect("llama-cpp-sys-2 tells where it installed ggml (DEP_LLAMA_GGML_CMAKE_DIR)");
    let include = Path::new(&cmake).join("../../include");
    assert!(include.join("llama.h").is_file(), "llama.h is not in {}", include.display());
    include
}
