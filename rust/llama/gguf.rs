//! Reads and checks the header of a GGUF file before llama.cpp's C++ sees it.
//!
//! llama.cpp answers many malformed files with `abort()`, and its parser has had memory bugs. So every rule of its
//! parser is applied here first, in safe Rust, together with the assertions that metadata of a well-formed file can
//! trip later. Reading is bounded: nothing is allocated that the rest of the file could not fill, the time is linear
//! in the size of the header, and a path that is not a regular file is never opened for good.

use std::collections::HashSet;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::Error;

/// Header bytes that are read at most; the largest known vocabularies need some 30 MB.
const MAX_HEADER_BYTES: u64 = 1 << 30;
/// Longest key, as the GGUF specification has it.
const MAX_KEY_BYTES: u64 = u16::MAX as u64;
/// Longest single string that is kept; chat templates are the long ones, with some 100 KB.
const MAX_STRING_BYTES: u64 = 64 << 20;
/// llama.cpp searches keys and tensors linearly, so far more of them than real models have would stall it.
const MAX_PAIRS: u64 = 65_536;
const MAX_TENSORS: u64 = 65_536;
/// `GGUF_MAX_ARRAY_ELEMENTS`
const MAX_ARRAY_LENGTH: u64 = 1 << 30;
const MAX_VOCABULARY: u64 = 1 << 22;
/// `GGML_MAX_NAME` less the terminating zero
const MAX_TENSOR_NAME_BYTES: u64 = 63;
/// `GGML_MAX_DIMS`
const MAX_DIMENSIONS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 1 << 20;
/// `TENSOR_ALIGNMENT`: mapped weights must start at a multiple of it, or the CPU backend aborts.
const MAPPED_ALIGNMENT: u64 = 32;
/// `LLAMA_MAX_LAYERS`
const MAX_LAYERS: u64 = 512;
/// `LLAMA_MAX_EXPERTS`
const MAX_EXPERTS: u64 = 1024;
/// Arrays of integers and truth values up to this length are kept: per-layer values are, vocabularies are not.
const KEPT_INTEGERS: u64 = 1024;
/// A key of one byte, its type and a value of one byte.
const SMALLEST_PAIR: u64 = 8 + 1 + 4 + 1;
/// A name of one byte, no dimension, type and offset.
const SMALLEST_TENSOR: u64 = 8 + 1 + 4 + 4 + 8;
const TOKENS_KEY: &str = "tokenizer.ggml.tokens";
/// Bytes from the start of a file that tell what it is when it is no GGUF.
const SNIFFED_BYTES: usize = 64;

/// Architectures whose graph asserts that keys, values and rotation have the same width.
const ONE_HEAD_WIDTH: [&str; 22] = [
    "arcee",
    "baichuan",
    "dream",
    "exaone",
    "falcon",
    "granite",
    "internlm2",
    "llada",
    "llama",
    "mistral3",
    "olmo",
    "olmo2",
    "olmoe",
    "orion",
    "qwen2",
    "qwen2moe",
    "qwen3",
    "qwen3moe",
    "smollm3",
    "starcoder2",
    "talkie",
    "xverse",
];

/// Why a file cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// There is nothing at the path.
    #[error("no such file: {}", .0.display())]
    NotFound(PathBuf),
    /// The path is a folder.
    #[error("{} is a directory; give the path of a .gguf file in it", .0.display())]
    Directory(PathBuf),
    /// The path is a FIFO, a socket or a device.
    #[error("{} is a {kind}; a model must be a regular file", path.display())]
    NotRegular {
        /// The path.
        path: PathBuf,
        /// What it is instead.
        kind: &'static str,
    },
    /// The operating system refused.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The content is not a GGUF that llama.cpp can load.
    #[error("{}: {problem}", path.display())]
    Malformed {
        /// The path.
        path: PathBuf,
        /// What is wrong.
        problem: Problem,
    },
}

/// What is wrong with the content of a file.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// The file has no bytes.
    #[error("the file is empty (0 bytes); download or copy it again")]
    Empty,
    /// The first four bytes are not `GGUF`.
    #[error("not a GGUF file: it starts with {found}, not with \"GGUF\"{hint}")]
    Magic {
        /// The first bytes, escaped.
        found: String,
        /// What the file may be and what would work.
        hint: &'static str,
    },
    /// The version is not 2 or 3.
    #[error("GGUF version {version} is not supported, only 2 and 3 are{hint}")]
    Version {
        /// The version in the file.
        version: u32,
        /// What would work.
        hint: &'static str,
    },
    /// The file ends too early.
    #[error(
        "truncated: {what} at byte {offset} needs {needed} bytes, but the file ends after {size}; download or copy it again"
    )]
    Truncated {
        /// What was being read.
        what: String,
        /// Where it starts.
        offset: u64,
        /// Its length.
        needed: u64,
        /// The length of the file.
        size: u64,
    },
    /// The header is longer than anything sensible.
    #[error("the header is longer than {MAX_HEADER_BYTES} bytes (reached in {0}); the file is damaged")]
    HeaderTooLong(String),
    /// A count is larger than a cap or than the file has room for.
    #[error("{what} is {count}, but at most {limit} are possible{reason}; the file is damaged")]
    TooMany {
        /// What is counted.
        what: String,
        /// The count in the file.
        count: u64,
        /// The most that could be.
        limit: u64,
        /// Where the limit comes from.
        reason: &'static str,
    },
    /// A string is longer than its cap.
    #[error("{what} is {length} bytes long, at most {limit} are allowed; the file is damaged")]
    TooLong {
        /// Which string.
        what: String,
        /// Its length.
        length: u64,
        /// The cap.
        limit: u64,
    },
    /// A key or a tensor's name is empty, not UTF-8 or holds a NUL.
    #[error("{what} {fault}; the file is damaged")]
    Name {
        /// Which name.
        what: String,
        /// What is wrong with it.
        fault: &'static str,
    },
    /// A value type that GGUF does not have.
    #[error("key {key:?} has value type {kind}; GGUF has 0 to 12")]
    ValueType {
        /// The key.
        key: String,
        /// The number of the type.
        kind: u32,
    },
    /// An array whose elements are arrays.
    #[error("key {key:?} is an array of arrays, which llama.cpp does not read")]
    NestedArray {
        /// The key.
        key: String,
    },
    /// The same key twice.
    #[error("key {0:?} occurs twice; keys must be unique")]
    DuplicateKey(String),
    /// The same tensor twice.
    #[error("tensor {0:?} occurs twice; names must be unique")]
    DuplicateTensor(String),
    /// The same token twice.
    #[error("tokens {first} and {second} of {TOKENS_KEY} are both {text:?}; tokens must be unique")]
    DuplicateToken {
        /// The text.
        text: String,
        /// Index of the first one.
        first: u64,
        /// Index of the second one.
        second: u64,
    },
    /// A tensor that llama.cpp cannot use.
    #[error("tensor {name:?} {fault}")]
    Tensor {
        /// The tensor.
        name: String,
        /// What is wrong with it.
        fault: String,
    },
    /// No tensors in a model that is to be run.
    #[error("the file holds no tensors, only metadata; load it with vocab_only=True or use the full model")]
    NoTensors,
    /// A key that must be there is not.
    #[error("key {key:?} is missing; {hint}")]
    MissingKey {
        /// The key.
        key: String,
        /// Why it is needed, or what would work.
        hint: &'static str,
    },
    /// A value that llama.cpp would refuse or die of.
    #[error("key {key:?} {fault}")]
    Metadata {
        /// The key.
        key: String,
        /// What is wrong with the value.
        fault: String,
    },
    /// The file is a part of a split model, but not the first.
    #[error("this is part {part} of {count} of a split model; load the first part, {}", first.display())]
    NotFirstPart {
        /// One-based number of this part.
        part: u64,
        /// Number of parts.
        count: u64,
        /// The path of the first part.
        first: PathBuf,
    },
    /// The parts of a split model do not fit together.
    #[error("{0}")]
    Split(String),
}

/// The type of a value, as numbered in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ValueType {
    /// 8 bits, unsigned.
    U8,
    /// 8 bits, signed.
    I8,
    /// 16 bits, unsigned.
    U16,
    /// 16 bits, signed.
    I16,
    /// 32 bits, unsigned.
    U32,
    /// 32 bits, signed.
    I32,
    /// Single precision.
    F32,
    /// One byte; anything but zero is true.
    Bool,
    /// Length and bytes.
    String,
    /// Element type, length and elements.
    Array,
    /// 64 bits, unsigned.
    U64,
    /// 64 bits, signed.
    I64,
    /// Double precision.
    F64,
}

impl ValueType {
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    fn from_number(number: u32) -> Option<Self> {
        Self::ALL.get(usize::try_from(number).ok()?).copied()
    }

    /// Bytes of one value; for strings and arrays the least that one takes.
    fn least_bytes(self) -> u64 {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::String => 8,
            Self::Array => 12,
        }
    }

    fn is_integer(self) -> bool {
        !matches!(self, Self::F32 | Self::F64 | Self::Bool | Self::String | Self::Array)
    }

    /// The name as GGUF's specification has it, in lower case.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::U8 => "uint8",
            Self::I8 => "int8",
            Self::U16 => "uint16",
            Self::I16 => "int16",
            Self::U32 => "uint32",
            Self::I32 => "int32",
            Self::F32 => "float32",
            Self::Bool => "bool",
            Self::String => "string",
            Self::Array => "array",
            Self::U64 => "uint64",
            Self::I64 => "int64",
            Self::F64 => "float64",
        }
    }
}

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// 8 bits, unsigned.
    U8(u8),
    /// 8 bits, signed.
    I8(i8),
    /// 16 bits, unsigned.
    U16(u16),
    /// 16 bits, signed.
    I16(i16),
    /// 32 bits, unsigned.
    U32(u32),
    /// 32 bits, signed.
    I32(i32),
    /// Single precision.
    F32(f32),
    /// A truth value.
    Bool(bool),
    /// A text; bytes that are not UTF-8 became U+FFFD.
    String(String),
    /// An array. Its elements were checked and skipped.
    Array {
        /// Type of the elements.
        element: ValueType,
        /// Number of elements.
        len: u64,
        /// The elements, of short arrays of integers and truth values only; true is 1.
        integers: Option<Vec<i128>>,
    },
    /// 64 bits, unsigned.
    U64(u64),
    /// 64 bits, signed.
    I64(i64),
    /// Double precision.
    F64(f64),
}

impl Value {
    /// The type of the value.
    #[must_use]
    pub fn kind(&self) -> ValueType {
        match self {
            Self::U8(_) => ValueType::U8,
            Self::I8(_) => ValueType::I8,
            Self::U16(_) => ValueType::U16,
            Self::I16(_) => ValueType::I16,
            Self::U32(_) => ValueType::U32,
            Self::I32(_) => ValueType::I32,
            Self::F32(_) => ValueType::F32,
            Self::Bool(_) => ValueType::Bool,
            Self::String(_) => ValueType::String,
            Self::Array { .. } => ValueType::Array,
            Self::U64(_) => ValueType::U64,
            Self::I64(_) => ValueType::I64,
            Self::F64(_) => ValueType::F64,
        }
    }

