//! The order of the modules in `src/`: each imports only from those that stand before it in [`ORDER`], and a crate that belongs to
//! one room is used in no other ([`CRATES`]).
//!
//! Read are `use` declarations and paths, of code that is not only for tests; links in comments may point anywhere. What a
//! module gives out under its own name (`pub use`) counts as being where it is written. So a parent that gives out what its
//! children have, and does not use it, imports nothing, and they may use what it defines.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

/// The modules, from those that import nothing up.
const ORDER: &[&str] = &[
    // what everything may use
    "base",
    "base::fork",
    "base::machine",
    "base::error",
    "base::lock",
    "base::nvtx",
    "base::random",
    "base::stats",
    "schema",
    // memory
    "arena::pages",
    "arena::region",
    "arena",
    // bytes, and the threads that wait for them
    "coalesce",
    "store",
    "store::files",
    "store::local",
    "store::memory",
    "store::place",
    "runtime",
    // what a caller asks for
    "config::sampling",
    "config",
    // encoded chunks to elements, and elements to rows
    "decode::limits",
    "decode::stored",
    "decode::deflate",
    "decode::zstandard",
    "decode::lz4",
    "decode::lzf",
    "decode::bits",
    "decode::c_blosc",
    "decode::blosc::header",
    "decode::blosc::outline",
    "decode::blosc::blocks",
    "decode::blosc",
    "decode::elements",
    "decode::filters",
    "decode::zfp",
    "decode::codec",
    "decode::scatter::past_caches",
    "decode::scatter::conversions",
    "decode::scatter",
    "decode",
    // where chunks lie
    "layout::rows",
    "layout::outlines",
    "layout::address",
    "layout::shard",
    "layout::listing",
    "layout::indexes",
    "layout",
    "layout::read",
    "layout::zarr",
    "layout::hdf5::using",
    "layout::hdf5::bytes",
    "layout::hdf5::places",
    "layout::hdf5::headers",
    "layout::hdf5::heaps",
    "layout::hdf5::indexes",
    "layout::hdf5::guard",
    "layout::hdf5::driver",
    "layout::hdf5::raw",
    "layout::hdf5::dataset",
    "layout::hdf5",
    "layout::hdf5::texts",
    // what becomes of a row
    "transform",
    "transform::math",
    "transform::rows",
    "transform::entries",
    "transform::sealer",
    // datasets as one axis of rows
    "collection::encoding",
    "collection::source",
    "collection::join",
    "collection",
    "collection::h5ad",
    "collection::open",
    // which rows, in which order
    "sampler::order",
    "sampler::chunks",
    "sampler",
    // batches: as they lie, as they are delivered, what is read for them, and reading it
    "batch",
    "finish::form",
    "finish::narrow",
    "finish::widened",
    "finish::on_device",
    "finish::allocate",
    "finish::seal",
    "finish",
    "plan::slots",
    "plan::runs",
    "plan",
    "plan::measure",
    "fetch",
    // to a GPU
    "device::driver",
    "device::numa",
    "device::cuda",
    "device",
    "device::nvrtc",
    "device::kernels",
    "device::loaded",
    "device::pinned",
    "device::staging",
    "device::batch",
    "device::transfer",
    // all of it, ahead of the consumer
    "pipeline::dense",
    "pipeline::queue",
    "pipeline::unit::filling",
    "pipeline::unit::scatter",
    "pipeline::unit::chunk",
    "pipeline::unit",
    "pipeline::driver",
    "pipeline",
    // for other languages and libraries
    "registry",
    "ffi",
    "tch",
];

