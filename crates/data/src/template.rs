//! The Hugging Face chat template: Jinja as transformers runs it.
//!
//! transformers renders with `trim_blocks` and `lstrip_blocks`, a `tojson` that does not escape HTML, the
//! functions `raise_exception` and `strftime_now`, Python's string methods, and a `{% generation %}` block
//! (`transformers/utils/chat_template_utils.py`).

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value as JinjaValue};
use minijinja::{Environment, Error as JinjaError, ErrorKind};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::{Error, Result};

/// A calendar day, for templates that write today's date into the system message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Date {
    /// The year.
    pub year: i32,
    /// The month, 1 to 12.
    pub month: u32,
    /// The day, 1 to 31.
    pub day: u32,
}

impl Default for Date {
    /// A fixed day, 1 January 2025: the same data gives the same tokens whenever it is read.
    fn default() -> Self {
        Self { year: 2025, month: 1, day: 1 }
    }
}

/// A parsed chat template with the special tokens it may write.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Map<String, Value>,
    source: String,
    origin: String,
}

const NAME: &str = "chat";

impl ChatTemplate {
    /// Parses a template. `special_tokens` maps names as `bos_token` to their text; `origin` is the file named
    /// in errors.
    pub fn new(source: &str, origin: &str, special_tokens: Map<String, Value>, date: Date) -> Result<Self> {
        let mut environment = Environment::new();
        let broken =
            |error: JinjaError| Error::Template { origin: origin.to_owned(), message: describe(&error) };
        environment.set_syntax(
            SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(broken)?,
        );
        // By default `.html` names are escaped; a chat never is.
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", tojson);
        environment.add_function(
            "raise_exception",
            |message: String| -> std::result::Result<(), JinjaError> {
                Err(JinjaError::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment.add_function("strftime_now", move |format: String| strftime(&format, date));
        // Jinja2's lexer reads every line break as "\n"; minijinja keeps those of the file.
        let unix = source.replace("\r\n", "\n").replace('\r', "\n");
        environment.add_template_owned(NAME, generation_blocks_as_if(&unix)).map_err(broken)?;
        Ok(Self { environment, special_tokens, source: source.to_owned(), origin: origin.to_owned() })
    }

    /// The text of a chat. `messages` are objects with `role` and `content`; with `add_generation_prompt` the
    /// text ends where the assistant is to begin.
    pub fn render(
        &self,
        messages: &[Value],
        tools: Option<&Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let mut context = self.special_tokens.clone();
        context.insert("messages".into(), messages.into());
        context.insert("tools".into(), tools.cloned().unwrap_or(Value::Null));
        context.insert("documents".into(), Value::Null);
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(JinjaValue::from(Serde(context))))
            .map_err(|error| Error::Chat {
                location: None,
                message: format!("the chat template refuses the chat: {}", describe(&error)),
            })
    }

    /// The template as it was given.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Where it comes from.
    pub fn origin(&self) -> &str {
        &self.origin
    }
}

fn describe(error: &JinjaError) -> String {
    let mut text = match error.detail() {
        Some(detail) if error.kind() == ErrorKind::InvalidOperation => detail.to_owned(),
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    if let Some(line) = error.line() {
        text.push_str(&format!(" (line {line} of the template)"));
    }
    text
}

/// `{% generation %}` marks the assistant's part for transformers' mask. The block has no other effect, and the
/// mask here is found from the rendered text: it becomes `{% if true %}`, with its whitespace control kept.
fn generation_blocks_as_if(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let Some(length) = rest[open..].find("%}") else { break };
        let inside = &rest[open + 2..open + length];
        let word = inside.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        out.push_str(&rest[..open + 2]);
        match word {
            "generation" => out.push_str(&inside.replacen("generation", "if true", 1)),
            "endgeneration" => out.push_str(&inside.replacen("endgeneration", "endif", 1)),
            _ => out.push_str(inside),
        }
        out.push_str("%}");
        rest = &rest[open + length + 2..];
    }
    out.push_str(rest);
    out
}

/// JSON as Python's `json.dumps` lays it out: a space after `,` and `:`, or `indent` columns a level.
fn tojson(value: JinjaValue, options: Kwargs) -> std::result::Result<String, JinjaError> {
    let indent: Option<usize> = options.get("indent")?;
    // Accepted for the sake of templates that write them out; the defaults are transformers' own.
    let _: Option<JinjaValue> = options.get("ensure_ascii")?;
    let _: Option<JinjaValue> = options.get("separators")?;
    let _: Option<JinjaValue> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let failed = |error: serde_json::Error| JinjaError::new(ErrorKind::BadSerialization, error.to_string());
    let mut out = Vec::new();
    match indent {
        Some(columns) => {
            let columns = " ".repeat(columns);
            let formatter = serde_json::ser::PrettyFormatter::with_indent(columns.as_bytes());
            value
                .serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
                .map_err(failed)?;
        }
        None => {
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, Spaced)).map_err(failed)?;
        }
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}

struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        if first { Ok(()) } else { out.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(b": ")
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// C's `strftime` at midnight of `date`, for the directives that name a day.
fn strftime(format: &str, date: Date) -> std::result::Result<String, JinjaError> {
    let Date { year, month, day } = date;
    let month_name = MONTHS[(month.clamp(1, 12) - 1) as usize];
    let weekday = WEEKDAYS[weekday(date)];
    let mut out = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            out.push(letter);
            continue;
        }
        let mut directive = letters.next();
        let padded = directive != Some('-');
        if !padded {
            directive = letters.next();
        }
        let two = |number: u32| if padded { format!("{number:02}") } else { number.to_string() };
        match directive {
            Some('Y') => out.push_str(&year.to_string()),
            Some('y') => out.push_str(&two(year.rem_euclid(100) as u32)),
            Some('m') => out.push_str(&two(month)),
            Some('d') => out.push_str(&two(day)),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(weekday),
            Some('a') => out.push_str(&weekday[..3]),
            Some('H' | 'M' | 'S') => out.push_str(&two(0)),
            Some('F') => out.push_str(&format!("{year}-{month:02}-{day:02}")),
            Some('%') => out.push('%'),
            other => {
                let found = other.map(String::from).unwrap_or_default();
                let message = format!("strftime_now: the directive %{found} is not known");
                return Err(JinjaError::new(ErrorKind::InvalidOperation, message));
            }
        }
    }
    Ok(out)
}