    /// The value of any integer type.
    #[must_use]
    pub fn as_integer(&self) -> Option<i128> {
        match *self {
            Self::U8(v) => Some(v.into()),
            Self::I8(v) => Some(v.into()),
            Self::U16(v) => Some(v.into()),
            Self::I16(v) => Some(v.into()),
            Self::U32(v) => Some(v.into()),
            Self::I32(v) => Some(v.into()),
            Self::U64(v) => Some(v.into()),
            Self::I64(v) => Some(v.into()),
            _ => None,
        }
    }

    /// The text of a string.
    #[must_use]
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(text) => Some(text),
            _ => None,
        }
    }
}

/// How a tensor's elements are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorType {
    /// ggml's name of the type.
    pub name: &'static str,
    /// Elements of one block.
    pub block_elements: u64,
    /// Bytes of one block.
    pub block_bytes: u64,
}

impl TensorType {
    const F32: &'static str = "f32";

    /// `None` for numbers that ggml does not have (any more).
    fn from_number(number: u32) -> Option<Self> {
        let (name, block_elements, block_bytes) = match number {
            0 => (Self::F32, 1, 4),
            1 => ("f16", 1, 2),
            2 => ("q4_0", 32, 18),
            3 => ("q4_1", 32, 20),
            6 => ("q5_0", 32, 22),
            7 => ("q5_1", 32, 24),
            8 => ("q8_0", 32, 34),
            9 => ("q8_1", 32, 36),
            10 => ("q2_K", 256, 84),
            11 => ("q3_K", 256, 110),
            12 => ("q4_K", 256, 144),
            13 => ("q5_K", 256, 176),
            14 => ("q6_K", 256, 210),
            15 => ("q8_K", 256, 292),
            16 => ("iq2_xxs", 256, 66),
            17 => ("iq2_xs", 256, 74),
            18 => ("iq3_xxs", 256, 98),
            19 => ("iq1_s", 256, 50),
            20 => ("iq4_nl", 32, 18),
            21 => ("iq3_s", 256, 110),
            22 => ("iq2_s", 256, 82),
            23 => ("iq4_xs", 256, 136),
            24 => ("i8", 1, 1),
            25 => ("i16", 1, 2),
            26 => ("i32", 1, 4),
            27 => ("i64", 1, 8),
            28 => ("f64", 1, 8),
            29 => ("iq1_m", 256, 56),
            30 => ("bf16", 1, 2),
            34 => ("tq1_0", 256, 54),
            35 => ("tq2_0", 256, 66),
            39 => ("mxfp4", 32, 17),
            40 => ("nvfp4", 64, 36),
            41 => ("q1_0", 128, 18),
            42 => ("q2_0", 64, 18),
            _ => return None,
        };
        Some(Self { name, block_elements, block_bytes })
    }

    /// Whether ggml can multiply by weights of this type; it calls a null pointer for the others.
    fn is_weight(self) -> bool {
        !matches!(self.name, "q8_1" | "q8_K" | "i8" | "i16" | "i64" | "f64")
    }
}

/// What the header says of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name.
    pub name: String,
    /// Its dimensions, innermost first; missing ones are 1.
    pub dimensions: [u64; MAX_DIMENSIONS as usize],
    /// How its elements are stored.
    pub kind: TensorType,
    /// Where its data starts, counted from [`Header::data_offset`].
    pub offset: u64,
    /// Bytes of its data.
    pub bytes: u64,
}

/// A checked header.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// What tensor data is aligned to.
    pub alignment: u64,
    /// Keys and values in the order of the file.
    pub metadata: Vec<(String, Value)>,
    /// Tensors in the order of the file.
    pub tensors: Vec<TensorInfo>,
    /// Where the tensor data starts.
    pub data_offset: u64,
    /// Bytes of the whole file.
    pub file_size: u64,
}

impl Header {
    /// Reads the header of one file and applies every rule that needs no knowledge of models.
    ///
    /// # Errors
    /// The path is not a readable regular file, or its content breaks a rule of GGUF.
    pub fn read(path: &Path) -> Result<Self, GgufError> {
        let (file, size) = open_regular(path)?;
        Self::parse(&mut BufReader::with_capacity(1 << 16, file), size).map_err(|error| match error {
            ReadError::Io(source) => GgufError::Io { path: path.to_owned(), source },
            ReadError::Problem(problem) => malformed(path, problem),
        })
    }

    /// Reads the header of a file of `size` bytes of which only the first are here, as when it is read over a network;
    /// `None` if the header goes on after them. `name` is what messages call the file.
    ///
    /// # Errors
    /// The content breaks a rule of GGUF.
    pub fn read_start(start: &[u8], size: u64, name: &Path) -> Result<Option<Self>, GgufError> {
        match Self::parse(&mut Start(start), size) {
            Ok(header) => Ok(Some(header)),
            // Nothing but `Start` fails here.
            Err(ReadError::Io(_)) => Ok(None),
            Err(ReadError::Problem(problem)) => Err(malformed(name, problem)),
        }
    }

    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    /// The architecture's name, as in `general.architecture`.
    #[must_use]
    pub fn architecture(&self) -> Option<&str> {
        self.get("general.architecture")?.as_str()
    }

    /// Number of files that the model is split over; 1 if it is not.
    #[must_use]
    pub fn split_count(&self) -> u32 {
        match self.get("split.count") {
            Some(Value::U16(count)) => u32::from(*count).max(1),
            _ => 1,
        }
    }

    /// Bytes of all tensors of this file, without padding.
    #[must_use]
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.bytes).sum()
    }

    fn parse(input: &mut dyn BufRead, size: u64) -> Result<Self, ReadError> {
        let mut reader = Reader { input, position: 0, size };
        reader.magic()?;
        let version = reader.version()?;
        let n_tensors = reader.count("the number of tensors", MAX_TENSORS, SMALLEST_TENSOR)?;
        let n_pairs = reader.count("the number of keys", MAX_PAIRS, SMALLEST_PAIR)?;
        let metadata = reader.pairs(n_pairs)?;
        let alignment = alignment(&metadata)?;
        let tensors = reader.tensors(n_tensors)?;
        let data_offset = data_offset(reader.position, alignment, !tensors.is_empty());
        let header = Self { version, alignment, metadata, tensors, data_offset, file_size: size };
        check_layout(&header)?;
        Ok(header)
    }
}

/// Checks a model file, and all its parts if it is split, for everything that llama.cpp is known to refuse or to die
/// of. `overrides` are the metadata overrides that will be passed to llama.cpp, which replace scalars of the file.
///
/// # Errors
/// A rule is broken; the message names it.
pub fn check_model_file(path: &Path, vocab_only: bool, overrides: &[(String, Value)]) -> Result<Header, GgufError> {
    let header = Header::read(path)?;
    check_first_part(path, &header)?;
    let facts = Facts { header: &header, overrides };
    check_metadata(&facts, vocab_only).map_err(|problem| malformed(path, problem))?;
    let mut names = HashSet::new();
    check_part_tensors(path, &header, &mut names, vocab_only)?;
    for part in 1..header.split_count() {
        check_further_part(path, part, header.split_count(), &mut names, vocab_only)?;
    }
    check_tensor_total(&header, names.len(), vocab_only).map_err(|problem| malformed(path, problem))?;
    Ok(header)
}

/// Checks a LoRA adapter's file: llama.cpp reads its keys without looking at their types.
///
/// # Errors
/// A rule is broken; the message names it.
pub fn check_adapter_file(path: &Path) -> Result<Header, GgufError> {
    let header = Header::read(path)?;
    check_adapter(&header).map_err(|problem| malformed(path, problem))?;
    Ok(header)
}

impl From<GgufError> for Error {
    fn from(error: GgufError) -> Self {
        match error {
            GgufError::NotFound(_) => Self::ModelNotFound(error.to_string()),
            _ => Self::ModelLoad(error.to_string()),
        }
    }
}

fn malformed(path: &Path, problem: Problem) -> GgufError {
    GgufError::Malformed { path: path.to_owned(), problem }
}

// ---------------------------------------------------------------------------------------------------- files

/// Opens a regular file without ever blocking; looks twice, because the path can change between the looks.
fn open_regular(path: &Path) -> Result<(File, u64), GgufError> {
    let failed = |source: io::Error| io_error(path, source);
    check_regular(path, &std::fs::metadata(path).map_err(failed)?)?;
    let mut options = OpenOptions::new();
    let file = options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    check_regular(path, &metadata)?;
    Ok((file, metadata.len()))
}

fn io_error(path: &Path, source: io::Error) -> GgufError {
    match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => GgufError::NotFound(path.to_owned()),
        _ => GgufError::Io { path: path.to_owned(), source },
    }
}

fn check_regular(path: &Path, metadata: &Metadata) -> Result<(), GgufError> {
    let kind = metadata.file_type();
    if kind.is_file() {
        return Ok(());
    }
    if kind.is_dir() {
        return Err(GgufError::Directory(path.to_owned()));
    }
    let kind = match () {
        () if kind.is_fifo() => "FIFO",
        () if kind.is_socket() => "socket",
        () if kind.is_block_device() || kind.is_char_device() => "device",
        () => "special file",
    };
    Err(GgufError::NotRegular { path: path.to_owned(), kind })
}

// -------------------------------------------------------------------------------------------------- reading

/// Why reading stopped.
#[derive(Debug)]
enum ReadError {
    Io(io::Error),
    Problem(Problem),
}

impl From<Problem> for ReadError {
    fn from(problem: Problem) -> Self {
        Self::Problem(problem)
    }
}

/// The first bytes of a file: reading past them fails, but not as the end of the file would.
struct Start<'a>(&'a [u8]);

impl Read for Start<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.fill_buf()?;
        self.0.read(buffer)
    }
}

impl BufRead for Start<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.0.is_empty() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(self.0) }
    }

    fn consume(&mut self, amount: usize) {
        self.0.consume(amount);
    }
}

/// Little-endian reading that knows where the file ends.
struct Reader<'a> {
    input: &'a mut dyn BufRead,
    position: u64,
    size: u64,
}

