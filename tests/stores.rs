//! What every store must do, whatever lies behind it: one suite that all of them pass.

mod reference;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use annbatch::arena::Pool;
use annbatch::store::{self, Entry, LocalStore, MemoryStore, OpenFiles, RangeRead, Standing, Store};
use annbatch::{Error, Result};
use proptest::prelude::*;
use reference::moody::{Mood, Moody};

type Objects = BTreeMap<&'static str, Vec<u8>>;

/// Gives a store of one object of these bytes.
type OfOne = Box<dyn Fn(&[u8]) -> Arc<dyn Store>>;

fn bytes(n: usize, seed: u64) -> Vec<u8> {
    (0..n as u64).map(|i| ((i + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// Objects of several depths, lengths and names: none, one byte, a page, more than a read.
fn objects() -> Objects {
    [
        ("zarr.json", bytes(300, 1)),
        ("c/0/0", bytes(100_000, 2)),
        ("c/0/1", bytes(4096, 3)),
        ("c/1/0", bytes(1, 4)),
        ("c/10/12", bytes(8191, 5)),
        ("c/2/deep/er", bytes(10, 6)),
        ("c.0.1", bytes(20, 7)),
        ("empty", Vec::new()),
        ("other/0", bytes(5, 8)),
    ]
    .into()
}

fn write(root: &Path, objects: &Objects) {
    for (key, bytes) in objects {
        let path = root.join(key);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}

fn any(_: &str) -> bool {
    true
}

fn of_chunks(name: &str) -> bool {
    name.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'c' | b'.'))
}

/// Keys and sizes, sorted; the order of a listing means nothing.
fn listed(store: &dyn Store, prefix: &str, depth: usize, wanted: &dyn Fn(&str) -> bool) -> Vec<(String, Option<u64>)> {
    let mut found: Vec<_> = store.list(prefix, depth, wanted).unwrap().into_iter().map(|Entry { key, size }| (key, size)).collect();
    found.sort();
    found
}

/// What is below `prefix`, by the obvious way.
fn expected(objects: &Objects, prefix: &str, depth: usize, wanted: &dyn Fn(&str) -> bool) -> Vec<(String, Option<u64>)> {
    let mut found = BTreeMap::new();
    for (key, bytes) in objects {
        let Some(rest) = (if prefix.is_empty() { Some(*key) } else { key.strip_prefix(&format!("{prefix}/")) }) else { continue };
        let names: Vec<&str> = rest.split('/').collect();
        for n in 1..=names.len().min(depth) {
            if names[..n].iter().all(|name| wanted(name)) {
                let size = (n == names.len()).then_some(bytes.len() as u64);
                found.insert(names[..n].join("/"), size);
            }
        }
    }
    found.into_iter().collect()
}

/// The bytes of one range.
fn read_one(store: &Arc<dyn Store>, key: &str, range: Range<u64>) -> Result<Vec<u8>> {
    read(store, key, &[range]).map(|mut all| all.remove(0))
}

/// The bytes of ranges of one object, by one call of the store.
fn read(store: &Arc<dyn Store>, key: &str, ranges: &[Range<u64>]) -> Result<Vec<Vec<u8>>> {
    let pool = Pool::new(0);
    let reads = ranges.iter().map(|range| RangeRead::new(&**store, range.clone(), &pool)).collect::<Result<Vec<_>>>()?;
    for read in &reads {
        assert!(read.span.start <= read.range.start && read.range.end <= read.span.end, "the span holds what is wanted");
        let alignment = store.io_shape().alignment_bytes;
        assert!(read.span.start.is_multiple_of(alignment) && read.span.end.is_multiple_of(alignment));
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).max_blocking_threads(4).build().unwrap();
    let done = runtime.block_on(Arc::clone(store).read_ranges(key.into(), reads))?;
    assert_eq!(done.len(), ranges.len(), "as many reads come back");
    Ok(done
        .into_iter()
        .zip(ranges)
        .map(|(mut read, range)| {
            assert_eq!(read.range, *range, "in the same order");
            read.wanted_mut().to_vec()
        })
        .collect())
}

/// Holds a store of [`objects`], and what gives a store of one object alone, against what all stores do.
fn conforms(store: &Arc<dyn Store>, of_one: &dyn Fn(&[u8]) -> Arc<dyn Store>) {
    let objects = objects();
    says_how_to_read(&**store);
    looks_and_lists(&**store, &objects);
    gives_whole_objects(&**store, &objects);
    reads_ranges(store, &objects);
    refuses_what_is_not_there(store);
    serves_several_threads(store, &objects);
    is_one_object(of_one);
}

fn says_how_to_read(store: &dyn Store) {
    let shape = store.io_shape();
    assert!(shape.alignment_bytes >= 1 && shape.depth >= 1);
    assert!(shape.joined.target_read_bytes > shape.joined.max_gap_bytes, "a gap is no whole read");
    assert_eq!(shape, store.io_shape(), "it stays");
}

fn looks_and_lists(store: &dyn Store, objects: &Objects) {
    for (key, bytes) in objects {
        assert_eq!(store.look(key).unwrap(), Some(Standing::Object(bytes.len() as u64)), "{key}");
    }
    for prefix in ["", "c", "c/2/deep", "other"] {
        assert_eq!(store.look(prefix).unwrap(), Some(Standing::Prefix), "{prefix}");
    }
    for nothing in ["none", "c/0/2", "zarr", "zarr.json/below", "other/0/1"] {
        assert_eq!(store.look(nothing).unwrap(), None, "{nothing}");
    }
    for wanted in [&any as &dyn Fn(&str) -> bool, &of_chunks, &|name| name != "c", &|_| false] {
        for prefix in ["", "c", "c/0", "c/2", "other"] {
            for depth in 1..5 {
                assert_eq!(listed(store, prefix, depth, wanted), expected(objects, prefix, depth, wanted), "{prefix:?}, {depth}");
            }
        }
    }
    assert!(matches!(store.list("none", 3, &any), Err(Error::NotFound { .. })), "a prefix that is not there");
}

fn gives_whole_objects(store: &dyn Store, objects: &Objects) {
    for (key, bytes) in objects {
        assert_eq!(store.get(key).unwrap().as_ref(), Some(bytes), "{key}");
        let opened = store.open(key).unwrap();
        for range in [0..0, 0..bytes.len(), bytes.len() / 3..bytes.len() / 2, bytes.len()..bytes.len()] {
            let mut into = vec![0; range.len()];
            opened.read_at(range.start as u64, &mut into).unwrap();
            assert_eq!(into, bytes[range]);
        }
        let past = opened.read_at(bytes.len() as u64, &mut [0]).unwrap_err();
        assert!(past.to_string().contains(&store.display(key)), "{past} names {}", store.display(key));
    }
    assert_eq!(store.get("none").unwrap(), None);
    assert_eq!(store.get("zarr.json/below").unwrap(), None);
    assert!(matches!(store.open("none"), Err(Error::NotFound { .. })));
}

fn reads_ranges(store: &Arc<dyn Store>, objects: &Objects) {
    for (key, bytes) in objects {
        let n = bytes.len() as u64;
        // whole, empty, overlapping, in falling order, the same twice
        let ranges = [0..n, 0..0, n..n, n / 2..n, n / 3..n / 2 + n / 4, 0..n / 2, 0..n / 2];
        for (range, got) in ranges.iter().zip(read(store, key, &ranges).unwrap()) {
            assert_eq!(got, bytes[range.start as usize..range.end as usize], "{key} {range:?}");
        }
        assert_eq!(read(store, key, &[]).unwrap(), Vec::<Vec<u8>>::new());
    }
    let bytes = &objects["c/0/0"];
    proptest!(ProptestConfig::with_cases(16), |(ends in prop::collection::vec((0usize..=100_000, 0usize..=100_000), 1..40))| {
        let ranges: Vec<Range<u64>> = ends.iter().map(|&(a, b)| a.min(b) as u64..a.max(b) as u64).collect();
        for (range, got) in ranges.iter().zip(read(store, "c/0/0", &ranges).unwrap()) {
            prop_assert_eq!(&got[..], &bytes[range.start as usize..range.end as usize]);
        }
    });
}

fn refuses_what_is_not_there(store: &Arc<dyn Store>) {
    // never a short buffer: the range is named, even if another of the call could be read
    for (key, range) in [("c/0/1", 4000..4097), ("c/0/1", 5000..6000), ("empty", 0..1), ("c/1/0", 0..2)] {
        for ranges in [vec![range.clone()], vec![0..0, range.clone()]] {
            let error = read(store, key, &ranges).unwrap_err().to_string();
            let place = format!("bytes {}..{}", range.start, range.end);
            assert!(error.contains(&store.display(key)) && error.contains(&place), "{error} names {key} and {place}");
        }
    }
    for key in ["none", "c/0/2", "other/none"] {
        assert!(matches!(read_one(store, key, 0..1), Err(Error::NotFound { .. })), "{key}");
    }
}

fn serves_several_threads(store: &Arc<dyn Store>, objects: &Objects) {
    std::thread::scope(|scope| {
        for first in 0..4usize {
            scope.spawn(move || {
                for (key, bytes) in objects.iter().cycle().skip(first).take(objects.len()) {
                    let n = bytes.len() as u64;
                    assert_eq!(read(store, key, &[0..n, n / 2..n]).unwrap(), [&bytes[..], &bytes[bytes.len() / 2..]]);
                    assert_eq!(store.get(key).unwrap().as_ref(), Some(bytes));
                }
            });
        }
    });
}

fn is_one_object(of_one: &dyn Fn(&[u8]) -> Arc<dyn Store>) {
    let whole = bytes(9000, 9);
    let store = of_one(&whole);
    assert_eq!(store.look("").unwrap(), Some(Standing::Object(9000)));
    assert_eq!(store.get("").unwrap().as_ref(), Some(&whole));
    match store.pin() {
        Ok(n) => assert_eq!((n, store.pin().unwrap()), (9000, 9000)),
        Err(e) => assert!(matches!(e, Error::Unsupported { .. }), "{e}"),
    }
    assert_eq!(read(&store, "", &[1..5000, 8999..9000]).unwrap(), [&whole[1..5000], &whole[8999..]]);
    assert!(store.list("", 1, &any).is_err(), "an object has nothing below it");
}

fn local(direct: bool) -> (tempfile::TempDir, Arc<dyn Store>, OfOne) {
    let dir = tempfile::tempdir().unwrap();
    let (several, one) = (dir.path().join("several"), dir.path().join("one"));
    write(&several, &objects());
    let files = OpenFiles::new(3);
    let store = store::at(several.to_str().unwrap(), &files, direct).unwrap();
    let of_one = move |bytes: &[u8]| {
        std::fs::write(&one, bytes).unwrap();
        store::at(one.to_str().unwrap(), &files, direct).unwrap()
    };
    (dir, store, Box::new(of_one))
}

fn memory() -> (Arc<dyn Store>, OfOne) {
    let all = objects().into_iter().map(|(key, bytes)| (key.to_owned(), bytes));
    let one = |bytes: &[u8]| Arc::new(MemoryStore::new("one", [(String::new(), bytes.to_vec())])) as Arc<dyn Store>;
    (Arc::new(MemoryStore::new("several", all)), Box::new(one))
}

fn moody(inner: Arc<dyn Store>, mood: &Arc<Mood>) -> Arc<dyn Store> {
    Arc::new(Moody { inner, mood: Arc::clone(mood) })
}

#[test]
fn files_conform() {
    let (_dir, store, of_one) = local(false);
    conforms(&store, &of_one);
}

#[test]
fn files_read_past_the_page_cache_conform() {
    let (_dir, store, of_one) = local(true);
    assert!(store.io_shape().alignment_bytes >= 4096);
    conforms(&store, &of_one);
}

#[test]
fn memory_conforms() {
    let (store, of_one) = memory();
    conforms(&store, &of_one);
}

#[test]
fn a_store_that_counts_conforms_and_counts() {
    let mood = Arc::new(Mood::default());
    let (store, of_one) = memory();
    let store = moody(store, &mood);
    conforms(&store, &|bytes| moody(of_one(bytes), &mood));
    let count = || (mood.reads.load(Ordering::SeqCst), mood.bytes.load(Ordering::SeqCst), mood.calls.load(Ordering::SeqCst));
    assert!(of_one(&[1]).pin().is_ok() && moody(of_one(&[1]), &mood).pin().is_ok(), "a wrapper pins what it wraps");
    let before = count();
    read(&store, "c/0/1", &[0..10, 5..25]).unwrap();
    let after = count();
    assert_eq!((after.0 - before.0, after.1 - before.1, after.2 - before.2), (2, 30, 1));
}

#[test]
fn a_store_that_is_slow_conforms() {
    let mood = Arc::new(Mood::default());
    mood.latency_us.store(50, Ordering::SeqCst);
    let (_dir, store, of_one) = local(false);
    conforms(&moody(store, &mood), &|bytes| moody(of_one(bytes), &mood));
    assert!(mood.took_ns.load(Ordering::SeqCst) >= 50_000 * mood.done.load(Ordering::SeqCst));
}

/// Told to fail nothing it conforms; what it is told to fail is an error, and nothing else is.
#[test]
fn a_store_that_fails_conforms_until_it_does() {
    let mood = Arc::new(Mood::default());
    let all = [("data".to_owned(), bytes(1000, 1))];
    let failing = moody(Arc::new(MemoryStore::new("X/data", all)), &mood);
    let (store, of_one) = memory();
    conforms(&moody(store, &mood), &|bytes| moody(of_one(bytes), &mood));
    mood.fail_from.store(500, Ordering::SeqCst);
    assert!(read_one(&failing, "data", 0..499).is_ok());
    assert!(matches!(read(&failing, "data", &[0..10, 500..600]), Err(Error::Io { .. })));
}

#[test]
fn urls_are_refused_with_the_remedy() {
    for place in ["s3://bucket/a.zarr", "https://example.org/a.h5ad", "gs://b/c"] {
        let error = store::at(place, &OpenFiles::new(1), false).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }));
        assert!(error.to_string().contains(place) && error.to_string().contains("copy it"), "{error}");
    }
    for place in ["a://b:c/../d", "C://x", "a b://c", "plain", "/abs/olute", "one:two"] {
        // one letter is no scheme, and names with blanks are paths
        assert!(store::at(place, &OpenFiles::new(1), false).is_ok(), "{place}");
    }
}

