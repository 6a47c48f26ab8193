//! States by number: what stands behind the state tensors of the op library.
//!
//! Ids are never reused. A state tensor is recognised by its id *and* its data pointer, so that a clone or
//! an unpickled copy of one is refused rather than advancing somebody's stream. After a fork the child gets
//! fresh tables and never touches the inherited ones (their locks may be held by threads it does not have).

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use crate::base::error::{Error, Result};
use crate::base::fork;
use crate::base::lock::lock;
use crate::pipeline::Pipeline;
use crate::runtime::Runtime;

/// Smallest and largest length of a state tensor.
const LAYOUT_NUMBERS: std::ops::RangeInclusive<i64> = 2..=65_536;

static NEXT_ID: AtomicI64 = AtomicI64::new(1);
static TABLES: AtomicPtr<Tables> = AtomicPtr::new(std::ptr::null_mut());

/// The tables of one process.
pub(crate) struct Tables {
    states: Mutex<HashMap<i64, State>>,
    layouts: Mutex<Layouts>,
    pub(crate) runtimes: Mutex<HashMap<(usize, usize), Weak<Runtime>>>,
    generation: u64,
    first_id: i64,
}

struct State {
    pipeline: Arc<Pipeline>,
    address: usize,
}

#[derive(Default)]
struct Layouts {
    number_of: HashMap<String, i64>,
    layout_of: HashMap<i64, String>,
}

/// This process's tables.
pub(crate) fn tables() -> &'static Tables {
    let generation = fork::generation();
    let current = TABLES.load(Ordering::Acquire);
    // SAFETY: tables are leaked, so any pointer that was ever stored stays valid.
    if let Some(tables) = unsafe { current.as_ref() }
        && tables.generation == generation
    {
        return tables;
    }
    let fresh = Box::leak(Box::new(Tables {
        states: Mutex::default(),
        layouts: Mutex::default(),
        runtimes: Mutex::default(),
        generation,
        first_id: NEXT_ID.load(Ordering::Relaxed),
    }));
    match TABLES.compare_exchange(current, fresh, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => fresh,
        // another thread of this process was first; one leaked empty table is the price of lock-freedom
        // SAFETY: as above; whoever stored it stored tables of this generation or a later one.
        Err(theirs) => unsafe { &*theirs },
    }
}

impl Tables {
    fn states(&self) -> MutexGuard<'_, HashMap<i64, State>> {
        lock(&self.states)
    }

    fn layouts(&self) -> MutexGuard<'_, Layouts> {
        lock(&self.layouts)
    }

    /// Registers a pipeline, not yet bound to a tensor.
    pub(crate) fn insert(&self, pipeline: Pipeline) -> i64 {
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        self.states().insert(id, State { pipeline: Arc::new(pipeline), address: 0 });
        id
    }

    /// Says which data pointer may present `id`.
    pub(crate) fn bind(&self, id: i64, address: usize) -> Result<()> {
        self.states().get_mut(&id).ok_or_else(|| self.unknown(id))?.address = address;
        Ok(())
    }

    /// The pipeline behind a state tensor.
    pub(crate) fn get(&self, id: i64, address: usize) -> Result<Arc<Pipeline>> {
        let states = self.states();
        let state = states.get(&id).ok_or_else(|| self.unknown(id))?;
        if state.address != address {
            return Err(Error::closed(
                "this tensor is a copy of a state tensor; pass the tensor that open or stream returned, itself",
            ));
        }
        Ok(Arc::clone(&state.pipeline))
    }

    /// The pipeline with this id, without a tensor to show.
    pub(crate) fn get_unbound(&self, id: i64) -> Result<Arc<Pipeline>> {
        self.states().get(&id).map(|s| Arc::clone(&s.pipeline)).ok_or_else(|| self.unknown(id))
    }

    /// Takes a state out of the table.
    pub(crate) fn remove(&self, id: i64) -> Option<Arc<Pipeline>> {
        self.states().remove(&id).map(|s| s.pipeline)
    }

    /// Closes all states, then takes them out: one whose tensor dies meanwhile is still found here and
    /// waited for, because its lent buffers die with it.
    pub(crate) fn close_all(&self) {
        let open: Vec<(i64, Arc<Pipeline>)> = self.states().iter().map(|(id, s)| (*id, Arc::clone(&s.pipeline))).collect();
        for (id, pipeline) in open {
            pipeline.close();
            self.states().remove(&id);
        }
    }

    fn unknown(&self, id: i64) -> Error {
        let message = if id > 0 && id < self.first_id {
            format!("state {id} was opened in the parent process; open it again after the fork")
        } else if id > 0 && id < NEXT_ID.load(Ordering::Relaxed) {
            format!("state {id} is closed; open a new one")
        } else {
            format!("{id} is no state of this process; a state tensor cannot be made, copied or unpickled, only opened")
        };
        Error::closed(message)
    }

    /// A number for this layout: a hash of its content, so that it is the same in every process and a
    /// compiled graph cached by one is right in another; moved on by one where two layouts collide.
    pub(crate) fn layout_number(&self, layout: &str) -> i64 {
        let mut layouts = self.layouts();
        if let Some(&number) = layouts.number_of.get(layout) {
            return number;
        }
        let (first, last) = LAYOUT_NUMBERS.into_inner();
        // FNV-1a (Fowler, Noll, Vo)
        let hash = layout.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let span = (last - first + 1) as u64;
        let number = (0..span)
            .map(|i| first + (hash.wrapping_add(i) % span) as i64)
            .find(|n| !layouts.layout_of.contains_key(n))
            // more layouts than numbers: sharing one costs a wrong guess in a fake, nothing else
            .unwrap_or(first);
        layouts.number_of.insert(layout.to_owned(), number);
        layouts.layout_of.insert(number, layout.to_owned());
        number
    }

    /// The layout with this number.
    pub(crate) fn layout(&self, number: i64) -> Result<String> {
        self.layouts().layout_of.get(&number).cloned().ok_or_else(|| {
            Error::argument("state", format!("no layout has number {number}; a state tensor comes from open or stream"))
        })
    }
}
