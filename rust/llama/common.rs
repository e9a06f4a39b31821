//! llama.cpp's own knowledge of chat formats (`common_chat`): grammars, triggers, tags, and the parsing of answers.

use std::ffi::{CString, c_char};
use std::ptr::{NonNull, null_mut};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::guarded;
use crate::error::{Error, Result};

#[repr(C)]
struct Native {
    _private: [u8; 0],
}

#[repr(C)]
struct NativeReader {
    _private: [u8; 0],
}

unsafe extern "C" {
    fn llamactor_formats_init(
        source: *const c_char,
        length: usize,
        bos: *const c_char,
        eos: *const c_char,
        out: *mut *mut Native,
        message: *mut c_char,
        size: usize,
    ) -> i32;
    fn llamactor_formats_free(formats: *mut Native);
    fn llamactor_formats_apply(
        formats: *const Native,
        request: *const c_char,
        request_length: usize,
        out: *mut *mut c_char,
        length: *mut usize,
        message: *mut c_char,
        size: usize,
    ) -> i32;
    fn llamactor_formats_parse(
        request: *const c_char,
        request_length: usize,
        out: *mut *mut c_char,
        length: *mut usize,
        message: *mut c_char,
        size: usize,
    ) -> i32;
    fn llamactor_formats_free_text(text: *mut c_char);
    fn llamactor_reader_init(
        request: *const c_char,
        request_length: usize,
        out: *mut *mut NativeReader,
        message: *mut c_char,
        size: usize,
    ) -> i32;
    fn llamactor_reader_free(reader: *mut NativeReader);
    fn llamactor_reader_read(
        reader: *const NativeReader,
        text: *const c_char,
        text_length: usize,
        out: *mut *mut c_char,
        length: *mut usize,
        message: *mut c_char,
        size: usize,
    ) -> i32;
}

/// A chat template as llama.cpp understands it.
///
/// Its interpreter has no bounds: only templates that were tried elsewhere come here.
pub struct ChatFormats(NonNull<Native>);

// SAFETY: applying reads the parsed template and nothing else; it is freed once, by whoever has it last.
unsafe impl Send for ChatFormats {}
// SAFETY: as above.
unsafe impl Sync for ChatFormats {}

/// What to make of a conversation.
#[derive(Clone, Debug, Serialize)]
pub struct FormatRequest {
    /// The messages, in OpenAI's form.
    pub messages: Vec<Value>,
    /// Definitions of tools, in OpenAI's form.
    pub tools: Vec<Value>,
    /// `auto`, `none` or `required`.
    pub tool_choice: String,
    /// Whether several tools may be called at once.
    pub parallel_tool_calls: bool,
    /// Whether the header of an answer follows.
    pub add_generation_prompt: bool,
    /// Whether the model is to think.
    pub enable_thinking: bool,
    /// A JSON Schema for the answer, or nothing.
    pub json_schema: String,
    /// Whether the parser tells thoughts from content.
    pub reads_reasoning: bool,
    /// Further names for the template.
    pub kwargs: Map<String, Value>,
}

/// What starts a lazy grammar.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trigger {
    /// `token`, `word`, `pattern` or `pattern_full`.
    pub kind: String,
    /// The word or pattern.
    pub value: String,
}

/// How a conversation is written, and how its answer is constrained and read.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ChatFormat {
    pub format: String,
    pub format_id: i32,
    pub prompt: String,
    pub generation_prompt: String,
    pub grammar: String,
    pub grammar_lazy: bool,
    pub triggers: Vec<Trigger>,
    pub preserved_tokens: Vec<String>,
    pub stops: Vec<String>,
    pub parser: String,
    pub supports_thinking: bool,
    pub thinking_start_tag: String,
    pub thinking_end_tags: Vec<String>,
}

/// An answer to be read, whole or as far as it is there.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct ParseRequest {
    pub text: String,
    pub is_partial: bool,
    pub format_id: i32,
    pub generation_prompt: String,
    pub parser: String,
    pub parse_tool_calls: bool,
}

impl ChatFormats {
    /// Reads a template. Runs it on trial conversations, without bounds.
    ///
    /// # Errors
    /// `ChatTemplate` with llama.cpp's reason.
    pub fn new(source: &str, bos: &str, eos: &str) -> Result<Self> {
        let (bos, eos) = (to_c(bos)?, to_c(eos)?);
        let mut out = null_mut();
        guarded(|message, size| {
            // SAFETY: all texts live until the call returns; `out` is written on success.
            unsafe {
                let (source, length) = (source.as_ptr().cast(), source.len());
                llamactor_formats_init(source, length, bos.as_ptr(), eos.as_ptr(), &raw mut out, message, size)
            }
        })
        .map_err(refused)?;
        NonNull::new(out).map(Self).ok_or_else(|| refused("no template was made".into()))
    }