/// Paths of other crates, the modules that may use them (with all within), and why it is these. Of the crates named here nothing
/// else may be used anywhere.
const CRATES: &[(&str, &[&str], &str)] = &[
    ("tokio::runtime::Builder", &["runtime"], "threads are started in one place"),
    (
        "tokio::runtime::Runtime",
        &["runtime", "collection::open", "layout::read"],
        "others are handed it, to wait for reads while opening",
    ),
    ("tokio::task", &["layout::read", "store::local"], "tasks of the runtime that they are called on"),
    ("tokio::sync", &["fetch"], "budgets and depth are semaphores of tasks; none of them has threads"),
    ("tokio::spawn", &["fetch"], "on the runtime that fetching runs on"),
    ("rayon::ThreadPool", &["runtime"], "threads are started in one place"),
    ("rayon::ThreadPoolBuilder", &["runtime"], "threads are started in one place"),
    ("rayon::prelude", &["collection::open"], "loops in the pool that it is handed"),
    ("rayon::scope", &["collection::open"], "loops in the pool that it is handed"),
    ("cudarc", &["device::cuda"], "all else of `device` is tested without a GPU"),
    ("cxx", &["ffi"], "one place where nothing may panic"),
    ("hdf5_metno", &["layout::hdf5"], "libhdf5 reads through our guards, or not at all"),
    ("hdf5_metno_sys", &["layout::hdf5"], "libhdf5 reads through our guards, or not at all"),
    ("tch", &["tch"], "never part of the op library"),
    ("zarrs", &["decode", "layout"], "metadata and the general path; whoever is above sees chunks and elements"),
    ("blosc_src", &["decode"], "decoders stand in one room"),
    ("libdeflate_sys", &["decode"], "decoders stand in one room"),
    ("zstd", &["decode"], "decoders stand in one room"),
];

