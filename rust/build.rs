//! Compiles the C++ shims: one keeps exceptions of llama.cpp from crossing into Rust, the other gives its chat formats
//! a C interface.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
    let installed = Installed::find();
    compile("llamactor_shim", "rust/llama/shim.cpp", &[&installed.include(), &installed.source("src", "llama-ext.h")]);
    compile(
        "llamactor_common",
        "rust/llama/common.cpp",
        &[&installed.include(), &installed.source("common", "chat.h")],
    );
}

/// Warns of our file, and not of the headers.
fn compile(name: &str, file: &str, headers: &[&Path]) {
    println!("cargo:rerun-if-changed={file}");
    let mut build = cc::Build::new();
    for folder in headers {
        build.flag("-isystem").flag(folder);
    }
    build.cpp(true).std("c++17").file(file).warnings(true).compile(name);
}

/// Where llama-cpp-sys-2 built llama.cpp and installed it.
struct Installed {
    /// `lib/cmake/ggml` of the installation, whose place the bindings tell.
    cmake: PathBuf,
}

impl Installed {
    fn find() -> Self {
        let cmake = env::var("DEP_LLAMA_GGML_CMAKE_DIR")
            .expect("llama-cpp-sys-2 tells where it installed ggml (DEP_LLAMA_GGML_CMAKE_DIR)");
        Self { cmake: cmake.into() }
    }

    /// The folder of `llama.h`.
    fn include(&self) -> PathBuf {
        with_file(self.root().join("include"), "llama.h")
    }

    /// The folder of a header that is not installed: it lies in the sources that CMake remembers.
    fn source(&self, folder: &str, header: &str) -> PathBuf {
        let cache = with_file(self.root().join("build"), "CMakeCache.txt").join("CMakeCache.txt");
        let cache = std::fs::read_to_string(cache).expect("the CMake cache of llama.cpp can be read");
        let source = cache.lines().find_map(|line| line.strip_prefix("CMAKE_HOME_DIRECTORY:INTERNAL="));
        with_file(Path::new(source.expect("the CMake cache names its sources")).join(folder), header)
    }

    /// Up from `lib/cmake/ggml`.
    fn root(&self) -> PathBuf {
        self.cmake
            .ancestors()
            .find(|folder| folder.join("include").is_dir())
            .map_or_else(|| panic!("there is no include folder above {}", self.cmake.display()), Path::to_path_buf)
    }
}

fn with_file(folder: PathBuf, name: &str) -> PathBuf {
    assert!(folder.join(name).is_file(), "{name} is not in {}", folder.display());
    folder
}
