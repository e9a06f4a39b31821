//! The process-wide backend of llama.cpp and its devices.

use std::ffi::CStr;
use std::sync::OnceLock;

use llama_cpp_2::llama_backend::LlamaBackend;

use super::log;

/// Initialised once and never freed: every model and context needs it until the process ends.
static BACKEND: OnceLock<LlamaBackend> = OnceLock::new();

/// Initialises llama.cpp once per process; cheap afterwards.
pub fn initialise() {
    BACKEND.get_or_init(|| {
        log::install();
        LlamaBackend::init().expect("the backend is initialised once, by this cell")
    });
}

/// A device that can hold layers.
#[derive(Clone, Debug)]
pub struct Device {
    /// Index to pass as one of the load option `devices`.
    pub index: usize,
    /// Name as llama.cpp gives it, such as `CUDA0`.
    pub name: String,
    /// Readable description, such as the name of the card.
    pub description: String,
    /// Backend that drives it, such as `CUDA` or `CPU`.
    pub backend: String,
    /// Memory in bytes.
    pub memory_total: usize,
    /// Free memory in bytes.
    pub memory_free: usize,
    /// `cpu`, `gpu`, `integrated_gpu`, `accelerator` or `unknown`.
    pub kind: &'static str,
}

/// The devices that llama.cpp found.
#[must_use]
pub fn devices() -> Vec<Device> {
    use llama_cpp_2::LlamaBackendDeviceType as Kind;
    initialise();
    llama_cpp_2::list_llama_ggml_backend_devices()
        .into_iter()
        .map(|device| Device {
            index: device.index,
            name: device.name,
            description: device.description,
            backend: device.backend,
            memory_total: device.memory_total,
            memory_free: device.memory_free,
            kind: match device.device_type {
                Kind::Cpu => "cpu",
                Kind::Gpu => "gpu",
                Kind::IntegratedGpu => "integrated_gpu",
                Kind::Accelerator => "accelerator",
                _ => "unknown",
            },
        })
        .collect()
}

/// One line about the instruction sets and backends that this build uses (`llama_print_system_info`).
#[must_use]
pub fn system_info() -> String {
    initialise();
    // SAFETY: returns a pointer to a static, NUL-terminated buffer.
    let text = unsafe { CStr::from_ptr(llama_cpp_sys_2::llama_print_system_info()) };
    text.to_string_lossy().into_owned()
}