#[test]
fn modules_import_only_what_stands_before_them() {
    let sources = sources();
    let complaints = complaints(&sources, ORDER, CRATES);
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

// ---- what is wrong ---------------------------------------------------------------------------------------------------

/// A file of the library.
struct Source {
    /// As messages name it.
    file: String,
    /// `decode::blosc::header`; the root is "".
    module: String,
    text: String,
}

/// Everything in `src/` but tests in files of their own.
fn sources() -> Vec<Source> {
    fn walk(folder: &Path, src: &Path, into: &mut Vec<Source>) {
        for entry in fs::read_dir(folder).expect("a readable folder") {
            let path = entry.expect("a readable folder").path();
            let name = path.to_str().expect("names are ASCII");
            if path.is_dir() {
                walk(&path, src, into);
            } else if path.extension().is_some_and(|end| end == "rs") && !name.ends_with("_tests.rs") {
                let inside = path.strip_prefix(src).expect("within src").with_extension("");
                let parts: Vec<_> = inside.iter().map(|part| part.to_str().expect("ASCII")).collect();
                let parts = parts.strip_suffix(&["mod"]).unwrap_or(&parts);
                let module = if parts == ["lib"] { String::new() } else { parts.join("::") };
                let file = format!("src/{}.rs", inside.display());
                into.push(Source { file, module, text: fs::read_to_string(&path).expect("text") });
            }
        }
    }
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    walk(&src, &src, &mut found);
    found.sort_by(|a, b| a.file.cmp(&b.file));
    found
}

/// What is wrong with the imports of these sources, a line each; the order stands behind them.
fn complaints(sources: &[Source], order: &[&str], crates: &[(&str, &[&str], &str)]) -> Vec<String> {
    let modules: HashMap<&str, Parsed> = sources.iter().map(|s| (s.module.as_str(), parse(&s.text))).collect();
    let only_tests: HashSet<String> =
        modules.iter().flat_map(|(module, parsed)| parsed.only_tests.iter().map(|child| join(module, child))).collect();
    let house = House { modules };
    let place = |module: &str| order.iter().position(|m| *m == module);
    let mut found = Vec::new();
    for name in order {
        if !house.modules.contains_key(name) {
            found.push(format!("`{name}` stands in the order and is no module"));
        } else if order.iter().filter(|m| m == &name).count() > 1 {
            found.push(format!("`{name}` stands in the order twice"));
        }
    }
    for Source { file, module, .. } in sources.iter().filter(|s| !s.module.is_empty() && !only_tests.contains(&s.module)) {
        let Some(own) = place(module) else {
            found.push(format!("{file}: `{module}` has no place in the order: put it behind all that it imports"));
            continue;
        };
        let parsed = &house.modules[module.as_str()];
        let is_only_given_out = |import: &Import| {
            let is_used = |(name, known): (&String, &Import)| known == import && parsed.used.contains(name);
            import.is_given_out && !parsed.names.iter().any(is_used)
        };
        for import in &parsed.imports {
            let (at, path) = (format!("{file}:{}", import.line), import.segments.join("::"));
            match house.target(module, import) {
                Target::Module(target) if target == *module || (is_only_given_out(import) && is_within(&target, module)) => {}
                Target::Module(target) if only_tests.contains(&target) => {
                    found.push(format!("{at}: `{module}` imports `{path}`; `{target}` is there for tests only"));
                }
                Target::Module(target) => {
                    if place(&target).is_none_or(|place| place > own) {
                        found.push(format!("{at}: `{module}` imports `{path}`; `{target}` stands behind it in the order"));
                    }
                }
                Target::Crate => found.extend(foreign(&at, module, &path, crates)),
                Target::Known => {}
            }
        }
    }
    if !found.is_empty() {
        let mut text = "the order, in which each module imports only from those before it (tests/architecture.rs):".to_owned();
        let mut room = "";
        for module in order {
            let (first, rest) = module.split_once("::").unwrap_or((module, ""));
            let separator = if first == room { "," } else { "\n   " };
            let _ = write!(text, "{separator} {}", if first == room && !rest.is_empty() { rest } else { module });
            room = first;
        }
        found.push(text);
    }
    found
}

/// What is wrong with the use of another crate's path.
fn foreign(at: &str, module: &str, path: &str, crates: &[(&str, &[&str], &str)]) -> Option<String> {
    let named = path.split("::").next().unwrap_or_default();
    let of_crate: Vec<_> = crates.iter().filter(|(known, ..)| known.split("::").next() == Some(named)).collect();
    if of_crate.is_empty() {
        return None;
    }
    let Some((known, rooms, why)) = of_crate.iter().find(|(known, ..)| is_within(path, known)) else {
        let known: Vec<_> = of_crate.iter().map(|(known, ..)| *known).collect();
        return Some(format!(
            "{at}: `{module}` uses `{path}`; of `{named}` only {} are used, in rooms of their own",
            known.join(", ")
        ));
    };
    let allowed = rooms.iter().any(|room| is_within(module, room));
    (!allowed).then(|| format!("{at}: `{module}` uses `{path}`; `{known}` belongs to {}: {why}", rooms.join(", ")))
}

/// Whether a path is another one or lies within it.
fn is_within(path: &str, other: &str) -> bool {
    path.strip_prefix(other).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

fn join(module: &str, child: &str) -> String {
    if module.is_empty() { child.to_owned() } else { format!("{module}::{child}") }
}

// ---- where a path leads ----------------------------------------------------------------------------------------------

/// What is known of all modules.
struct House<'a> {
    modules: HashMap<&'a str, Parsed>,
}

#[derive(Debug, PartialEq)]
enum Target {
    /// The module in which the item is written.
    Module(String),
    /// Another crate.
    Crate,
    /// A name that the module has from elsewhere, or a type of its own.
    Known,
}

/// Longer chains of names that are given on go in a circle.
const MAX_CHAIN: usize = 16;

impl House<'_> {
    /// Where a path leads that is written in `module`.
    fn target(&self, module: &str, import: &Import) -> Target {
        if import.is_extern {
            return Target::Crate;
        }
        let parsed = &self.modules[module];
        match import.segments[0].as_str() {
            "crate" | "self" | "super" => {}
            first if self.modules.contains_key(join(module, first).as_str()) => {}
            first if parsed.names.contains_key(first) || parsed.inline.contains(first) => return Target::Known,
            _ => return Target::Crate,
        }
        Target::Module(self.written_in(module, &import.inside, &import.segments, MAX_CHAIN))
    }

    /// The module in which the item is written that `segments` name in `module`, there in the modules `inside` of its file.
    fn written_in(&self, module: &str, inside: &[String], segments: &[String], chain: usize) -> String {
        let (mut module, mut inside, mut left) = (module.to_owned(), inside.len(), segments);
        while let Some(step @ ("crate" | "self" | "super")) = left.first().map(String::as_str) {
            match step {
                "crate" => (module, inside) = (String::new(), 0),
                "super" if inside > 0 => inside -= 1,
                "super" => module = module.rsplit_once("::").map_or(String::new(), |(parent, _)| parent.to_owned()),
                _ => {}
            }
            left = &left[1..];
        }
        while let Some(first) = left.first() {
            let child = join(&module, first);
            if self.modules.contains_key(child.as_str()) {
                (module, left) = (child, &left[1..]);
                continue;
            }
            // a name that the module has from elsewhere
            let Some(import) = self.modules.get(module.as_str()).and_then(|parsed| parsed.names.get(first)) else { break };
            let internal = ["crate", "self", "super"].contains(&import.segments[0].as_str())
                || self.modules.contains_key(join(&module, &import.segments[0]).as_str());
            if import.is_extern || !internal || chain == 0 {
                break;
            }
            let whole: Vec<String> = import.segments.iter().chain(&left[1..]).cloned().collect();
            return self.written_in(&module, &import.inside, &whole, chain - 1);
        }
        module
    }
}