#[test]
fn what_holds_nothing_lists_nothing() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("empty")).unwrap();
    let local = LocalStore::new(dir.path(), OpenFiles::new(1));
    assert_eq!(listed(&local, "", 3, &any), [("empty".to_owned(), None)]);
    assert_eq!(listed(&local, "empty", 3, &any), []);
    assert_eq!(local.look("empty").unwrap(), Some(Standing::Prefix));
    assert_eq!(listed(&MemoryStore::new("nothing", []), "", 3, &any), []);
}

/// What a pinned file became is never read for what it was, whichever way it is read.
#[test]
fn a_pinned_file_that_is_replaced_is_an_error() {
    for direct in [false, true] {
        let (_dir, _, of_one) = local(direct);
        let store = of_one(&bytes(9000, 9));
        let first = read_one(&store, "", 0..10).unwrap();
        assert_eq!((store.pin().unwrap(), &first[..]), (9000, &bytes(9000, 9)[..10]));
        store.open("").unwrap();
        of_one(&bytes(8000, 8));
        let errors = [read_one(&store, "", 0..10).unwrap_err(), store.open("").unwrap_err(), store.pin().unwrap_err()];
        for error in errors.map(|e| e.to_string()) {
            assert!(error.contains("replaced or changed"), "{error}");
        }
    }
}