impl Reader<'_> {
    fn remaining(&self) -> u64 {
        self.size.saturating_sub(self.position)
    }

    /// Every read asks here first, so nothing is allocated or read beyond the file's end.
    fn reserve(&self, needed: u64, what: &dyn Fn() -> String) -> Result<(), Problem> {
        if needed > self.remaining() {
            return Err(self.truncated(needed, what));
        }
        if self.position + needed > MAX_HEADER_BYTES {
            return Err(Problem::HeaderTooLong(what()));
        }
        Ok(())
    }

    fn truncated(&self, needed: u64, what: &dyn Fn() -> String) -> Problem {
        Problem::Truncated { what: what(), offset: self.position, needed, size: self.size }
    }

    /// The file may have been cut since its size was read.
    fn ended(&self, error: io::Error, needed: u64, what: &dyn Fn() -> String) -> ReadError {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => self.truncated(needed, what).into(),
            _ => ReadError::Io(error),
        }
    }

    fn array<const N: usize>(&mut self, what: &dyn Fn() -> String) -> Result<[u8; N], ReadError> {
        self.reserve(N as u64, what)?;
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes).map_err(|error| self.ended(error, N as u64, what))?;
        self.position += N as u64;
        Ok(bytes)
    }

    fn u32(&mut self, what: &dyn Fn() -> String) -> Result<u32, ReadError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &dyn Fn() -> String) -> Result<u64, ReadError> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn skip(&mut self, length: u64, what: &dyn Fn() -> String) -> Result<(), ReadError> {
        self.reserve(length, what)?;
        let skipped = io::copy(&mut self.input.take(length), &mut io::sink()).map_err(ReadError::Io)?;
        if skipped < length {
            return Err(self.truncated(length, what).into());
        }
        self.position += length;
        Ok(())
    }

    fn bytes(&mut self, length: u64, what: &dyn Fn() -> String) -> Result<Vec<u8>, ReadError> {
        self.reserve(length, what)?;
        let mut bytes = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
        self.input.read_exact(&mut bytes).map_err(|error| self.ended(error, length, what))?;
        self.position += length;
        Ok(bytes)
    }

    fn string(&mut self, limit: u64, what: &dyn Fn() -> String) -> Result<Vec<u8>, ReadError> {
        let length = self.u64(what)?;
        // A length beyond the end is the likelier story than a long string, and the better message.
        self.reserve(length, what)?;
        if length > limit {
            return Err(Problem::TooLong { what: what(), length, limit }.into());
        }
        self.bytes(length, what)
    }

    /// A key or a tensor's name. llama.cpp compares them as C strings, so a NUL would hide the rest.
    fn name(&mut self, limit: u64, what: &dyn Fn() -> String) -> Result<String, ReadError> {
        let fault = |fault| Problem::Name { what: what(), fault }.into();
        let bytes = self.string(limit, what)?;
        let name = String::from_utf8(bytes).map_err(|_| fault("is not valid UTF-8"))?;
        if name.is_empty() {
            return Err(fault("is empty"));
        }
        if name.contains('\0') {
            return Err(fault("holds a NUL byte"));
        }
        Ok(name)
    }

    fn magic(&mut self) -> Result<(), ReadError> {
        if self.size == 0 {
            return Err(Problem::Empty.into());
        }
        let start = self.input.fill_buf().map_err(ReadError::Io)?;
        let start = &start[..start.len().min(SNIFFED_BYTES)];
        if !start.starts_with(&b"GGUF"[..start.len().min(4)]) {
            return Err(wrong_magic(start).into());
        }
        self.array::<4>(&|| "the magic".into()).map(drop)
    }

    fn version(&mut self) -> Result<u32, ReadError> {
        let version = self.u32(&|| "the version".into())?;
        let hint = match version {
            2 | 3 => return Ok(version),
            1 => "; convert the model again with a current llama.cpp",
            _ if version.trailing_zeros() >= 16 && version != 0 => {
                "; the number looks byte-swapped, so this is a big-endian file: use the little-endian one"
            }
            _ if version > 3 => "; the file is newer than this llama.cpp, or damaged",
            _ => "; the file is damaged",
        };
        Err(Problem::Version { version, hint }.into())
    }

    /// A count of entries, none of which can be smaller than `least_bytes`.
    fn count(&mut self, what: &str, cap: u64, least_bytes: u64) -> Result<u64, ReadError> {
        let count = self.u64(&|| what.into())?;
        let room = self.remaining() / least_bytes;
        let (limit, reason) =
            if room < cap { (room, " in what is left of the file") } else { (cap, " in a sensible model") };
        if count > limit {
            return Err(Problem::TooMany { what: what.into(), count, limit, reason }.into());
        }
        Ok(count)
    }

    fn pairs(&mut self, count: u64) -> Result<Vec<(String, Value)>, ReadError> {
        let mut seen = HashSet::new();
        let mut pairs = Vec::new();
        for index in 0..count {
            let key = self.name(MAX_KEY_BYTES, &|| format!("key {index}"))?;
            if !seen.insert(key.clone()) {
                return Err(Problem::DuplicateKey(key).into());
            }
            let value = self.value(&key)?;
            pairs.push((key, value));
        }
        Ok(pairs)
    }

    fn value_type(&mut self, key: &str) -> Result<ValueType, ReadError> {
        let kind = self.u32(&|| format!("the type of key {key:?}"))?;
        ValueType::from_number(kind).ok_or_else(|| Problem::ValueType { key: key.into(), kind }.into())
    }

    fn value(&mut self, key: &str) -> Result<Value, ReadError> {
        match self.value_type(key)? {
            ValueType::Array => self.array_value(key),
            kind => self.scalar(key, kind),
        }
    }

    fn scalar(&mut self, key: &str, kind: ValueType) -> Result<Value, ReadError> {
        let what: &dyn Fn() -> String = &|| format!("the value of key {key:?}");
        Ok(match kind {
            ValueType::U8 => Value::U8(u8::from_le_bytes(self.array(what)?)),
            ValueType::I8 => Value::I8(i8::from_le_bytes(self.array(what)?)),
            ValueType::U16 => Value::U16(u16::from_le_bytes(self.array(what)?)),
            ValueType::I16 => Value::I16(i16::from_le_bytes(self.array(what)?)),
            ValueType::U32 => Value::U32(u32::from_le_bytes(self.array(what)?)),
            ValueType::I32 => Value::I32(i32::from_le_bytes(self.array(what)?)),
            ValueType::F32 => Value::F32(f32::from_le_bytes(self.array(what)?)),
            ValueType::U64 => Value::U64(u64::from_le_bytes(self.array(what)?)),
            ValueType::I64 => Value::I64(i64::from_le_bytes(self.array(what)?)),
            ValueType::F64 => Value::F64(f64::from_le_bytes(self.array(what)?)),
            ValueType::Bool => Value::Bool(self.array(what)? != [0u8]),
            ValueType::String => {
                Value::String(String::from_utf8_lossy(&self.string(MAX_STRING_BYTES, what)?).into_owned())
            }
            ValueType::Array => return Err(Problem::NestedArray { key: key.into() }.into()),
        })
    }

    fn array_value(&mut self, key: &str) -> Result<Value, ReadError> {
        let element = self.value_type(key)?;
        if element == ValueType::Array {
            return Err(Problem::NestedArray { key: key.into() }.into());
        }
        let what = format!("the length of array {key:?}");
        let len = self.count(&what, MAX_ARRAY_LENGTH, element.least_bytes())?;
        let mut integers = None;
        match element {
            ValueType::String if key == TOKENS_KEY => self.tokens(len)?,
            ValueType::String => self.skip_strings(key, len)?,
            _ if len <= KEPT_INTEGERS && (element.is_integer() || element == ValueType::Bool) => {
                integers = Some(self.integers(key, element, len)?);
            }
            _ => self.skip(len * element.least_bytes(), &|| format!("array {key:?}"))?,
        }
        Ok(Value::Array { element, len, integers })
    }

    fn integers(&mut self, key: &str, element: ValueType, len: u64) -> Result<Vec<i128>, ReadError> {
        let number = |value| match value {
            Value::Bool(value) => i128::from(value),
            value => value.as_integer().unwrap_or_default(),
        };
        (0..len).map(|_| self.scalar(key, element).map(number)).collect()
    }

    fn skip_strings(&mut self, key: &str, len: u64) -> Result<(), ReadError> {
        for index in 0..len {
            let what: &dyn Fn() -> String = &|| format!("string {index} of array {key:?}");
            let length = self.u64(what)?;
            self.skip(length, what)?;
        }
        Ok(())
    }

    /// llama.cpp asserts that no token occurs twice; it gives empty ones a text of their own.
    fn tokens(&mut self, len: u64) -> Result<(), ReadError> {
        if len > MAX_VOCABULARY {
            let what = format!("the length of array {TOKENS_KEY:?}");
            let reason = " in a sensible model";
            return Err(Problem::TooMany { what, count: len, limit: MAX_VOCABULARY, reason }.into());
        }
        let mut seen = std::collections::HashMap::new();
        for index in 0..len {
            let mut token = self.string(MAX_KEY_BYTES, &|| format!("token {index}"))?;
            if token.is_empty() {
                token = format!("[EMPTY_{index}]").into_bytes();
            }
            if let Some(first) = seen.get(&token) {
                let text = String::from_utf8_lossy(&token).into_owned();
                return Err(Problem::DuplicateToken { text, first: *first, second: index }.into());
            }
            seen.insert(token, index);
        }
        Ok(())
    }

    fn tensors(&mut self, count: u64) -> Result<Vec<TensorInfo>, ReadError> {
        let mut seen = HashSet::new();
        let mut tensors = Vec::new();
        for index in 0..count {
            let tensor = self.tensor(index)?;
            if !seen.insert(tensor.name.clone()) {
                return Err(Problem::DuplicateTensor(tensor.name).into());
            }
            tensors.push(tensor);
        }
        Ok(tensors)
    }

    fn tensor(&mut self, index: u64) -> Result<TensorInfo, ReadError> {
        let name = self.name(MAX_TENSOR_NAME_BYTES, &|| format!("the name of tensor {index}"))?;
        let what: &dyn Fn() -> String = &|| format!("the description of tensor {name:?}");
        let dimensions = self.dimensions(&name, what)?;
        let number = self.u32(what)?;
        let kind = TensorType::from_number(number).ok_or_else(|| unknown_type(&name, number))?;
        let bytes = tensor_size(&name, dimensions, kind)?;
        let offset = self.u64(what)?;
        Ok(TensorInfo { name, dimensions, kind, offset, bytes })
    }

    fn dimensions(
        &mut self,
        name: &str,
        what: &dyn Fn() -> String,
    ) -> Result<[u64; MAX_DIMENSIONS as usize], ReadError> {
        let count = self.u32(what)?;
        if count > MAX_DIMENSIONS {
            return Err(
                bad_tensor(name, format!("has {count} dimensions, at most {MAX_DIMENSIONS} are allowed")).into()
            );
        }
        let mut dimensions = [1; MAX_DIMENSIONS as usize];
        for dimension in dimensions.iter_mut().take(count as usize) {
            *dimension = self.u64(what)?;
        }
        Ok(dimensions)
    }
}

fn wrong_magic(start: &[u8]) -> Problem {
    let found = &start[..start.len().min(8)];
    Problem::Magic { found: format!("\"{}\"", found.escape_ascii()), hint: magic_hint(start) }
}