    /// What the template makes of a conversation.
    ///
    /// # Errors
    /// `ChatTemplate` with llama.cpp's reason.
    pub fn apply(&self, request: &FormatRequest) -> Result<ChatFormat> {
        let request = to_json(request)?;
        let text = answer(|out, length, message, size| {
            // SAFETY: the formats are alive, and so is the request; the outputs are written on success.
            unsafe {
                let (text, text_length) = (request.as_ptr().cast(), request.len());
                llamactor_formats_apply(self.0.as_ptr(), text, text_length, out, length, message, size)
            }
        })?;
        serde_json::from_slice(&text).map_err(|error| refused(error.to_string()))
    }
}

impl Drop for ChatFormats {
    fn drop(&mut self) {
        // SAFETY: made by `llamactor_formats_init` and freed once.
        unsafe { llamactor_formats_free(self.0.as_ptr()) }
    }
}

/// Reads an answer with the parser of its format: a message in OpenAI's form.
///
/// # Errors
/// `Value` when the answer does not have the format.
pub fn parse_answer(request: &ParseRequest) -> Result<Value> {
    let request = to_json(request)?;
    let text = answer(|out, length, message, size| {
        // SAFETY: the request is alive; the outputs are written on success.
        unsafe { llamactor_formats_parse(request.as_ptr().cast(), request.len(), out, length, message, size) }
    });
    let text = text.map_err(|error| Error::Value(error.to_string()))?;
    serde_json::from_slice(&text).map_err(|error| Error::Value(error.to_string()))
}

/// How the calls in an answer are read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallSyntax {
    /// Which of llama.cpp's formats.
    pub format_id: i32,
    /// Its parser, as JSON.
    pub parser: String,
    /// What the parser expects before the text: the header of the answer.
    pub prefix: String,
}

/// What a text says so far, as the parser of its format reads it.
#[derive(Clone, Debug, Deserialize)]
pub struct Reading {
    /// How it came out.
    pub state: ReadingState,
    /// The byte up to which it was read.
    pub end: usize,
    /// The calls in it whose names are known; the arguments of the last may have only begun.
    pub calls: Vec<CallReading>,
    /// How many of them are whole.
    #[serde(default)]
    pub whole: usize,
}

/// How a reading came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReadingState {
    /// The text does not have the format, whatever follows.
    Fail,
    /// It has it.
    Success,
    /// It has begun to.
    NeedMoreInput,
}

/// A call as far as it was read.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[allow(missing_docs)]
pub struct CallReading {
    pub id: String,
    pub name: String,
    pub arguments: String,
}

/// Reads texts of one format.
pub struct CallReader(NonNull<NativeReader>);

// SAFETY: a reader is a parser that never changes; it is freed once, by its only owner.
unsafe impl Send for CallReader {}

impl CallReader {
    /// Takes a parser.
    ///
    /// # Errors
    /// `Value` when it is none.
    pub fn new(syntax: &CallSyntax) -> Result<Self> {
        let request = to_json(syntax)?;
        let mut out = null_mut();
        guarded(|message, size| {
            // SAFETY: the request lives until the call returns; `out` is written on success.
            unsafe { llamactor_reader_init(request.as_ptr().cast(), request.len(), &raw mut out, message, size) }
        })
        .map_err(unreadable)?;
        NonNull::new(out).map(Self).ok_or_else(|| unreadable("no parser was made".into()))
    }

    /// Reads a text whose end may be missing. It recurses as deep as the text nests: the caller sees to that.
    ///
    /// # Errors
    /// `Value` with llama.cpp's reason.
    pub fn read(&self, text: &str) -> Result<Reading> {
        let answer = answer(|out, length, message, size| {
            // SAFETY: the reader is alive, and so is the text; the outputs are written on success.
            unsafe {
                let (text, text_length) = (text.as_ptr().cast(), text.len());
                llamactor_reader_read(self.0.as_ptr(), text, text_length, out, length, message, size)
            }
        });
        let answer = answer.map_err(|error| unreadable(error.to_string()))?;
        serde_json::from_slice(&answer).map_err(|error| unreadable(error.to_string()))
    }
}

impl Drop for CallReader {
    fn drop(&mut self) {
        // SAFETY: made by `llamactor_reader_init` and freed once.
        unsafe { llamactor_reader_free(self.0.as_ptr()) }
    }
}

fn unreadable(reason: String) -> Error {
    Error::Value(format!("calls of tools cannot be read: {reason}"))
}

/// Takes a text that the shim has made.
fn answer(call: impl FnOnce(*mut *mut c_char, *mut usize, *mut c_char, usize) -> i32) -> Result<Vec<u8>> {
    let (mut out, mut length) = (null_mut(), 0);
    guarded(|message, size| call(&raw mut out, &raw mut length, message, size)).map_err(refused)?;
    if out.is_null() {
        return Err(refused("no answer".into()));
    }
    // SAFETY: on success `out` points to `length` bytes.
    let text = unsafe { std::slice::from_raw_parts(out.cast::<u8>(), length) }.to_vec();
    // SAFETY: the text was allocated by the shim and is given back once.
    unsafe { llamactor_formats_free_text(out) };
    Ok(text)
}

fn to_c(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| refused("a special token has a NUL byte".into()))
}

fn to_json(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|error| refused(error.to_string()))
}

fn refused(reason: String) -> Error {
    Error::ChatTemplate(format!("llama.cpp cannot use this chat template: {reason}"))
}