/// A place that is a URL names its dataset or element; one that leads nowhere says what was expected.
#[test]
fn places_that_no_store_reads_are_named() {
    let open = |path: &str| {
        let sampling = r#"{"kind":"submitted"}"#;
        reference::open(&reference::config(&[path.to_owned()], sampling, "")).unwrap_err().to_string()
    };
    let url = open("s3://bucket/a.zarr");
    assert!(url.contains("dataset") && url.contains("s3://bucket/a.zarr") && url.contains("copy it"), "{url}");
    for nowhere in ["/nowhere/at/all", &format!("/{}", "long".repeat(200))] {
        let error = open(nowhere);
        assert!(error.contains(nowhere) && error.contains("expected an .h5ad file"), "{error}");
    }
}

/// A directory that links back to one above it is an error where it is walked, and nothing where it is not.
#[test]
fn links_in_a_circle_are_an_error_and_dangling_ones_have_no_size() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &objects());
    std::os::unix::fs::symlink(dir.path(), dir.path().join("c/9")).unwrap();
    std::os::unix::fs::symlink(dir.path().join("nowhere"), dir.path().join("c/8")).unwrap();
    let store = LocalStore::new(dir.path(), OpenFiles::new(2));
    let error = store.list("", 6, &any).unwrap_err().to_string();
    assert!(error.contains("links back"), "{error}");
    let entries = listed(&store, "", 6, &|name| name != "9");
    assert!(entries.contains(&("c/8".to_owned(), None)));
    assert!(entries.iter().all(|(key, _)| !key.starts_with("c/9")));
}