/// What people mistake for a GGUF file.
fn magic_hint(start: &[u8]) -> &'static str {
    let text = start.trim_ascii_start().to_ascii_lowercase();
    let begins = |prefix: &[u8]| start.starts_with(prefix);
    if begins(b"FUGG") {
        "; it is byte-swapped, for a big-endian machine: use the little-endian file"
    } else if [b"lmgg", b"tjgg", b"fmgg", b"algg", b"GGML", b"GGJT"].iter().any(|magic| begins(*magic)) {
        "; this is an old GGML/GGJT model from before GGUF: convert the original model again"
    } else if text.starts_with(b"version https://git-lfs") {
        "; this is a git-lfs pointer, not the model: run \"git lfs pull\""
    } else if text.starts_with(b"<!doctype") || text.starts_with(b"<html") || text.starts_with(b"<?xml") {
        "; this is a web page, probably an error saved in place of the download: download it again"
    } else if start.get(8) == Some(&b'{') {
        "; this looks like safetensors: convert it with llama.cpp's convert_hf_to_gguf.py"
    } else if begins(b"PK\x03\x04") {
        "; this is a zip archive or a PyTorch checkpoint: unpack it, or convert it to GGUF"
    } else if begins(b"\x1f\x8b") || begins(b"\x28\xb5\x2f\xfd") {
        "; this is a compressed file: unpack it first"
    } else if start.iter().all(|byte| *byte == 0) {
        "; it starts with zeros, as an unfinished download does: download it again"
    } else {
        "; give a model in GGUF format"
    }
}

// --------------------------------------------------------------------------------------------------- layout

fn bad_tensor(name: &str, fault: String) -> Problem {
    Problem::Tensor { name: name.into(), fault }
}

fn unknown_type(name: &str, number: u32) -> Problem {
    let fault = match number {
        4 | 5 => "was removed from ggml in 2023; quantise the original model again",
        31..=33 => "was removed from ggml; use a Q4_0 file, which is repacked when loaded",
        36..=38 => "was removed from ggml; use an IQ4_NL file, which is repacked when loaded",
        _ => "is unknown to this llama.cpp; the file is newer, or damaged",
    };
    bad_tensor(name, format!("has type {number}, which {fault}"))
}

fn tensor_size(name: &str, dimensions: [u64; MAX_DIMENSIONS as usize], kind: TensorType) -> Result<u64, Problem> {
    if dimensions.contains(&0) {
        return Err(bad_tensor(name, format!("has a dimension of 0 in {dimensions:?}; each must be at least 1")));
    }
    let elements = dimensions.iter().try_fold(1u64, |product, dimension| product.checked_mul(*dimension));
    let Some(elements) = elements.filter(|elements| i64::try_from(*elements).is_ok()) else {
        return Err(bad_tensor(name, format!("has shape {dimensions:?}, more than {} elements", i64::MAX)));
    };
    if !dimensions[0].is_multiple_of(kind.block_elements) {
        let (TensorType { name: kind, block_elements, .. }, row) = (kind, dimensions[0]);
        return Err(bad_tensor(name, format!("has rows of {row}, but {kind} needs a multiple of {block_elements}")));
    }
    let bytes = u128::from(elements / kind.block_elements) * u128::from(kind.block_bytes);
    u64::try_from(bytes).map_err(|_| bad_tensor(name, format!("has shape {dimensions:?}, {bytes} bytes: too many")))
}

fn alignment(metadata: &[(String, Value)]) -> Result<u64, Problem> {
    let key = "general.alignment";
    match metadata.iter().find(|(name, _)| name == key) {
        None => Ok(DEFAULT_ALIGNMENT),
        Some((_, Value::U32(alignment))) => {
            let alignment = u64::from(*alignment);
            if alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT {
                return Ok(alignment);
            }
            Err(bad_value(key, format!("is {alignment}; it must be a power of two from 1 to {MAX_ALIGNMENT}")))
        }
        Some((_, value)) => Err(bad_value(key, format!("is of type {:?}; it must be U32", value.kind()))),
    }
}

/// Only a file with tensors is padded.
fn data_offset(end: u64, alignment: u64, padded: bool) -> u64 {
    if padded { end.next_multiple_of(alignment) } else { end }
}

/// Tensors must follow one another without gaps but the padding, and end within the file.
fn check_layout(header: &Header) -> Result<(), Problem> {
    let available = header.file_size.checked_sub(header.data_offset).ok_or_else(|| Problem::Truncated {
        what: "the padding before the tensor data".into(),
        offset: header.data_offset,
        needed: 1,
        size: header.file_size,
    })?;
    let mut expected = 0u64;
    for tensor in &header.tensors {
        check_place(tensor, header, expected, available)?;
        // Within the file, so it cannot overflow.
        expected = (tensor.offset + tensor.bytes).next_multiple_of(header.alignment);
    }
    Ok(())
}

fn check_place(tensor: &TensorInfo, header: &Header, expected: u64, available: u64) -> Result<(), Problem> {
    let (offset, alignment) = (tensor.offset, header.alignment);
    if !offset.is_multiple_of(alignment) {
        return Err(bad_tensor(
            &tensor.name,
            format!("has offset {offset}, not a multiple of the alignment {alignment}"),
        ));
    }
    if offset != expected {
        return Err(bad_tensor(&tensor.name, format!("has offset {offset}, but {expected} follows the tensor before")));
    }
    if offset.checked_add(tensor.bytes).is_none_or(|end| end > available) {
        return Err(Problem::Truncated {
            what: format!("tensor {:?}", tensor.name),
            offset: header.data_offset.saturating_add(offset),
            needed: tensor.bytes,
            size: header.file_size,
        });
    }
    Ok(())
}

// ------------------------------------------------------------------------------------------------- metadata

fn bad_value(key: &str, fault: String) -> Problem {
    Problem::Metadata { key: key.into(), fault }
}

/// The metadata as llama.cpp will see it: an override replaces a scalar of its kind, or adds it.
struct Facts<'a> {
    header: &'a Header,
    overrides: &'a [(String, Value)],
}

impl<'a> Facts<'a> {
    fn override_of(&self, key: &str) -> Option<&'a Value> {
        self.overrides.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    fn string(&self, key: &str) -> Result<Option<&'a str>, Problem> {
        if let Some(Value::String(text)) = self.override_of(key) {
            return Ok(Some(text));
        }
        match self.header.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(value) => Err(bad_value(key, format!("is of type {:?}; it must be a string", value.kind()))),
        }
    }

    /// llama.cpp reads integers as U32 and nothing else; an override is cut to 32 bits without a word.
    fn integer(&self, key: &str) -> Result<Option<u64>, Problem> {
        if let Some(number) = self.override_of(key).and_then(Value::as_integer) {
            return as_u32(key, number).map(Some);
        }
        match self.header.get(key) {
            None => Ok(None),
            Some(Value::U32(number)) => Ok(Some(u64::from(*number))),
            Some(value) => Err(bad_value(key, format!("is of type {:?}; it must be U32", value.kind()))),
        }
    }

    /// A float that, when there, must be finite and at least 0: a norm's epsilon aborts otherwise.
    fn not_negative(&self, key: &str) -> Result<(), Problem> {
        let value = match self.override_of(key).or_else(|| self.header.get(key)) {
            Some(Value::F32(value)) => f64::from(*value),
            Some(Value::F64(value)) => *value,
            _ => return Ok(()),
        };
        // As llama.cpp computes with it.
        if !(value as f32).is_finite() || value < 0.0 {
            return Err(bad_value(key, format!("is {value}; it must be a finite number of at least 0")));
        }
        Ok(())
    }

    /// An integer that, when there, must be in a range.
    fn ranged(&self, key: &str, least: u64, most: u64) -> Result<Option<u64>, Problem> {
        let number = self.integer(key)?;
        if let Some(value) = number.filter(|value| !(least..=most).contains(value)) {
            return Err(bad_value(key, format!("is {value}; it must be from {least} to {most}")));
        }
        Ok(number)
    }

    fn required(&self, key: &str, least: u64, most: u64) -> Result<u64, Problem> {
        self.ranged(key, least, most)?
            .ok_or_else(|| missing(key, "a model that is to be run has it under its architecture's name"))
    }

    /// One integer for all layers, or an array with one for each.
    fn per_layer(&self, key: &str, layers: u64, most: u64) -> Result<Option<Vec<u64>>, Problem> {
        let (element, len, integers) = match self.header.get(key) {
            // llama.cpp looks for these in the file first: an override alone does not add them.
            None => return Ok(None),
            Some(Value::Array { element, len, integers }) => (element, len, integers),
            Some(_) => return Ok(self.ranged(key, 0, most)?.map(|value| vec![value])),
        };
        if *len != layers {
            return Err(bad_value(key, format!("has {len} elements; it must have one for each of {layers} layers")));
        }
        if !matches!(element, ValueType::U32 | ValueType::I32 | ValueType::Bool) {
            return Err(bad_value(key, format!("is an array of {element:?}; it must be of U32 or I32")));
        }
        let values = integers.iter().flatten().map(|number| as_u32(key, *number));
        let values = values.collect::<Result<Vec<_>, _>>()?;
        match values.iter().find(|value| **value > most) {
            Some(value) => Err(bad_value(key, format!("holds {value}; at most {most} is allowed"))),
            None => Ok(Some(values)),
        }
    }
}

fn as_u32(key: &str, number: i128) -> Result<u64, Problem> {
    match u32::try_from(number) {
        Ok(number) => Ok(u64::from(number)),
        Err(_) => Err(bad_value(key, format!("is {number}; it must be from 0 to {}", u32::MAX))),
    }
}

fn missing(key: &str, hint: &'static str) -> Problem {
    Problem::MissingKey { key: key.into(), hint }
}

/// What an override can replace: llama.cpp ignores one of another class, and all of arrays.
fn class(value: &Value) -> &'static str {
    match value {
        Value::Bool(_) => "a boolean",
        Value::F32(_) | Value::F64(_) => "a float",
        Value::String(_) => "a string",
        Value::Array { .. } => "an array",
        _ => "an integer",
    }
}

fn check_override(header: &Header, key: &str, value: &Value) -> Result<(), Problem> {
    match header.get(key) {
        Some(Value::Array { .. }) => Err(bad_value(key, "is an array, which cannot be overridden".into())),
        Some(there) if class(there) != class(value) => Err(bad_value(
            key,
            format!("is {} in the file; an override with {} has no effect", class(there), class(value)),
        )),
        _ => Ok(()),
    }
}

fn check_metadata(facts: &Facts<'_>, vocab_only: bool) -> Result<(), Problem> {
    for (key, value) in facts.overrides {
        check_override(facts.header, key, value)?;
    }
    if let Some((key, _)) = facts.overrides.iter().find(|(key, _)| key.starts_with("split.")) {
        // It would make llama.cpp open other files than those that were checked.
        return Err(bad_value(key, "cannot be overridden".into()));
    }
    let key = "general.architecture";
    let architecture = facts.string(key)?.ok_or_else(|| missing(key, "a model file names its architecture there"))?;
    match architecture {
        "" => {
            return Err(bad_value(key, "is empty; it must name the model's architecture".into()));
        }
        "clip" => {
            return Err(bad_value(key, "is \"clip\": this is a vision projector; load the language model".into()));
        }
        _ => {}
    }
    check_vocabulary(facts)?;
    if vocab_only {
        return Ok(());
    }
    let layers = check_dimensions(facts, architecture)?;
    check_heads(facts, architecture, layers)?;
    check_experts(facts, architecture, layers)?;
    check_choices(facts, architecture)
}