// ---- what a file says ------------------------------------------------------------------------------------------------

/// A `use`, or a path where something is named.
#[derive(Debug, Clone, PartialEq)]
struct Import {
    line: usize,
    segments: Vec<String>,
    /// Begins with `::`.
    is_extern: bool,
    /// A `pub use`.
    is_given_out: bool,
    /// Modules of the file itself in which it stands.
    inside: Vec<String>,
}

/// A file.
#[derive(Debug, Default)]
struct Parsed {
    imports: Vec<Import>,
    /// Names that `use` declarations make known in the file's own module.
    names: HashMap<String, Import>,
    /// Names that stand in the code, at the front of a path or alone.
    used: HashSet<String>,
    /// Modules that are written in the file.
    inline: HashSet<String>,
    /// Modules in files of their own that are there for tests.
    only_tests: Vec<String>,
}

#[derive(Debug, Clone, PartialEq)]
struct Token {
    line: usize,
    text: String,
}

impl Token {
    fn is(&self, text: &str) -> bool {
        self.text == text
    }

    fn is_name(&self) -> bool {
        self.text.starts_with(|c: char| c.is_alphabetic() || c == '_')
    }
}

/// Names, numbers, `::` and single characters; no comments, texts or lifetimes.
fn tokens(text: &str) -> Vec<Token> {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let (mut found, mut i, mut line) = (Vec::new(), 0, 1);
    while i < chars.len() {
        let start = i;
        match at(i) {
            '/' if at(i + 1) == '/' => {
                while i < chars.len() && at(i) != '\n' {
                    i += 1;
                }
            }
            '/' if at(i + 1) == '*' => {
                let mut depth = 0;
                loop {
                    match (at(i), at(i + 1)) {
                        ('/', '*') => (depth, i) = (depth + 1, i + 2),
                        ('*', '/') => (depth, i) = (depth - 1, i + 2),
                        _ => i += 1,
                    }
                    if depth == 0 || i >= chars.len() {
                        break;
                    }
                }
            }
            '"' => i = end_of_text(&chars, i),
            '\'' if at(i + 1) == '\\' => {
                i += 3;
                while i < chars.len() && at(i) != '\'' {
                    i += 1;
                }
                i += 1;
            }
            '\'' if at(i + 2) == '\'' => i += 3,
            '\'' => {
                i += 1;
                while is_word(at(i)) {
                    i += 1;
                }
            }
            c if is_word(c) => {
                while is_word(at(i)) {
                    i += 1;
                }
                let word: String = chars[start..i].iter().collect();
                let hashes = chars[i..].iter().take_while(|&&c| c == '#').count();
                if matches!(word.as_str(), "r" | "br" | "cr") && at(i + hashes) == '"' {
                    let close: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
                    i += hashes + 1;
                    while i < chars.len() && !chars[i..].starts_with(&close) {
                        i += 1;
                    }
                    i += close.len();
                } else if matches!(word.as_str(), "b" | "c") && at(i) == '"' {
                    i = end_of_text(&chars, i);
                } else if word == "r" && hashes == 1 {
                    // the name behind is one like others
                    i += 1;
                } else {
                    found.push(Token { line, text: word });
                }
            }
            ':' if at(i + 1) == ':' => {
                i += 2;
                found.push(Token { line, text: "::".into() });
            }
            c => {
                i += 1;
                if !c.is_whitespace() {
                    found.push(Token { line, text: c.into() });
                }
            }
        }
        line += chars[start..i.min(chars.len())].iter().filter(|&&c| c == '\n').count();
    }
    found
}