/// Sakamoto's rule; 0 is Sunday.
fn weekday(date: Date) -> usize {
    const SHIFT: [i32; 12] = [0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4];
    let year = if date.month < 3 { date.year - 1 } else { date.year };
    let leap = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    let shift = SHIFT[(date.month.clamp(1, 12) - 1) as usize];
    (year + leap + shift + date.day as i32).rem_euclid(7) as usize
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(source: &str, messages: &[Value]) -> Result<String> {
        let tokens = json!({"bos_token": "<s>", "eos_token": "</s>"}).as_object().cloned().unwrap();
        ChatTemplate::new(source, "test", tokens, Date { year: 2024, month: 2, day: 29 })?
            .render(messages, None, false)
    }

    #[test]
    fn blocks_are_trimmed_as_transformers_does() {
        let source =
            "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}\n";
        let chat = [json!({"role": "user", "content": "a"}), json!({"role": "user", "content": "b"})];
        assert_eq!(render(source, &chat).unwrap(), "a\nb\n");
    }

    #[test]
    fn line_breaks_are_read_as_jinja2_does() {
        assert_eq!(render("{% if true %}\r\na\r\nb{{ '\r\n' }}{% endif %}", &[]).unwrap(), "a\nb\n");
    }

    #[test]
    fn tojson_is_pythons() {
        let chat = [json!({"role": "user", "content": "<é'", "n": [1, 2.5, null, true]})];
        let expected = r#"{"role": "user", "content": "<é'", "n": [1, 2.5, null, true]}"#;
        assert_eq!(render("{{ messages[0] | tojson }}", &chat).unwrap(), expected);
        let indented = render("{{ messages[0].n[:1] | tojson(indent=4) }}", &chat).unwrap();
        assert_eq!(indented, "[\n    1\n]");
    }

    #[test]
    fn dates_are_handed_in() {
        let text = render("{{ strftime_now('%A %-d %b %Y|%d %B %y|%H:%M') }}", &[]).unwrap();
        assert_eq!(text, "Thursday 29 Feb 2024|29 February 24|00:00");
        assert!(render("{{ strftime_now('%Q') }}", &[]).unwrap_err().to_string().contains("%Q"));
    }

    #[test]
    fn generation_blocks_leave_no_trace() {
        let source = "a\n  {%- generation -%}\n b {% endgeneration %}\nc";
        assert_eq!(render(source, &[]).unwrap(), "ab c");
    }

    #[test]
    fn refusals_and_syntax_errors_say_what_and_where() {
        let refused = render("\n{{ raise_exception('no system role') }}", &[]).unwrap_err().to_string();
        assert!(refused.contains("no system role") && refused.contains("line 2"), "{refused}");
        let broken = render("{% for %}", &[]).unwrap_err();
        assert!(matches!(broken, Error::Template { .. }), "{broken}");
    }

    #[test]
    fn python_string_methods_work() {
        let chat = [json!({"role": "user", "content": "  x</think>y "})];
        let source = "{{ messages[0].content.split('</think>')[-1].rstrip() }}{{ 'ab'.startswith('a') }}";
        assert_eq!(render(source, &chat).unwrap(), "yTrue");
    }
}