fn check_vocabulary(facts: &Facts<'_>) -> Result<(), Problem> {
    let key = "tokenizer.ggml.model";
    let model = facts.string(key)?.ok_or_else(|| missing(key, "models without a tokenizer cannot be used"))?;
    if matches!(model, "none" | "no_vocab") {
        return Err(bad_value(key, format!("is {model:?}; models without a tokenizer cannot be used")));
    }
    check_pretokenizer(facts, model)?;
    let tokens = string_array(facts.header, TOKENS_KEY)?;
    let tokens = tokens.ok_or_else(|| missing(TOKENS_KEY, "models without a vocabulary cannot be used"))?;
    if tokens == 0 {
        return Err(bad_value(TOKENS_KEY, "is empty; a vocabulary has at least one token".into()));
    }
    string_array(facts.header, "tokenizer.ggml.merges")?;
    check_per_token(facts.header, "tokenizer.ggml.scores", tokens, &[ValueType::F32, ValueType::I32])?;
    check_per_token(facts.header, "tokenizer.ggml.token_type", tokens, &[ValueType::I32])
}

/// Merges of `gpt2` vocabularies abort the process on a space, which only the expressions of this one let through.
fn check_pretokenizer(facts: &Facts<'_>, model: &str) -> Result<(), Problem> {
    let key = "tokenizer.ggml.pre";
    if matches!(model, "gpt2" | "hybriddna") && facts.string(key)? == Some("whitespace") {
        return Err(bad_value(key, format!("is \"whitespace\"; a tokenizer of the kind {model:?} cannot have it")));
    }
    Ok(())
}

/// The length of an array of strings, if the key is there.
fn string_array(header: &Header, key: &str) -> Result<Option<u64>, Problem> {
    match header.get(key) {
        None => Ok(None),
        Some(Value::Array { element: ValueType::String, len, .. }) => Ok(Some(*len)),
        Some(Value::Array { element, .. }) => {
            Err(bad_value(key, format!("is an array of {element:?}; it must be of strings")))
        }
        Some(value) => Err(bad_value(key, format!("is of type {:?}; it must be an array of strings", value.kind()))),
    }
}

/// llama.cpp ignores surplus elements, and some converters pad, so only too few are refused.
fn check_per_token(header: &Header, key: &str, tokens: u64, allowed: &[ValueType]) -> Result<(), Problem> {
    match header.get(key) {
        None => Ok(()),
        Some(Value::Array { element, len, .. }) if allowed.contains(element) => {
            if *len < tokens {
                return Err(bad_value(key, format!("has {len} elements; the vocabulary has {tokens} tokens")));
            }
            Ok(())
        }
        Some(Value::Array { element, .. }) => {
            Err(bad_value(key, format!("is an array of {element:?}; it must be of {allowed:?}")))
        }
        Some(value) => Err(bad_value(key, format!("is of type {:?}; it must be an array", value.kind()))),
    }
}

/// Returns the number of layers.
fn check_dimensions(facts: &Facts<'_>, architecture: &str) -> Result<u64, Problem> {
    let key = |name: &str| format!("{architecture}.{name}");
    facts.required(&key("context_length"), 1, i32::MAX as u64)?;
    facts.required(&key("embedding_length"), 1, 1 << 20)?;
    let layers = facts.required(&key("block_count"), 1, MAX_LAYERS)?;
    facts.ranged(&key("nextn_predict_layers"), 0, layers)?;
    facts.ranged(&key("posnet.block_count"), 0, layers)?;
    facts.ranged(&key("convnext.block_count"), 0, layers)?;
    facts.ranged(&key("vocab_size"), 0, MAX_VOCABULARY)?;
    facts.per_layer(&key("feed_forward_length"), layers, 1 << 24)?;
    Ok(layers)
}

fn check_heads(facts: &Facts<'_>, architecture: &str, layers: u64) -> Result<(), Problem> {
    let kv_key = format!("{architecture}.attention.head_count_kv");
    let heads = facts.per_layer(&format!("{architecture}.attention.head_count"), layers, 1 << 16)?;
    let kv_heads = facts.per_layer(&kv_key, layers, 1 << 16)?;
    if let (Some(heads), Some(kv)) = (&heads, &kv_heads)
        && let Some((heads, kv)) = odd_heads(heads, kv)
    {
        return Err(bad_value(&kv_key, format!("is {kv}; it must divide the head count, {heads}")));
    }
    check_head_width(facts, architecture, heads.and_then(|heads| heads.first().copied()).unwrap_or(0))
}

/// The first layer whose key-value heads cannot be shared evenly; a single value stands for all layers.
fn odd_heads(heads: &[u64], kv: &[u64]) -> Option<(u64, u64)> {
    let of = |values: &[u64], layer: usize| values.get(layer).or(values.first()).copied().unwrap_or(0);
    (0..heads.len().max(kv.len()))
        .map(|layer| (of(heads, layer), of(kv, layer)))
        .find(|(heads, kv)| *kv != 0 && !heads.is_multiple_of(*kv))
}

/// Graphs assert how the widths of keys, values and rotation go together.
fn check_head_width(facts: &Facts<'_>, architecture: &str, heads: u64) -> Result<(), Problem> {
    let key = |name: &str| format!("{architecture}.{name}");
    let length = |name: &str| facts.ranged(&key(name), 0, 1 << 16);
    let widths = [length("attention.key_length")?, length("attention.value_length")?, length("rope.dimension_count")?];
    if !ONE_HEAD_WIDTH.contains(&architecture) {
        return Ok(());
    }
    if heads == 0 {
        return Err(bad_value(&key("attention.head_count"), "is 0 or missing; it must be at least 1".into()));
    }
    let default = facts.required(&key("embedding_length"), 1, 1 << 20)? / heads;
    let [keys, values, rotation] = widths;
    let keys = keys.unwrap_or(default);
    let (values, rotation) = (values.unwrap_or(default), rotation.unwrap_or(keys));
    if keys != values || keys != rotation || keys == 0 || !keys.is_multiple_of(2) {
        let fault = format!(
            "gives heads {keys} wide, with values {values} and rotation {rotation} wide; {architecture} needs one even width"
        );
        return Err(bad_value(&key("attention.key_length"), fault));
    }
    Ok(())
}

/// The assertions of `llama_model_base::load_hparams`.
fn check_experts(facts: &Facts<'_>, architecture: &str, layers: u64) -> Result<(), Problem> {
    let key = |name: &str| format!("{architecture}.{name}");
    let experts = facts.ranged(&key("expert_count"), 0, MAX_EXPERTS)?.unwrap_or(0);
    let used = facts.per_layer(&key("expert_used_count"), layers, MAX_EXPERTS)?.unwrap_or_default();
    let used = used.into_iter().max().unwrap_or(0);
    let groups = facts.integer(&key("expert_group_count"))?.unwrap_or(0);
    let groups_used = facts.integer(&key("expert_group_used_count"))?.unwrap_or(0);
    // llama.cpp takes a single expert of these for none.
    let none = experts == 0 || (experts == 1 && matches!(architecture, "hunyuan-dense" | "hunyuan_vl"));
    if none && (groups != 0 || (experts == 0 && used != 0)) {
        let fault = format!("is {experts}, but {used} experts and {groups} groups are to be used");
        return Err(bad_value(&key("expert_count"), fault));
    }
    if none {
        return Ok(());
    }
    if !(1..=experts).contains(&used) {
        return Err(bad_value(&key("expert_used_count"), format!("is {used}; it must be from 1 to {experts}")));
    }
    if groups >= experts || (groups > 1 && !experts.is_multiple_of(groups)) {
        let fault = format!("is {groups}; it must be less than, and divide, the expert count, {experts}");
        return Err(bad_value(&key("expert_group_count"), fault));
    }
    if groups > 1 && !(1..groups).contains(&groups_used) {
        let fault = format!("is {groups_used}; it must be from 1 to {}", groups - 1);
        return Err(bad_value(&key("expert_group_used_count"), fault));
    }
    Ok(())
}

/// Values of enumerations: unknown ones abort when they are used.
fn check_choices(facts: &Facts<'_>, architecture: &str) -> Result<(), Problem> {
    let scaling = format!("{architecture}.rope.scaling.type");
    if let Some(name) = facts.string(&scaling)?
        && !matches!(name, "none" | "linear" | "yarn" | "longrope")
    {
        let fault = format!("is {name:?}; it must be \"none\", \"linear\", \"yarn\" or \"longrope\"");
        return Err(bad_value(&scaling, fault));
    }
    facts.ranged(&format!("{architecture}.pooling_type"), 0, 4)?;
    facts.ranged(&format!("{architecture}.classifier.pooling_type"), 0, 4)?;
    for norm in ["layer_norm_epsilon", "layer_norm_rms_epsilon", "group_norm_epsilon"] {
        facts.not_negative(&format!("{architecture}.attention.{norm}"))?;
    }
    Ok(())
}

/// `llama_adapter_lora_init_impl` reads these without asking for their types.
fn check_adapter(header: &Header) -> Result<(), Problem> {
    let expected = [
        ("general.type", ValueType::String),
        ("general.architecture", ValueType::String),
        ("adapter.type", ValueType::String),
        ("adapter.lora.alpha", ValueType::F32),
        ("adapter.alora.invocation_tokens", ValueType::Array),
    ];
    for (key, kind) in expected {
        if let Some(found) = header.get(key).map(Value::kind).filter(|found| *found != kind) {
            return Err(bad_value(key, format!("is of type {found:?}; it must be {kind:?}")));
        }
    }
    if header.get("general.type").and_then(Value::as_str) != Some("adapter") {
        return Err(missing_adapter(header));
    }
    if header.tensors.is_empty() { Err(Problem::NoTensors) } else { Ok(()) }
}

fn missing_adapter(header: &Header) -> Problem {
    let found = header.get("general.type").and_then(Value::as_str).unwrap_or("");
    bad_value("general.type", format!("is {found:?}; a LoRA file has \"adapter\" there"))
}

// -------------------------------------------------------------------------------------------- split, tensors

/// The name of another part: `<name>-00002-of-00004.gguf`. `None` if the path is not named like that.
fn part_path(path: &Path, own: u64, wanted: u64, count: u64) -> Option<PathBuf> {
    let suffix = |part: u64| format!("-{:05}-of-{count:05}.gguf", part + 1);
    let stem = path.file_name()?.to_str()?.strip_suffix(&suffix(own))?;
    (!stem.is_empty()).then(|| path.with_file_name(format!("{stem}{}", suffix(wanted))))
}

fn wrong_split(path: &Path, text: String) -> GgufError {
    malformed(path, Problem::Split(text))
}

/// llama.cpp reads `split.no` of further parts without looking at its type.
fn split_number(path: &Path, header: &Header, key: &str) -> Result<Option<u64>, GgufError> {
    match header.get(key) {
        None => Ok(None),
        Some(Value::U16(number)) => Ok(Some(u64::from(*number))),
        Some(value) => {
            let fault = format!("is of type {:?}; it must be U16", value.kind());
            Err(malformed(path, bad_value(key, fault)))
        }
    }
}

