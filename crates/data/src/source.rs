//! Files to records with their lines: JSON lines, JSON arrays, plain text; each also compressed with gzip.

use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use flate2::read::MultiGzDecoder;
use serde_json::Value;

use crate::{Error, Location, Result};

/// What a file holds.
pub(crate) enum Records {
    /// One JSON value a record.
    Json(Vec<(Location, Value)>),
    /// The whole file as one document.
    Document(Location, String),
}

/// Reads a `.jsonl`, `.json` or `.txt` file, or one of them behind `.gz`.
///
/// A `.json` file may hold an array or objects one after the other; a `.jsonl` file that starts with `[` is
/// read as an array.
pub(crate) fn read(path: &Path) -> Result<Records> {
    let outer = extension_of(path);
    let (extension, compression) = match outer.as_str() {
        "gz" => (extension_of(&path.with_extension("")), Compression::Gzip),
        _ => (outer, Compression::None),
    };
    if !matches!(extension.as_str(), "jsonl" | "ndjson" | "json" | "txt" | "text") {
        // A missing file is the more useful complaint.
        std::fs::metadata(path).map_err(|source| Error::Read { path: path.into(), source })?;
        let found = match compression {
            Compression::Gzip if extension.is_empty() => "gz".into(),
            Compression::Gzip => format!("{extension}.gz"),
            Compression::None => extension,
        };
        return Err(Error::Extension { path: path.into(), found });
    }
    let file: Arc<Path> = path.into();
    let text = read_utf8(&file, compression)?;
    let first = text.trim_start().chars().next();
    match (extension.as_str(), first) {
        ("txt" | "text", _) => Ok(Records::Document(Location { file, line: 1, element: None }, text)),
        (_, Some('[')) => array(&file, &text).map(Records::Json),
        ("json", _) => stream(&file, &text).map(Records::Json),
        _ => lines(&file, &text).map(Records::Json),
    }
}

#[derive(Clone, Copy)]
enum Compression {
    None,
    Gzip,
}

fn extension_of(path: &Path) -> String {
    path.extension().and_then(|extension| extension.to_str()).unwrap_or("").to_lowercase()
}

fn read_utf8(file: &Arc<Path>, compression: Compression) -> Result<String> {
    let mut bytes = std::fs::read(file).map_err(|source| Error::Read { path: file.to_path_buf(), source })?;
    if let Compression::Gzip = compression {
        let mut unpacked = Vec::with_capacity(4 * bytes.len());
        // A gzip file may be several ones after each other, as `cat a.gz b.gz` makes them.
        MultiGzDecoder::new(bytes.as_slice())
            .read_to_end(&mut unpacked)
            .map_err(|error| Error::Gzip { path: file.to_path_buf(), message: error.to_string() })?;
        bytes = unpacked;
    }
    let mut text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let bytes = error.as_bytes();
        let line = 1 + newlines(&bytes[..at]);
        Error::Encoding { location: Location { file: file.clone(), line, element: None }, byte: bytes[at] }
    })?;
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    Ok(text)
}

fn newlines(bytes: &[u8]) -> usize {
    bytes.iter().filter(|&&byte| byte == b'\n').count()
}

fn lines(file: &Arc<Path>, text: &str) -> Result<Vec<(Location, Value)>> {
    let mut records = Vec::new();
    for (index, line) in text.split('\n').enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let location = Location { file: file.clone(), line: index + 1, element: None };
        match serde_json::from_str(line) {
            Ok(value) => records.push((location, value)),
            Err(error) => return Err(broken(location, error.column(), &error)),
        }
    }
    Ok(records)
}

/// The elements of a JSON array, each parsed by itself so that its line is known.
fn array(file: &Arc<Path>, text: &str) -> Result<Vec<(Location, Value)>> {
    let mut cursor = Cursor { file, text, at: 0, line: 1, line_start: 0 };
    cursor.skip_blank();
    cursor.advance(1);
    let mut records = Vec::new();
    cursor.skip_blank();
    if cursor.peek() == Some(b']') {
        cursor.advance(1);
    } else {
        loop {
            cursor.skip_blank();
            let index = records.len();
            records.push(cursor.value(Some(index))?);
            cursor.skip_blank();
            match cursor.peek() {
                Some(b',') => cursor.advance(1),
                Some(b']') => {
                    cursor.advance(1);
                    break;
                }
                _ => return Err(cursor.unexpected(Some(index), "expected `,` or `]` after an element")),
            }
        }
    }
    cursor.skip_blank();
    if cursor.peek().is_some() {
        return Err(cursor.unexpected(None, "expected the end of the file after the array"));
    }
    Ok(records)
}

/// JSON values one after the other, over as many lines as they like.
fn stream(file: &Arc<Path>, text: &str) -> Result<Vec<(Location, Value)>> {
    let mut cursor = Cursor { file, text, at: 0, line: 1, line_start: 0 };
    let mut records = Vec::new();
    cursor.skip_blank();
    while cursor.peek().is_some() {
        records.push(cursor.value(None)?);
        cursor.skip_blank();
    }
    Ok(records)
}

fn broken(location: Location, column: usize, error: &serde_json::Error) -> Error {
    let message = error.to_string();
    // serde_json counts lines from the start of the slice it was given: the location says it better.
    let message = message.split(" at line ").next().unwrap_or_default().to_owned();
    Error::Json { location, column, message }
}

/// A place in a JSON text that knows its line; every byte is counted once.
struct Cursor<'a> {
    file: &'a Arc<Path>,
    text: &'a str,
    at: usize,
    line: usize,
    line_start: usize,
}

impl Cursor<'_> {
    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn advance(&mut self, bytes: usize) {
        let passed = &self.text.as_bytes()[self.at..self.at + bytes];
        if let Some(last) = passed.iter().rposition(|&byte| byte == b'\n') {
            self.line += newlines(passed);
            self.line_start = self.at + last + 1;
        }
        self.at += bytes;
    }

    fn skip_blank(&mut self) {
        let rest = &self.text.as_bytes()[self.at..];
        self.advance(rest.iter().take_while(|byte| byte.is_ascii_whitespace()).count());
    }

    fn location(&self, element: Option<usize>) -> Location {
        Location { file: self.file.clone(), line: self.line, element }
    }

    fn unexpected(&self, element: Option<usize>, message: &str) -> Error {
        let column = self.at - self.line_start + 1;
        Error::Json { location: self.location(element), column, message: message.to_owned() }
    }

    fn value(&mut self, element: Option<usize>) -> Result<(Location, Value)> {
        let location = self.location(element);
        let mut values = serde_json::Deserializer::from_str(&self.text[self.at..]).into_iter::<Value>();
        match values.next() {
            Some(Ok(value)) => {
                let bytes = values.byte_offset();
                self.advance(bytes);
                Ok((location, value))
            }
            Some(Err(error)) => {
                let line = self.line + error.line().saturating_sub(1);
                let shift = if error.line() <= 1 { self.at - self.line_start } else { 0 };
                Err(broken(Location { line, ..location }, error.column() + shift, &error))
            }
            None => Err(self.unexpected(element, "expected a value, found the end of the file")),
        }
    }
}