/// Where the text ends that begins with the quote at `i`.
fn end_of_text(chars: &[char], mut i: usize) -> usize {
    i += 1;
    while i < chars.len() && chars[i] != '"' {
        i += if chars[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

fn parse(text: &str) -> Parsed {
    let tokens = tokens(text);
    let is = |i: usize, text: &str| tokens.get(i).is_some_and(|token| token.is(text));
    let mut parsed = Parsed::default();
    // modules that are open, and the depth of their braces
    let (mut inside, mut depth): (Vec<(String, usize)>, usize) = (Vec::new(), 0);
    let mut is_given_out = false;
    let mut i = 0;
    while let Some(token) = tokens.get(i) {
        let is_behind = |word: &str| i > 0 && is(i - 1, word);
        if token.is_name() && !["::", ".", "mod"].iter().any(|word| is_behind(word)) {
            parsed.used.insert(token.text.clone());
        }
        let names = || inside.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
        match token.text.as_str() {
            "#" if is(i + 1, "[") && is_for_tests(&tokens[i + 2..end_of_group(&tokens, i + 1)]) => {
                let mut item = end_of_group(&tokens, i + 1);
                while is(item, "#") {
                    item = end_of_group(&tokens, item + 1);
                }
                i = end_of_item(&tokens, item);
                if let Some(name) = (item..i).find(|&at| is(at, "mod")) {
                    parsed.only_tests.push(tokens[name + 1].text.clone());
                }
                continue;
            }
            "pub" => {
                is_given_out = true;
                // `pub(in crate::…)` names who may see it
                i = if is(i + 1, "(") { end_of_group(&tokens, i + 1) } else { i + 1 };
                if !is(i, "use") {
                    is_given_out = false;
                }
                continue;
            }
            "use" => {
                let end = (i..tokens.len()).find(|&at| is(at, ";")).unwrap_or(tokens.len());
                let mut tree = Vec::new();
                leaves(&tokens[i + 1..end], &[], &mut tree);
                for Leaf { line, mut segments, is_extern, name } in tree {
                    if segments.last().is_some_and(|last| last == "self") && segments.len() > 1 {
                        segments.pop();
                    }
                    let name = name.or_else(|| segments.last().cloned()).filter(|name| name != "*");
                    let import = Import { line, segments, is_extern, is_given_out, inside: names() };
                    if let Some(name) = name.filter(|_| inside.is_empty()) {
                        parsed.names.insert(name, import.clone());
                    }
                    parsed.imports.push(import);
                }
                (is_given_out, i) = (false, end);
            }
            "mod" if is(i + 2, "{") => {
                inside.push((tokens[i + 1].text.clone(), depth));
                parsed.inline.insert(tokens[i + 1].text.clone());
                i += 1;
            }
            "{" => depth += 1,
            "}" => {
                depth = depth.saturating_sub(1);
                inside.pop_if(|(_, outer)| *outer == depth);
            }
            "::" if tokens.get(i + 1).is_some_and(Token::is_name) && !(i > 0 && (tokens[i - 1].is_name() || is(i - 1, ">"))) => {
                let (segments, end) = path(&tokens, i + 1);
                parsed.imports.push(Import { line: token.line, segments, is_extern: true, is_given_out: false, inside: names() });
                i = end;
                continue;
            }
            _ if token.is_name() && is(i + 1, "::") && !(i > 0 && is(i - 1, "::")) => {
                let (segments, end) = path(&tokens, i);
                if segments.len() > 1 && segments[0] != "Self" {
                    let (line, inside) = (token.line, names());
                    parsed.imports.push(Import { line, segments, is_extern: false, is_given_out: false, inside });
                }
                i = end;
                continue;
            }
            _ => {}
        }
        i += 1;
    }
    parsed
}

/// The names of a path that begins at `i`, and where it ends.
fn path(tokens: &[Token], mut i: usize) -> (Vec<String>, usize) {
    let mut segments = vec![tokens[i].text.clone()];
    i += 1;
    while tokens.get(i).is_some_and(|t| t.is("::")) && tokens.get(i + 1).is_some_and(Token::is_name) {
        segments.push(tokens[i + 1].text.clone());
        i += 2;
    }
    (segments, i)
}

/// Whether what `cfg` asks for is only there in tests.
fn is_for_tests(attribute: &[Token]) -> bool {
    attribute.first().is_some_and(|t| t.is("cfg"))
        && attribute.iter().any(|t| t.is("test"))
        && !attribute.iter().any(|t| t.is("not") || t.is("any"))
}

/// Behind the bracket that closes the one at `i`.
fn end_of_group(tokens: &[Token], i: usize) -> usize {
    let mut depth = 0usize;
    for (at, token) in tokens.iter().enumerate().skip(i) {
        match token.text.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 0 {
            return at + 1;
        }
    }
    tokens.len()
}

/// Behind the item, statement or field that begins at `i`.
fn end_of_item(tokens: &[Token], i: usize) -> usize {
    const DECLARATIONS: [&str; 14] =
        ["pub", "fn", "struct", "enum", "impl", "mod", "use", "const", "static", "type", "trait", "unsafe", "let", "macro_rules"];
    let begins = |word: &str| tokens.get(i).is_some_and(|t| t.is(word));
    let is_field = !DECLARATIONS.iter().any(|word| begins(word))
        || (begins("pub") && !(i..i + 8).any(|at| tokens.get(at).is_some_and(|t| DECLARATIONS[1..].contains(&t.text.as_str()))));
    let ends_with_braces = !["use", "let", "const", "static", "type"]
        .iter()
        .any(|word| begins(word) || (begins("pub") && tokens[i..].iter().take(8).any(|t| t.is(word))));
    let mut at = i;
    while let Some(token) = tokens.get(at) {
        match token.text.as_str() {
            ";" => return at + 1,
            "," if is_field => return at + 1,
            "}" => return at,
            "{" if ends_with_braces => return end_of_group(tokens, at),
            "(" | "[" | "{" => at = end_of_group(tokens, at),
            _ => at += 1,
        }
    }
    at
}

/// One path of a tree of imports.
struct Leaf {
    line: usize,
    segments: Vec<String>,
    is_extern: bool,
    /// Behind `as`.
    name: Option<String>,
}

/// Adds the paths of `a::{b, c::{self, d as e}}` behind `before`.
fn leaves(tree: &[Token], before: &[String], into: &mut Vec<Leaf>) {
    let is_extern = before.is_empty() && tree.first().is_some_and(|t| t.is("::"));
    let mut segments = before.to_vec();
    let (mut i, mut line, mut name) = (0, 0, None);
    while let Some(token) = tree.get(i) {
        match token.text.as_str() {
            "{" => {
                let end = end_of_group(tree, i);
                let (mut begin, mut at) = (i + 1, i + 1);
                let known = into.len();
                while at < end {
                    let is_end = at == end - 1;
                    if is_end || tree[at].is(",") {
                        if begin < at {
                            leaves(&tree[begin..at], &segments, into);
                        }
                        begin = at + 1;
                    }
                    at = if tree[at].is("{") { end_of_group(tree, at) } else { at + 1 };
                }
                into[known..].iter_mut().for_each(|leaf| leaf.is_extern |= is_extern);
                return;
            }
            "as" => {
                name = tree.get(i + 1).map(|t| t.text.clone());
                break;
            }
            "::" => {}
            _ => {
                segments.push(token.text.clone());
                line = token.line;
            }
        }
        i += 1;
    }
    into.push(Leaf { line, segments, is_extern, name });
}

// ---- that this finds what it is there to find -----------------------------------------------------------------------

/// The complaints about sources, without the order behind them.
fn about(sources: &[(&str, &str)], order: &[&str], crates: &[(&str, &[&str], &str)]) -> Vec<String> {
    let source = |(module, text): &(&str, &str)| Source {
        file: format!("src/{}.rs", module.replace("::", "/")),
        module: (*module).to_owned(),
        text: (*text).to_owned(),
    };
    let mut found = complaints(&sources.iter().map(source).collect::<Vec<_>>(), order, crates);
    if let Some(order) = found.pop() {
        assert!(order.starts_with("the order"), "{order}");
    }
    found
}

#[test]
fn an_import_in_the_wrong_direction_is_told_with_its_file_line_and_the_order() {
    let sources = [
        ("low", "//! Low.\n\nuse crate::{\n    high::{self, deep::{Bottom, Top}},\n};\n"),
        ("high", "mod deep;\n"),
        ("high::deep", ""),
    ];
    let source =
        |(module, text): &(&str, &str)| Source { file: format!("src/{module}.rs"), module: (*module).into(), text: (*text).into() };
    let found = complaints(&sources.iter().map(source).collect::<Vec<_>>(), &["low", "high::deep", "high"], &[]);
    assert_eq!(
        found,
        [
            "src/low.rs:4: `low` imports `crate::high`; `high` stands behind it in the order",
            "src/low.rs:4: `low` imports `crate::high::deep::Bottom`; `high::deep` stands behind it in the order",
            "src/low.rs:4: `low` imports `crate::high::deep::Top`; `high::deep` stands behind it in the order",
            "the order, in which each module imports only from those before it (tests/architecture.rs):\n    low\n    high::deep, high",
        ]
    );
    assert_eq!(complaints(&sources.iter().map(source).collect::<Vec<_>>(), &["high::deep", "high", "low"], &[]), [""; 0]);
}

#[test]
fn paths_in_expressions_types_and_macros_count() {
    let order = ["low", "room::low", "room", "room::high", "high"];
    let rest = [("room", "mod low; mod high;"), ("room::high", ""), ("high", ""), ("low", "")];
    for text in [
        "fn f() { crate::high::g::<u8>(); }",
        "fn f(_: Vec<super::high::T>) {}",
        "fn f() { let x = if y < crate::high::N { 'a' } else { '\\'' }; }",
        "impl<'a> T for super::super::high::U<'a> {}",
        "macro_rules! m { () => { $crate::high::g() }; }",
        "mod inner { use super::super::high::T; }",
        "fn f() { use crate::high::T; }",
        "use super::high as low;",
        "use super::high::*;",
        "const TEXT: &str = r#\"\"{\"#; use crate::high::T;",
    ] {
        let found = about(&[&[("room::low", text)], &rest[..]].concat(), &order, &[]);
        assert_eq!(found.len(), 1, "{text}: {found:?}");
        assert!(found[0].starts_with("src/room/low.rs:1: `room::low` imports"), "{found:?}");
    }
}

#[test]
fn comments_texts_visibility_and_tests_do_not_count() {
    let text = r##"
        //! [`high`](crate::high)
        /* crate::high /* crate::high */ use crate::high; */
        pub(in crate::high) fn f<'crate_>() -> &'static str { "crate::high" }
        const A: &str = r#"use crate::high; " "#;
        const B: (char, char, &[u8]) = ('"', '\'', b"\" crate::high");
        #[cfg(test)]
        use crate::{high::T, high::U};
        #[cfg(all(test, feature = "x"))]
        #[path = "low_tests.rs"]
        mod tests { use crate::high; fn f() { crate::high::g(); } }
        #[cfg(test)]
        pub(crate) mod fake;
        struct S { #[cfg(test)] seen: crate::high::T, other: u8 }
        fn g<A, B>() { #[cfg(test)] crate::high::note(|| { () }); let low::T = 1; }
        #[cfg(test)]
        impl<A, B> S { fn h(&self) -> crate::high::T { crate::high::T } }
    "##;
    let sources = [("low", text), ("low::fake", "use crate::high;"), ("high", "use crate::low::{self};")];
    assert_eq!(about(&sources, &["low", "high"], &[]), [""; 0]);
    let behind = format!("{text}\nuse crate::high::T;");
    let found = about(&[("low", &behind), sources[1], sources[2]], &["low", "high"], &[]);
    assert_eq!(found, ["src/low.rs:19: `low` imports `crate::high::T`; `high` stands behind it in the order"]);
}

#[test]
fn what_a_parent_gives_out_stands_where_it_is_written() {
    let child = ("room::child", "use super::Parents;\nuse super::Siblings;\nuse super::Far;");
    let sibling = ("room::sibling", "");
    let far = ("room::far", "");
    let order = ["room", "room::sibling", "room::child", "room::far"];
    let only_given_out = (
        "room",
        "mod child; mod sibling; mod far;\npub use child::Childs;\npub use sibling::Siblings;\npub(crate) use far::{Far};\npub struct Parents;",
    );
    let found = about(&[only_given_out, child, sibling, far], &order, &[]);
    assert_eq!(found, ["src/room/child.rs:3: `room::child` imports `super::Far`; `room::far` stands behind it in the order"]);
    // what is also used, or not given out, is imported
    let used = ("room", "mod child; mod sibling; mod far;\npub use child::Childs;\npub struct Parents(Childs);");
    let near = ("room::child", "use super::Parents;");
    let found = about(&[used, near, sibling, far], &order, &[]);
    assert_eq!(found, ["src/room.rs:2: `room` imports `child::Childs`; `room::child` stands behind it in the order"]);
    let by_path = ("room", "mod child; mod sibling; mod far;\nfn f() -> u8 { child::g() }\npub struct Parents;");
    let found = about(&[by_path, near, sibling, far], &order, &[]);
    assert_eq!(found, ["src/room.rs:2: `room` imports `child::g`; `room::child` stands behind it in the order"]);
}

#[test]
fn crates_stay_in_their_rooms() {
    let crates: &[(&str, &[&str], &str)] = &[
        ("pool::Handle", &["threads", "reads"], "handed on"),
        ("pool::start", &["threads"], "in one place"),
        ("gpu", &["device"], "alone"),
    ];
    let sources = [
        ("threads", "use pool::{Handle, start};"),
        ("reads", "use pool::Handle;\nfn f() { ::pool::start(); }\nuse pool::other;"),
        ("reads::deep", "use gpu::sys;\n#[gpu::bridge]\nmod m {}"),
        ("device", "use gpu::sys;\nuse ::gpu::driver::{self, Error as E};"),
    ];
    let order = ["threads", "reads", "reads::deep", "device"];
    assert_eq!(
        about(&sources, &order, crates),
        [
            "src/reads.rs:2: `reads` uses `pool::start`; `pool::start` belongs to threads: in one place",
            "src/reads.rs:3: `reads` uses `pool::other`; of `pool` only pool::Handle, pool::start are used, in rooms of their own",
            "src/reads/deep.rs:1: `reads::deep` uses `gpu::sys`; `gpu` belongs to device: alone",
            "src/reads/deep.rs:2: `reads::deep` uses `gpu::bridge`; `gpu` belongs to device: alone",
        ]
    );
}

#[test]
fn every_module_has_one_place() {
    let sources = [("low", "#[cfg(test)]\nmod fake;\nuse self::fake::F;"), ("low::fake", ""), ("new", "")];
    assert_eq!(
        about(&sources, &["low", "gone", "low"], &[]),
        [
            "`low` stands in the order twice",
            "`gone` stands in the order and is no module",
            "`low` stands in the order twice",
            "src/low.rs:3: `low` imports `self::fake::F`; `low::fake` is there for tests only",
            "src/new.rs: `new` has no place in the order: put it behind all that it imports",
        ]
    );
}