fn check_first_part(path: &Path, header: &Header) -> Result<(), GgufError> {
    let count = split_number(path, header, "split.count")?.unwrap_or(1);
    let own = split_number(path, header, "split.no")?;
    if count <= 1 {
        return Ok(());
    }
    let own = own.ok_or_else(|| malformed(path, missing("split.no", "every part of a split model has it")))?;
    let Some(first) = part_path(path, own, 0, count) else {
        let wanted = format!("<name>-{:05}-of-{count:05}.gguf", own + 1);
        return Err(wrong_split(path, format!("part {} of {count} of a split model must be named {wanted}", own + 1)));
    };
    if own != 0 {
        return Err(malformed(path, Problem::NotFirstPart { part: own + 1, count, first }));
    }
    Ok(())
}

fn check_further_part(
    first: &Path,
    part: u32,
    count: u32,
    names: &mut HashSet<String>,
    vocab_only: bool,
) -> Result<(), GgufError> {
    let number = u64::from(part);
    let Some(path) = part_path(first, 0, number, u64::from(count)) else {
        return Err(wrong_split(first, "the parts of a split model must be named <name>-00001-of-…".into()));
    };
    let header = match Header::read(&path) {
        Err(GgufError::NotFound(path)) => {
            let text = format!("part {} of {count} is missing: {}", number + 1, path.display());
            return Err(wrong_split(first, text));
        }
        other => other?,
    };
    if split_number(&path, &header, "split.no")? != Some(number) {
        return Err(wrong_split(&path, format!("its split.no must be {number}, for part {} of {count}", number + 1)));
    }
    check_part_tensors(&path, &header, names, vocab_only)
}

fn check_part_tensors(
    path: &Path,
    header: &Header,
    names: &mut HashSet<String>,
    vocab_only: bool,
) -> Result<(), GgufError> {
    for tensor in &header.tensors {
        if !vocab_only {
            check_usable(header, tensor).map_err(|problem| malformed(path, problem))?;
        }
        if !names.insert(tensor.name.clone()) {
            return Err(malformed(path, Problem::DuplicateTensor(tensor.name.clone())));
        }
    }
    Ok(())
}

fn check_tensor_total(header: &Header, total: usize, vocab_only: bool) -> Result<(), Problem> {
    let key = "split.tensors.count";
    if let Some(Value::I32(count)) = header.get(key).filter(|_| header.split_count() > 1)
        && usize::try_from(*count) != Ok(total)
    {
        return Err(bad_value(
            key,
            format!("is {count}, but the parts hold {total} tensors; some part is not the right one"),
        ));
    }
    if total == 0 && !vocab_only { Err(Problem::NoTensors) } else { Ok(()) }
}

/// What ggml's kernels assert about weights.
fn check_usable(header: &Header, tensor: &TensorInfo) -> Result<(), Problem> {
    let kind = tensor.kind.name;
    let fault = if !tensor.kind.is_weight() {
        format!("has type {kind}, which ggml cannot compute with")
    } else if must_be_f32(&tensor.name) && kind != TensorType::F32 {
        format!("has type {kind}; norms, biases and rotation factors must be f32")
    } else if tensor.dimensions[1..] == [1, 1, 1] && tensor.kind.block_elements > 1 {
        format!("has one dimension and type {kind}; vectors cannot be quantised")
    } else if !(header.data_offset + tensor.offset).is_multiple_of(MAPPED_ALIGNMENT) {
        let place = header.data_offset + tensor.offset;
        format!(
            "starts at byte {place}; weights must start at a multiple of {MAPPED_ALIGNMENT} (see general.alignment)"
        )
    } else {
        return Ok(());
    };
    Err(bad_tensor(&tensor.name, fault))
}

