//! The threads of this process: one pool that decodes, one runtime that reads.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, Weak};

use crate::base::error::{Error, Result, catch};
use crate::base::fork;
use crate::base::lock::lock;
use crate::base::machine::{default_threads, niceness, set_niceness, set_patient};
use crate::store::{IoShape, OpenFiles};

/// Of decoding threads, which open files too: libhdf5 calls itself for each type within a type, of which the 64 KiB of a
/// hostile file's header hold 8,000.
const STACK_BYTES: usize = 16 << 20;

/// Threads shared by every collection that asks for the same numbers of them.
#[derive(Debug)]
pub struct Runtime {
    /// `Some` until dropped.
    threads: Option<Threads>,
    n_threads: usize,
    io_depth: usize,
    files: Arc<OpenFiles>,
    generation: u64,
}

#[derive(Debug)]
struct Threads {
    decode: rayon::ThreadPool,
    io: tokio::runtime::Runtime,
}

type Shared = HashMap<(usize, usize), Weak<Runtime>>;

impl Runtime {
    /// The runtime with that many decoding threads and reads in flight, started if need be.
    ///
    /// Reads share one depth, whatever stores they are of: many collections share a runtime, and its threads start before
    /// any store is known. The user's `io_depth` wins; without it, it is that of local stores, the only kind there is at a
    /// place. Gaps, targets and alignment are each store's own, also where one collection has several.
    pub fn get(threads: Option<usize>, io_depth: Option<usize>, shared: &Mutex<Shared>) -> Result<Arc<Self>> {
        let threads = threads.unwrap_or_else(default_threads);
        let io_depth = io_depth.unwrap_or(IoShape::LOCAL.depth);
        let mut shared = lock(shared);
        if let Some(runtime) = shared.get(&(threads, io_depth)).and_then(Weak::upgrade) {
            return Ok(runtime);
        }
        let runtime = Arc::new(Self::start(threads, io_depth)?);
        shared.retain(|_, weak| weak.strong_count() > 0);
        shared.insert((threads, io_depth), Arc::downgrade(&runtime));
        Ok(runtime)
    }

    /// A runtime of its own, its threads at work.
    pub fn start(n_threads: usize, io_depth: usize) -> Result<Self> {
        // tokio panics where the system has no more threads to give
        fork::uninterrupted(|| catch(|| Self::start_threads(n_threads, io_depth))).map_err(|e| {
            let why = if let Error::Internal { message } = e { message } else { e.to_string() };
            let message = format!("{why}; raise the limit of processes (ulimit -u), or ask for fewer threads");
            Error::Io { at: "threads".into(), source: Arc::new(io::Error::other(message)) }
        })
    }

    fn start_threads(n_threads: usize, io_depth: usize) -> Result<Self> {
        let fail = |e: &dyn std::fmt::Display| Error::Internal { message: e.to_string() };
        let niceness = niceness();
        let decode = rayon::ThreadPoolBuilder::new()
            .num_threads(n_threads)
            .thread_name(|i| format!("annbatch-decode-{i}"))
            .start_handler(move |_| {
                set_niceness(niceness);
                set_patient();
            })
            .stack_size(STACK_BYTES)
            // tasks catch their own panics; whatever still escapes must not abort the host program
            .panic_handler(|_| {})
            .build()
            .map_err(|e| fail(&e))?;
        let io = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(io_depth)
            .thread_name("annbatch-io")
            .on_thread_start(move || set_niceness(niceness))
            .build()
            .map_err(|e| fail(&e))?;
        // whatever these libraries make once per process is made by now
        decode.broadcast(|_| ());
        io.block_on(io.spawn_blocking(|| ())).map_err(|e| fail(&e))?;
        let files = OpenFiles::for_this_process();
        Ok(Self { threads: Some(Threads { decode, io }), n_threads, io_depth, files, generation: fork::generation() })
    }

    fn threads(&self) -> &Threads {
        self.threads.as_ref().expect("threads live as long as the runtime")
    }

    /// The decoding threads.
    pub fn decode(&self) -> &rayon::ThreadPool {
        &self.threads().decode
    }

    /// The reading threads.
    pub fn io(&self) -> &tokio::runtime::Runtime {
        &self.threads().io
    }

    /// Number of decoding threads.
    pub fn n_threads(&self) -> usize {
        self.n_threads
    }

    /// Reads in flight at once.
    pub fn io_depth(&self) -> usize {
        self.io_depth
    }

    /// Handles of files being read.
    pub fn files(&self) -> &Arc<OpenFiles> {
        &self.files
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        let Some(threads) = self.threads.take() else { return };
        if self.generation != fork::generation() {
            // the threads stayed in the parent; waiting for them would hang
            std::mem::forget(threads);
            return;
        }
        // the last holder may be one of these threads, so nothing here may wait
        threads.io.shutdown_background();
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;
    use crate::base::machine::NICENESS;

    /// Blocking threads are started by reading ones, which are nicer already.
    #[test]
    fn all_threads_are_as_nice() {
        let expected = niceness();
        let own = || niceness() - NICENESS;
        let runtime = Runtime::start(2, 4).unwrap();
        assert_eq!(runtime.decode().broadcast(|_| own()), [expected; 2]);
        // SAFETY: looks at the calling thread.
        let policy = || unsafe { libc::sched_getscheduler(0) };
        let patient = if policy() == libc::SCHED_OTHER { libc::SCHED_BATCH } else { policy() };
        assert_eq!(runtime.decode().broadcast(|_| policy()), [patient; 2]);
        let reading = runtime.io().spawn(async move { (own(), tokio::task::spawn_blocking(own).await.unwrap()) });
        assert_eq!(runtime.io().block_on(reading).unwrap(), (expected, expected));
    }
}