fn must_be_f32(name: &str) -> bool {
    name.ends_with("_norm.weight") || name.ends_with(".bias") || name.contains("rope_f")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Cursor;

    /// Writes GGUF files, sound ones and others.
    #[derive(Clone)]
    struct Writer {
        version: u32,
        pairs: Vec<(Vec<u8>, u32, Vec<u8>)>,
        tensors: Vec<(Vec<u8>, Vec<u64>, u32, u64)>,
        data: usize,
    }

    fn text(value: &[u8]) -> Vec<u8> {
        [&(value.len() as u64).to_le_bytes(), value].concat()
    }

    fn list(element: u32, values: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = element.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        bytes.extend(values.concat());
        bytes
    }

    impl Writer {
        fn empty() -> Self {
            Self { version: 3, pairs: vec![], tensors: vec![], data: 0 }
        }

        /// A model that passes every check.
        fn model() -> Self {
            let tokens = ["<s>", "</s>", "a", ""].map(|token| text(token.as_bytes()));
            Self::empty()
                .string("general.architecture", "llama")
                .string("tokenizer.ggml.model", "llama")
                .raw(TOKENS_KEY, 9, list(8, &tokens))
                .raw("tokenizer.ggml.scores", 9, list(6, &vec![vec![0; 4]; 4]))
                .u32("llama.context_length", 128)
                .u32("llama.embedding_length", 64)
                .u32("llama.block_count", 2)
                .u32("llama.attention.head_count", 4)
                .raw("llama.attention.head_count_kv", 9, list(4, &[2u32, 4].map(|n| n.to_le_bytes().to_vec())))
                .tensor("token_embd.weight", &[64, 4], 8)
                .tensor("output_norm.weight", &[64], 0)
        }

        fn vocabulary() -> Self {
            Self { tensors: vec![], data: 0, ..Self::model() }
        }

        /// Sets a key, replacing it if it is there.
        fn raw(mut self, key: &str, kind: u32, value: Vec<u8>) -> Self {
            self = self.without(key);
            self.pairs.push((key.into(), kind, value));
            self
        }

        fn without(mut self, key: &str) -> Self {
            self.pairs.retain(|(name, ..)| name != key.as_bytes());
            self
        }

        fn u32(self, key: &str, value: u32) -> Self {
            self.raw(key, 4, value.to_le_bytes().into())
        }

        fn u16(self, key: &str, value: u16) -> Self {
            self.raw(key, 2, value.to_le_bytes().into())
        }

        fn string(self, key: &str, value: &str) -> Self {
            self.raw(key, 8, text(value.as_bytes()))
        }

        fn alignment(&self) -> u64 {
            let found = self.pairs.iter().find(|(key, ..)| key == b"general.alignment");
            found.map_or(32, |(.., value)| u64::from(u32::from_le_bytes(value[..4].try_into().unwrap())).max(1))
        }

        /// Adds a tensor behind the others, with its data.
        fn tensor(mut self, name: &str, shape: &[u64], kind: u32) -> Self {
            let offset = (self.data as u64).next_multiple_of(self.alignment());
            let layout = TensorType::from_number(kind);
            let elements: u64 = shape.iter().fold(1, |product, size| product.saturating_mul(*size));
            let bytes = layout.map_or(0, |t| (elements / t.block_elements).saturating_mul(t.block_bytes));
            // Absurd sizes are claimed, not written.
            let bytes = bytes.min(1 << 20);
            self.tensors.push((name.into(), shape.into(), kind, offset));
            self.data = (offset + bytes) as usize;
            self
        }

        fn bytes(&self) -> Vec<u8> {
            let mut out = [b"GGUF".as_slice(), &self.version.to_le_bytes()].concat();
            out.extend((self.tensors.len() as u64).to_le_bytes());
            out.extend((self.pairs.len() as u64).to_le_bytes());
            for (key, kind, value) in &self.pairs {
                out.extend([&text(key), kind.to_le_bytes().as_slice(), value].concat());
            }
            for (name, shape, kind, offset) in &self.tensors {
                out.extend(text(name));
                out.extend((shape.len() as u32).to_le_bytes());
                shape.iter().for_each(|size| out.extend(size.to_le_bytes()));
                out.extend(kind.to_le_bytes());
                out.extend(offset.to_le_bytes());
            }
            if !self.tensors.is_empty() {
                out.resize(out.len().next_multiple_of(self.alignment() as usize) + self.data, 0);
            }
            out
        }

        fn write(&self, folder: &Path, name: &str) -> PathBuf {
            let path = folder.join(name);
            std::fs::write(&path, self.bytes()).unwrap();
            path
        }

        fn check(&self) -> Result<Header, GgufError> {
            self.check_with(false, &[])
        }

        fn check_with(&self, vocab_only: bool, overrides: &[(String, Value)]) -> Result<Header, GgufError> {
            let folder = tempfile::tempdir().unwrap();
            check_model_file(&self.write(folder.path(), "model.gguf"), vocab_only, overrides)
        }

        /// The message of the refusal.
        fn refusal(&self) -> String {
            self.check().expect_err("must be refused").to_string()
        }
    }

    fn parse(bytes: &[u8]) -> Result<Header, ReadError> {
        Header::parse(&mut Cursor::new(bytes), bytes.len() as u64)
    }

    fn problem(bytes: &[u8]) -> Problem {
        match parse(bytes) {
            Err(ReadError::Problem(problem)) => problem,
            other => panic!("not refused: {other:?}"),
        }
    }

    #[track_caller]
    fn assert_says(message: &str, parts: &[&str]) {
        for part in parts {
            assert!(message.contains(part), "{part:?} is not in {message:?}");
        }
    }

    #[test]
    fn a_sound_model_is_accepted_and_described() {
        let header = Writer::model().check().unwrap();
        assert_eq!((header.version, header.alignment, header.split_count()), (3, 32, 1));
        assert_eq!(header.architecture(), Some("llama"));
        assert_eq!(header.tensor_bytes(), 8 * 34 + 64 * 4);
        assert_eq!(header.get("llama.block_count"), Some(&Value::U32(2)));
        assert_eq!(header.get("no.such.key"), None);
        assert_eq!(header.tensors[1].offset, 288);
        assert!(header.data_offset.is_multiple_of(32));
    }

    #[test]
    fn version_2_is_accepted() {
        assert!(Writer { version: 2, ..Writer::model() }.check().is_ok());
    }

    #[test]
    fn every_scalar_type_is_read() {
        let writer = Writer::empty()
            .raw("u8", 0, vec![200])
            .raw("i8", 1, vec![255])
            .u16("u16", 7)
            .raw("i16", 3, (-2i16).to_le_bytes().into())
            .u32("u32", 9)
            .raw("i32", 5, (-3i32).to_le_bytes().into())
            .raw("f32", 6, 1.5f32.to_le_bytes().into())
            .raw("bool", 7, vec![2])
            .string("string", "text")
            .raw("u64", 10, u64::MAX.to_le_bytes().into())
            .raw("i64", 11, i64::MIN.to_le_bytes().into())
            .raw("f64", 12, 2.5f64.to_le_bytes().into());
        let values: Vec<Value> = parse(&writer.bytes()).unwrap().metadata.into_iter().map(|(_, value)| value).collect();
        let expected = [
            Value::U8(200),
            Value::I8(-1),
            Value::U16(7),
            Value::I16(-2),
            Value::U32(9),
            Value::I32(-3),
            Value::F32(1.5),
            Value::Bool(true),
            Value::String("text".into()),
            Value::U64(u64::MAX),
            Value::I64(i64::MIN),
            Value::F64(2.5),
        ];
        assert_eq!(values, expected);
    }

    #[test]
    fn a_missing_file_is_not_found() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(Header::read(&folder.path().join("no.gguf")), Err(GgufError::NotFound(_))));
    }

    #[test]
    fn a_directory_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert!(matches!(Header::read(folder.path()), Err(GgufError::Directory(_))));
    }

    #[test]
    fn a_fifo_is_refused_without_blocking() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo.gguf");
        assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
        assert!(matches!(Header::read(&path), Err(GgufError::NotRegular { kind: "FIFO", .. })));
    }

    #[test]
    fn a_socket_and_a_device_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(matches!(Header::read(&path), Err(GgufError::NotRegular { kind: "socket", .. })));
        assert!(matches!(Header::read(Path::new("/dev/zero")), Err(GgufError::NotRegular { kind: "device", .. })));
    }

    #[test]
    fn a_nul_in_the_path_is_an_error_of_reading() {
        assert!(matches!(Header::read(Path::new("a\0b")), Err(GgufError::Io { .. })));
    }

    #[test]
    fn an_empty_file_is_refused() {
        assert!(matches!(problem(b""), Problem::Empty));
    }

    #[test]
    fn other_formats_are_recognised() {
        let cases: [(&[u8], &str); 10] = [
            (b"FUGG\0\0\0\x03", "byte-swapped"),
            (b"tjgg\x03\0\0\0", "GGML/GGJT"),
            (b"PK\x03\x04....", "zip"),
            (b"\x40\0\0\0\0\0\0\0{\"a\":1}", "safetensors"),
            (b"  <!DOCTYPE html><html>", "web page"),
            (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
            (b"\x1f\x8b\x08\0", "compressed"),
            (&[0; 100], "unfinished download"),
            (b"hello, world", "\"hello, w\""),
            (b"x", "GGUF"),
        ];
        for (bytes, part) in cases {
            assert!(matches!(problem(bytes), Problem::Magic { .. }));
            assert_says(&problem(bytes).to_string(), &[part]);
        }
    }

    #[test]
    fn other_versions_are_refused() {
        for (version, part) in [(0, "damaged"), (1, "convert"), (4, "newer"), (3u32.swap_bytes(), "big-endian")] {
            let bytes = Writer { version, ..Writer::model() }.bytes();
            assert_says(&problem(&bytes).to_string(), &[&version.to_string(), part, "2 and 3"]);
        }
    }

    #[test]
    fn every_truncation_is_refused() {
        let bytes = Writer::model().bytes();
        for length in 0..bytes.len() {
            assert!(parse(&bytes[..length]).is_err(), "{length} bytes were accepted");
        }
    }

    #[test]
    fn a_truncation_names_the_place() {
        let bytes = Writer::model().bytes();
        let message = problem(&bytes[..bytes.len() - 1]).to_string();
        assert_says(&message, &["truncated", "output_norm.weight", &(bytes.len() - 1).to_string()]);
    }

    #[test]
    fn absurd_counts_are_refused() {
        for at in [8, 16] {
            for count in [u64::MAX, 1 << 63, MAX_TENSORS + 1, 1000] {
                let mut bytes = Writer::model().bytes();
                bytes[at..at + 8].copy_from_slice(&count.to_le_bytes());
                assert!(matches!(problem(&bytes), Problem::TooMany { count: found, .. } if found == count));
            }
        }
    }

    #[test]
    fn an_absurd_array_length_is_refused_without_overflow() {
        for element in [0, 4, 8, 10] {
            for count in [u64::MAX, u64::MAX / 8 + 1, 1 << 40] {
                let value = [&(element as u32).to_le_bytes()[..], &count.to_le_bytes()].concat();
                let bytes = Writer::model().raw("x", 9, value).bytes();
                assert!(matches!(problem(&bytes), Problem::TooMany { .. }));
            }
        }
    }

    #[test]
    fn a_string_past_the_end_is_refused() {
        for length in [u64::MAX, 1 << 40, 1 << 20] {
            let bytes = Writer::model().raw("x", 8, length.to_le_bytes().into()).bytes();
            assert!(matches!(problem(&bytes), Problem::Truncated { needed, .. } if needed == length));
        }
    }

    #[test]
    fn a_string_over_the_cap_is_refused_before_it_is_read() {
        let key = "k".repeat(MAX_KEY_BYTES as usize + 1);
        assert!(matches!(problem(&Writer::empty().u32(&key, 1).bytes()), Problem::TooLong { .. }));
    }

    #[test]
    fn keys_must_be_plain_text() {
        for (key, part) in [(&b""[..], "empty"), (b"\xff", "UTF-8"), (b"a\0b", "NUL")] {
            let mut writer = Writer::model();
            writer.pairs.push((key.into(), 4, vec![0; 4]));
            assert_says(&problem(&writer.bytes()).to_string(), &[part]);
        }
    }

    #[test]
    fn text_that_is_not_utf_8_is_kept_lossily() {
        let header = parse(&Writer::empty().raw("x", 8, text(b"a\xff")).bytes()).unwrap();
        assert_eq!(header.get("x").and_then(Value::as_str), Some("a\u{fffd}"));
    }

    #[test]
    fn unknown_value_types_are_refused() {
        for kind in [13, u32::MAX] {
            let bytes = Writer::empty().raw("x", kind, vec![0; 8]).bytes();
            assert!(matches!(problem(&bytes), Problem::ValueType { kind: found, .. } if found == kind));
        }
    }

    #[test]
    fn arrays_of_arrays_are_refused() {
        let bytes = Writer::empty().raw("x", 9, list(9, &[list(0, &[])])).bytes();
        assert!(matches!(problem(&bytes), Problem::NestedArray { .. }));
    }

    #[test]
    fn duplicate_keys_are_refused() {
        let mut writer = Writer::model();
        writer.pairs.push(writer.pairs[0].clone());
        assert!(matches!(problem(&writer.bytes()), Problem::DuplicateKey(_)));
    }

    #[test]
    fn the_alignment_must_be_a_sensible_power_of_two() {
        for alignment in [0, 3, 33, 1 << 30, u32::MAX] {
            let bytes = Writer::vocabulary().u32("general.alignment", alignment).bytes();
            assert_says(&problem(&bytes).to_string(), &["general.alignment", &alignment.to_string()]);
        }
        let bytes = Writer::vocabulary().u16("general.alignment", 32).bytes();
        assert_says(&problem(&bytes).to_string(), &["U16", "U32"]);
    }

    #[test]
    fn weights_that_cannot_be_mapped_are_refused() {
        let mut writer = Writer::empty().u32("general.alignment", 8);
        writer.pairs.extend(Writer::vocabulary().pairs);
        let writer = writer.tensor("output_norm.weight", &[64], 0);
        // One of the lengths puts the data off a multiple of 32.
        let refused = (0..4).filter(|length| writer.clone().string("pad", &"x".repeat(length * 8)).check().is_err());
        assert_eq!(refused.count(), 3);
    }

    #[test]
    fn tensor_names_must_be_short_and_unique() {
        let long = "n".repeat(64);
        assert!(matches!(
            problem(&Writer::model().tensor(&long, &[1], 0).bytes()),
            Problem::TooLong { length: 64, .. }
        ));
        let twice = Writer::model().tensor("token_embd.weight", &[1], 0);
        assert!(matches!(problem(&twice.bytes()), Problem::DuplicateTensor(_)));
    }

    #[test]
    fn tensor_shapes_are_checked() {
        let cases: [(&[u64], u32, &str); 6] = [
            (&[1, 1, 1, 1, 1], 0, "5 dimensions"),
            (&[4, 0], 0, "dimension of 0"),
            (&[1 << 40, 1 << 40], 0, "elements"),
            (&[u64::MAX], 0, "elements"),
            (&[1 << 62], 28, "bytes"),
            (&[33], 8, "multiple of 32"),
        ];
        for (shape, kind, part) in cases {
            assert_says(&problem(&Writer::empty().tensor("t", shape, kind).bytes()).to_string(), &["\"t\"", part]);
        }
    }

    #[test]
    fn unknown_and_removed_tensor_types_are_refused() {
        for (kind, part) in [(4, "2023"), (31, "Q4_0"), (36, "IQ4_NL"), (43, "newer"), (u32::MAX, "newer")] {
            assert_says(&problem(&Writer::empty().tensor("t", &[256], kind).bytes()).to_string(), &[part]);
        }
    }

    #[test]
    fn tensor_offsets_must_be_aligned_and_consecutive() {
        for (offset, part) in [(1, "alignment 32"), (32, "288 follows"), (u64::MAX - 31, "288 follows")] {
            let mut writer = Writer::model();
            writer.tensors[1].3 = offset;
            assert_says(&problem(&writer.bytes()).to_string(), &[part]);
        }
    }

    #[test]
    fn tensors_past_the_end_are_refused() {
        let bytes = Writer::model().tensor("big", &[1 << 50], 0).bytes();
        assert!(matches!(problem(&bytes), Problem::Truncated { needed, .. } if needed == 1 << 52));
    }

    #[test]
    fn a_model_needs_tensors_and_a_vocabulary_does_not() {
        assert_says(&Writer::vocabulary().refusal(), &["no tensors", "vocab_only"]);
        assert!(Writer::vocabulary().check_with(true, &[]).is_ok());
    }

    #[test]
    fn duplicate_tokens_are_refused() {
        let tokens = ["a", "b", "a"].map(|token| text(token.as_bytes()));
        let bytes = Writer::model().raw(TOKENS_KEY, 9, list(8, &tokens)).bytes();
        assert!(matches!(problem(&bytes), Problem::DuplicateToken { first: 0, second: 2, .. }));
        let tokens = ["[EMPTY_1]", ""].map(|token| text(token.as_bytes()));
        let bytes = Writer::model().raw(TOKENS_KEY, 9, list(8, &tokens)).bytes();
        assert!(matches!(problem(&bytes), Problem::DuplicateToken { .. }));
    }

    #[test]
    fn metadata_that_llama_cpp_dies_of_is_refused() {
        let model = Writer::model;
        let array =
            |kind, values: &[u32]| list(kind, &values.iter().map(|v| v.to_le_bytes().into()).collect::<Vec<_>>());
        let cases = [
            (model().without("general.architecture"), "general.architecture"),
            (model().u32("general.architecture", 1), "must be a string"),
            (model().string("general.architecture", "clip"), "projector"),
            (model().without("tokenizer.ggml.model"), "tokenizer.ggml.model"),
            (model().string("tokenizer.ggml.model", "none"), "none"),
            (model().string("tokenizer.ggml.model", "no_vocab"), "no_vocab"),
            (
                model().string("tokenizer.ggml.model", "gpt2").string("tokenizer.ggml.pre", "whitespace"),
                "tokenizer.ggml.pre",
            ),
            (model().without(TOKENS_KEY), TOKENS_KEY),
            (model().raw(TOKENS_KEY, 9, list(8, &[])), "is empty"),
            (model().raw(TOKENS_KEY, 9, array(4, &[1])), "of strings"),
            (model().u32(TOKENS_KEY, 1), "array of strings"),
            (model().u32("tokenizer.ggml.merges", 1), "array of strings"),
            (model().raw("tokenizer.ggml.scores", 9, array(6, &[0; 3])), "3 elements"),
            (model().raw("tokenizer.ggml.scores", 9, array(4, &[0; 4])), "array of U32"),
            (model().raw("tokenizer.ggml.token_type", 9, array(5, &[1; 3])), "3 elements"),
            (model().without("llama.context_length"), "llama.context_length"),
            (model().u32("llama.context_length", 0), "is 0"),
            (model().u16("llama.embedding_length", 64), "must be U32"),
            (model().u32("llama.block_count", 0), "from 1 to 512"),
            (model().u32("llama.block_count", 513), "from 1 to 512"),
            (model().u32("llama.nextn_predict_layers", 3), "from 0 to 2"),
            (model().raw("llama.attention.head_count_kv", 9, array(4, &[2, 2, 2])), "2 layers"),
            (model().raw("llama.attention.head_count_kv", 9, array(4, &[2, 3])), "divide"),
            (model().u32("llama.attention.head_count_kv", 3), "divide"),
            (model().without("llama.attention.head_count"), "head_count"),
            (model().u32("llama.attention.key_length", 8), "one even width"),
            (model().u32("llama.rope.dimension_count", 8), "one even width"),
            (model().u32("llama.attention.head_count", 64), "one even width"),
            (model().string("llama.rope.scaling.type", "cubic"), "longrope"),
            (model().u32("llama.pooling_type", 5), "from 0 to 4"),
            (model().u32("llama.expert_count", 1025), "1024"),
            (model().u32("llama.expert_count", 8), "expert_used_count"),
            (model().u32("llama.expert_used_count", 2), "expert_count"),
        ];
        for (writer, part) in cases {
            assert_says(&writer.refusal(), &[part]);
        }
    }

    #[test]
    fn expert_groups_must_fit_the_experts() {
        let experts = || Writer::model().u32("llama.expert_count", 8).u32("llama.expert_used_count", 2);
        assert!(experts().check().is_ok());
        let groups =
            |count, used| experts().u32("llama.expert_group_count", count).u32("llama.expert_group_used_count", used);
        assert!(groups(4, 2).check().is_ok());
        for writer in [groups(8, 2), groups(3, 2), groups(4, 0), groups(4, 4)] {
            assert_says(&writer.refusal(), &["expert_group"]);
        }
    }

    #[test]
    fn tensors_that_ggml_cannot_compute_with_are_refused() {
        let cases = [
            ("blk.0.attn_q.weight", vec![64, 64], 9, "cannot compute"),
            ("blk.0.attn_q.weight", vec![64, 64], 24, "cannot compute"),
            ("blk.0.attn_norm.weight", vec![64], 1, "must be f32"),
            ("rope_freqs.weight", vec![64], 1, "must be f32"),
            ("blk.0.scale", vec![64], 8, "cannot be quantised"),
        ];
        for (name, shape, kind, part) in cases {
            assert_says(&Writer::model().tensor(name, &shape, kind).refusal(), &[name, part]);
        }
    }

    #[test]
    fn overrides_are_checked_like_the_values_they_replace() {
        let check = |key: &str, value| Writer::model().check_with(false, &[(key.into(), value)]);
        for value in [Value::I64(0), Value::I64(-1), Value::I64(1 << 33)] {
            assert_says(&check("llama.block_count", value).unwrap_err().to_string(), &["llama.block_count"]);
        }
        assert!(check("tokenizer.ggml.model", Value::String("none".into())).is_err());
        assert!(check("llama.rope.scaling.type", Value::String("cubic".into())).is_err());
        assert!(check("llama.context_length", Value::I64(64)).is_ok());
        assert!(check("split.count", Value::I64(2)).is_err());
        assert!(check("llama.expert_used_count", Value::I64(2)).is_ok());
        let experts = ["llama.expert_count", "llama.expert_used_count"];
        let experts = experts.map(|key| (key.to_owned(), Value::I64(2)));
        assert!(Writer::model().check_with(false, &experts).is_err());
        // llama.cpp would ignore these without a word.
        assert!(check("llama.context_length", Value::Bool(true)).is_err());
        assert!(check("tokenizer.ggml.tokens", Value::I64(5)).is_err());
    }

    /// Writes a model of two parts and returns their paths.
    fn split(folder: &Path, first: &Writer, second: &Writer) -> (PathBuf, PathBuf) {
        (first.write(folder, "m-00001-of-00002.gguf"), second.write(folder, "m-00002-of-00002.gguf"))
    }

    fn parts() -> (Writer, Writer) {
        let second = Writer::empty().u16("split.no", 1).u16("split.count", 2);
        let total = 3i32.to_le_bytes().into();
        let first = Writer::model().u16("split.no", 0).u16("split.count", 2).raw("split.tensors.count", 5, total);
        (first, second.tensor("blk.0.attn_q.weight", &[64, 64], 8))
    }

    #[test]
    fn a_split_model_is_accepted_by_its_first_part() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = parts();
        let (path, other) = split(folder.path(), &first, &second);
        assert_eq!(check_model_file(&path, false, &[]).unwrap().split_count(), 2);
        let message = check_model_file(&other, false, &[]).unwrap_err().to_string();
        assert_says(&message, &["part 2 of 2", &path.display().to_string()]);
    }

    #[test]
    fn a_split_model_needs_all_its_parts() {
        let folder = tempfile::tempdir().unwrap();
        let (first, second) = parts();
        let (path, other) = split(folder.path(), &first, &second);
        std::fs::remove_file(&other).unwrap();
        let message = check_model_file(&path, false, &[]).unwrap_err().to_string();
        assert_says(&message, &["part 2 of 2 is missing", &other.display().to_string()]);
    }

    #[test]
    fn the_parts_of_a_split_model_must_belong_together() {
        let (first, second) = parts();
        let cases = [
            (first.clone(), second.clone().without("split.no"), "split.no"),
            (first.clone(), second.clone().u16("split.no", 0), "split.no"),
            (first.clone(), second.clone().u32("split.no", 1), "must be U16"),
            (first.clone(), second.clone().tensor("token_embd.weight", &[1], 0), "occurs twice"),
            (first.clone(), second.clone().tensor("more", &[1], 0), "4 tensors"),
            (first.clone().u32("split.count", 2), second, "must be U16"),
        ];
        for (first, second, part) in cases {
            let folder = tempfile::tempdir().unwrap();
            let (path, _) = split(folder.path(), &first, &second);
            assert_says(&check_model_file(&path, false, &[]).unwrap_err().to_string(), &[part]);
        }
    }

    #[test]
    fn a_part_with_another_name_is_refused() {
        assert_says(&parts().0.refusal(), &["-00001-of-00002.gguf"]);
    }

    #[test]
    fn adapters_are_checked_for_the_types_of_their_keys() {
        let adapter = || Writer::empty().string("general.type", "adapter").tensor("a.lora_a", &[4], 0);
        let folder = tempfile::tempdir().unwrap();
        let check = |writer: Writer| check_adapter_file(&writer.write(folder.path(), "lora.gguf"));
        assert!(check(adapter()).is_ok());
        assert!(check(adapter().u32("general.type", 1)).is_err());
        assert!(check(adapter().u32("adapter.lora.alpha", 1)).is_err());
        assert!(check(adapter().u32("adapter.type", 1)).is_err());
        assert!(check(Writer::model()).is_err());
        assert!(check(Writer { tensors: vec![], ..adapter() }).is_err());
    }

    #[test]
    fn a_file_cut_while_it_is_read_is_truncated() {
        let bytes = Writer::model().bytes();
        let result = Header::parse(&mut Cursor::new(&bytes[..100]), bytes.len() as u64);
        assert!(matches!(result, Err(ReadError::Problem(Problem::Truncated { .. }))));
    }

    #[test]
    fn the_header_is_capped_whatever_the_file_claims() {
        let claimed = 1u64 << 40;
        let length = MAX_HEADER_BYTES.to_le_bytes();
        let value = [&0u32.to_le_bytes()[..], &length].concat();
        let bytes = Writer::empty().raw("x", 9, value).bytes();
        let result = Header::parse(&mut Cursor::new(&bytes), claimed);
        assert!(matches!(result, Err(ReadError::Problem(Problem::HeaderTooLong(_)))));
    }

    /// Both stages over bytes that never were a file.
    fn survive(bytes: &[u8]) {
        if let Ok(header) = parse(bytes) {
            assert!(header.tensors.len() + header.metadata.len() <= bytes.len());
            let facts = Facts { header: &header, overrides: &[] };
            let _ = check_metadata(&facts, false);
            let _ = check_adapter(&header);
            let _ = check_part_tensors(Path::new("x"), &header, &mut HashSet::new(), false);
        }
    }

    #[test]
    fn the_start_of_a_file_gives_its_header_or_nothing_yet() {
        let bytes = Writer::model().bytes();
        let whole = parse(&bytes).unwrap();
        let read = |length: usize| Header::read_start(&bytes[..length], bytes.len() as u64, Path::new("far"));
        let enough = (0..=bytes.len()).find(|length| read(*length).unwrap().is_some()).unwrap();
        assert!(enough as u64 <= whole.data_offset);
        for length in enough..=bytes.len() {
            assert_eq!(read(length).unwrap().as_ref(), Some(&whole));
        }
    }

    #[test]
    fn the_start_of_a_damaged_file_is_refused_under_its_name() {
        let refused = Header::read_start(b"<!doctype html>", 15, Path::new("far")).unwrap_err();
        assert_says(&refused.to_string(), &["far", "web page"]);
        let bytes = Writer::model().bytes();
        let short = Header::read_start(&bytes, bytes.len() as u64 - 1, Path::new("far")).unwrap_err();
        assert_says(&short.to_string(), &["far", "truncated"]);
    }

    #[test]
    fn short_arrays_of_integers_and_truth_values_are_kept() {
        let flags = list(7, &[vec![1], vec![0], vec![2]]);
        let numbers = list(4, &[7u32, 9].map(|number| number.to_le_bytes().to_vec()));
        let long = list(0, &vec![vec![3]; KEPT_INTEGERS as usize + 1]);
        let file = Writer::model().raw("flags", 9, flags).raw("numbers", 9, numbers).raw("long", 9, long);
        let header = parse(&file.bytes()).unwrap();
        let kept = |key: &str| match header.get(key) {
            Some(Value::Array { integers, .. }) => integers.clone(),
            other => panic!("{other:?}"),
        };
        assert_eq!(kept("flags"), Some(vec![1, 0, 1]));
        assert_eq!(kept("numbers"), Some(vec![7, 9]));
        assert_eq!(kept("long"), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            survive(&bytes);
            survive(&[b"GGUF\x03\0\0\0", bytes.as_slice()].concat());
        }

        #[test]
        fn any_mutation_of_a_model_is_survived(
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
            cut in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let mut bytes = Writer::model().bytes();
            for (at, value) in edits {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            survive(&bytes);
        }

        #[test]
        fn any_number_written_over_a_length_is_survived(
            at in any::<prop::sample::Index>(),
            number in prop_oneof![any::<u64>(), Just(u64::MAX), Just(1 << 31), Just(1 << 62), 0u64..64],
        ) {
            let mut bytes = Writer::model().bytes();
            let at = at.index(bytes.len() - 8);
            bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
            survive(&bytes);
        }
    }
}
