//! A driver for tests. Its memory is the host's; its streams are queues that do nothing by themselves.
//!
//! Work is done when a test says so ([`Fake::step`], any order that events allow), or as far as somebody who waits for an
//! event needs it: the laziest GPU there can be. Kernels are the real ones, compiled for the CPU. Every call can be made to
//! fail. What a real GPU would answer with wrong data or a crash is noted in [`Fake::violations`]: memory used after it was
//! freed, host memory changed before a copy has read it, waits for events that were never recorded, calls by threads that
//! have not entered, what is left at the end.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use super::driver::{Before, Called, DevicePtr, Driver, EventHandle, Fault, Function, Grid, Module, OUT_OF_MEMORY, Stream};
#[cfg(target_os = "linux")]
use super::numa;
use super::on_cpu::OnCpu;
use crate::base::lock::lock;

thread_local! {
    static ENTERED: Cell<u32> = const { Cell::new(0) };
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Work {
    Record { event: EventHandle, ticket: u64 },
    Wait { event: EventHandle, ticket: u64 },
    Copy { dst: u64, src: u64, bytes: u64, sum: Option<u64> },
    Zero { dst: u64, bytes: u64 },
    Launch { function: Function, parameters: Vec<u64> },
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// Device memory, by its first address.
    device: BTreeMap<u64, Vec<u64>>,
    /// Of these, what torch has.
    torch: Vec<u64>,
    host: HashMap<u64, Vec<u64>>,
    /// Numbers of blocks in the order in which they were made, by their first address.
    numbers: BTreeMap<u64, u64>,
    failed: Option<&'static str>,
    streams: BTreeMap<u64, VecDeque<Work>>,
    /// Streams that were destroyed with work in them.
    leaving: Vec<u64>,
    /// The last record of each event.
    events: BTreeMap<u64, u64>,
    timed: HashSet<u64>,
    /// Records that were passed. A wait is for the record that was the last when it was called.
    passed: HashSet<u64>,
    functions: Vec<(OnCpu, String)>,
    modules: Vec<(u64, OnCpu)>,
    /// Calls until one fails.
    fails_in: Option<u64>,
    fails_with: u32,
    /// All further calls fail as well.
    stays_broken: bool,
    /// Blocks of host memory that were taken near the device.
    near: u64,
    device_limit: u64,
    host_limit: u64,
    violations: Vec<String>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Fake {
    state: Mutex<State>,
    /// Outside of the lock, for a forked child to look at.
    calls: AtomicU64,
}

fn sum_of(address: u64, bytes: u64) -> u64 {
    // SAFETY: callers have checked that the range is allocated.
    let bytes = unsafe { std::slice::from_raw_parts(address as *const u8, bytes as usize) };
    let add = |sum: u64, word: &[u8]| word.iter().fold(sum.rotate_left(5), |s, b| s.wrapping_mul(31).wrapping_add(u64::from(*b)));
    // copies of a test are of one value throughout, or short
    bytes.chunks(64).fold(0, |sum, block| add(sum, &block[..block.len().min(8)]))
}

impl State {
    fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn violate(&mut self, what: String) {
        self.violations.push(what);
    }

    /// Notes and counts a call; its fault, if it is to fail.
    fn call(&mut self, name: &'static str) -> Called<()> {
        if ENTERED.get() == 0 {
            self.violate(format!("{name} by a thread that has not entered"));
        }
        match &mut self.fails_in {
            Some(0) => {
                if !self.stays_broken {
                    self.fails_in = None;
                }
                self.failed.get_or_insert(name);
                Err(Fault { code: self.fails_with, reason: format!("FAKE_FAULT in {name}") })
            }
            Some(n) => {
                *n -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn number(&mut self, address: u64) {
        let number = self.fresh();
        self.numbers.insert(address, number);
    }

    /// A name for an address that is the same in every run.
    fn name(&self, address: u64) -> String {
        let (start, number) = self.numbers.range(..=address).next_back().map_or((0, 0), |(s, n)| (*s, *n));
        format!("{number}+{}", address - start)
    }

    fn is_device_range(&self, address: u64, bytes: u64) -> bool {
        let block = self.device.range(..=address).next_back();
        block.is_some_and(|(start, block)| address + bytes <= start + 8 * block.len() as u64)
    }

    fn check_range(&mut self, what: &str, address: u64, bytes: u64) -> bool {
        let inside = self.is_device_range(address, bytes);
        if !inside {
            self.violate(format!("{what} touches {bytes} bytes at {address:#x}, which are not allocated"));
        }
        inside
    }

    fn runnable(&self, stream: u64) -> bool {
        match self.streams.get(&stream).and_then(VecDeque::front) {
            Some(Work::Wait { ticket, .. }) => self.passed.contains(ticket),
            Some(_) => true,
            None => false,
        }
    }

    /// Does the first thing in a stream.
    fn step(&mut self, stream: u64) {
        let Some(work) = self.streams.get_mut(&stream).and_then(VecDeque::pop_front) else { return };
        match work {
            Work::Record { ticket, .. } => {
                self.passed.insert(ticket);
            }
            Work::Wait { .. } => {}
            Work::Copy { dst, src, bytes, sum } => {
                if !self.check_range("the end of a copy", dst, bytes)
                    || (sum.is_none() && !self.check_range("the start of a copy", src, bytes))
                {
                    return;
                }
                if sum.is_some_and(|sum| sum != sum_of(src, bytes)) {
                    self.violate("host memory changed before the copy had read it".into());
                }
                // SAFETY: both ranges are allocated: checked above, and host memory by the sum at the time of the call.
                unsafe { std::ptr::copy(src as *const u8, dst as *mut u8, bytes as usize) };
            }
            Work::Zero { dst, bytes } => {
                if self.check_range("a zeroing", dst, bytes) {
                    // SAFETY: the range is allocated.
                    unsafe { std::ptr::write_bytes(dst as *mut u8, 0, bytes as usize) };
                }
            }
            Work::Launch { function, parameters } => {
                let (kernels, name) = self.functions[function.0 as usize].clone();
                if self.modules.is_empty() {
                    self.violate("a kernel runs whose module was unloaded".into());
                }
                let ranges = match (name.strip_prefix("widen_"), &parameters[..]) {
                    (Some(types), &[from, to, n]) => {
                        let size = if types.ends_with("64") { 8 } else { 4 };
                        vec![(from, if types.starts_with("u8") { n } else { 2 * n }), (to, size * n)]
                    }
                    // numbers are small in tests; what is not allocated at all would be no block's
                    _ => parameters.iter().filter(|p| **p > 1 << 32).map(|p| (*p, 0)).collect(),
                };
                if ranges.into_iter().all(|(address, bytes)| self.check_range("a kernel", address, bytes)) {
                    kernels.launch(&name, &parameters);
                }
            }
        }
    }

    /// Does what must be done before `stream` has `left` things in it.
    fn run(&mut self, stream: u64, left: usize) {
        while self.streams.get(&stream).is_some_and(|work| work.len() > left) {
            if !self.runnable(stream)
                && let Some(Work::Wait { event, ticket }) = self.streams[&stream].front().cloned()
            {
                self.pass(event, ticket);
                continue;
            }
            self.step(stream);
        }
    }

    /// Does what must be done before `event` has passed `ticket`.
    fn pass(&mut self, event: EventHandle, ticket: u64) {
        let wanted = Work::Record { event, ticket };
        let found = self.streams.iter().find_map(|(stream, work)| Some((*stream, work.iter().position(|w| *w == wanted)?)));
        let Some((stream, place)) = found else { panic!("{event:?} is waited for and nowhere recorded") };
        let left = self.streams[&stream].len() - place - 1;
        self.run(stream, left);
    }
}

impl Fake {
    pub(crate) fn new() -> std::sync::Arc<Self> {
        let state = State { next: 1000, device_limit: u64::MAX, host_limit: u64::MAX, ..State::default() };
        std::sync::Arc::new(Self { state: Mutex::new(state), calls: AtomicU64::new(0) })
    }

    /// The state, for a call.
    fn called(&self) -> MutexGuard<'_, State> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        self.state()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// The `n`th call from now fails with `code`; all after it too if `forever`.
    pub(crate) fn fail_in(&self, n: u64, code: u32, forever: bool) {
        let mut state = self.state();
        (state.fails_in, state.fails_with, state.stays_broken) = (Some(n), code, forever);
    }

    /// No call is made to fail any more; whether one that was to fail did not come.
    pub(crate) fn mend(&self) -> bool {
        let mut state = self.state();
        let left = state.fails_in.is_some() && !state.stays_broken;
        state.fails_in = None;
        left
    }

    pub(crate) fn limit_device(&self, bytes: u64) {
        self.state().device_limit = bytes;
    }

    pub(crate) fn limit_host(&self, bytes: u64) {
        self.state().host_limit = bytes;
    }

    pub(crate) fn violations(&self) -> Vec<String> {
        self.state().violations.clone()
    }

    pub(crate) fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }

    /// Blocks of host memory that were taken near the device.
    pub(crate) fn near(&self) -> u64 {
        self.state().near
    }

    /// The call that failed, if one did.
    pub(crate) fn failed(&self) -> Option<&'static str> {
        self.state().failed
    }

    /// A name for an address that is the same in every run.
    pub(crate) fn name(&self, address: u64) -> String {
        self.state().name(address)
    }

    pub(crate) fn device_bytes(&self) -> u64 {
        self.state().device.values().map(|block| 8 * block.len() as u64).sum()
    }

    /// What was made and not given back.
    pub(crate) fn left(&self) -> String {
        let s = self.state();
        format!(
            "{} device blocks, {} host blocks, {} events, {} streams, {} modules",
            s.device.len(),
            s.host.len(),
            s.events.len(),
            s.streams.keys().filter(|stream| !s.leaving.contains(stream)).count(),
            s.modules.len()
        )
    }

    /// Memory as torch's allocator gives it.
    pub(crate) fn torch_memory(&self, bytes: u64) -> u64 {
        let mut state = self.state();
        let mut block = vec![0xABAB_ABAB_ABAB_ABAB; (bytes as usize).div_ceil(8).max(1)];
        let address = block.as_mut_ptr() as u64;
        state.device.insert(address, block);
        state.number(address);
        state.torch.push(address);
        address
    }

    /// All of it is given back.
    pub(crate) fn state_forget_torch(&self) {
        let mut state = self.state();
        for address in std::mem::take(&mut state.torch) {
            state.device.remove(&address);
        }
    }

    pub(crate) fn forget_torch_memory(&self, address: u64) {
        self.state().device.remove(&address);
    }

    pub(crate) fn read(&self, address: u64, bytes: u64) -> Vec<u8> {
        assert!(self.state().is_device_range(address, bytes));
        // SAFETY: the range is allocated, and streams do nothing meanwhile.
        unsafe { std::slice::from_raw_parts(address as *const u8, bytes as usize) }.to_vec()
    }

    /// A stream as torch has it: made without a call of ours.
    pub(crate) fn torch_stream(&self) -> Stream {
        let mut state = self.state();
        let stream = state.fresh();
        state.streams.insert(stream, VecDeque::new());
        state.leaving.push(stream);
        Stream(stream)
    }

    /// Streams whose first thing can be done now.
    pub(crate) fn runnable(&self) -> Vec<u64> {
        let state = self.state();
        state.streams.keys().copied().filter(|&stream| state.runnable(stream)).collect()
    }

    /// Does the first thing in a stream; false when that waits or there is none.
    pub(crate) fn step(&self, stream: u64) -> bool {
        let mut state = self.state();
        let can = state.runnable(stream);
        if can {
            state.step(stream);
        }
        can
    }

    /// Does everything.
    pub(crate) fn run_all(&self) {
        while let Some(&stream) = self.runnable().first() {
            self.step(stream);
        }
    }

    /// What the GPU has before it and in its memory, for telling situations apart.
    pub(crate) fn situation(&self) -> String {
        let state = self.state();
        let describe = |work: &Work| match work {
            Work::Record { event, .. } => format!("record {}", event.0),
            Work::Wait { event, ticket } => format!("wait {} {}", event.0, state.passed.contains(ticket)),
            Work::Copy { dst, src, sum, .. } => format!("copy {} {} {sum:?}", state.name(*dst), state.name(*src)),
            other => format!("{other:?}"),
        };
        let streams: Vec<Vec<String>> = state.streams.values().map(|work| work.iter().map(describe).collect()).collect();
        let events: Vec<(u64, bool)> = state.events.iter().map(|(event, last)| (*event, state.passed.contains(last))).collect();
        let mut memory: Vec<_> = state.device.iter().map(|(address, b)| (state.numbers[address], b.iter().max(), b[0])).collect();
        memory.sort_unstable();
        format!("{streams:?} {events:?} {memory:?}")
    }
}

impl Driver for Fake {
    fn enter(&self) -> Called<Before> {
        ENTERED.set(ENTERED.get() + 1);
        let called = self.called().call("enter");
        if called.is_err() {
            ENTERED.set(ENTERED.get() - 1);
        }
        called.map(|()| Before(0))
    }

    fn leave(&self, _: Before) {
        ENTERED.set(ENTERED.get() - 1);
    }

    fn finish(&self) -> Called<()> {
        let mut state = self.called();
        state.call("finish")?;
        let streams: Vec<u64> = state.streams.keys().copied().collect();
        for stream in streams {
            state.run(stream, 0);
        }
        Ok(())
    }

    fn capability(&self) -> (u32, u32) {
        (9, 0)
    }

    fn numa_node(&self) -> Option<u32> {
        Some(0)
    }

    fn host_alloc(&self, bytes: usize) -> Called<NonNull<u8>> {
        let mut state = self.called();
        state.call("host_alloc")?;
        #[cfg(target_os = "linux")]
        if let Some(there) = numa::Preferring::node(0).and_then(|_there| numa::policy())
            && numa::policy() == Some(there)
        {
            state.near += 1;
        }
        let used: u64 = state.host.values().map(|block| 8 * block.len() as u64).sum();
        if used + bytes as u64 > state.host_limit {
            return Err(Fault { code: OUT_OF_MEMORY, reason: "CUDA_ERROR_OUT_OF_MEMORY: out of memory".into() });
        }
        // as unaligned as page-locked memory may be, and not cleared
        let mut block = vec![0xCDCD_CDCD_CDCD_CDCD_u64; bytes.div_ceil(8) + 32];
        let address = (block.as_mut_ptr() as u64).next_multiple_of(64);
        state.host.insert(address, block);
        state.number(address);
        Ok(NonNull::new(address as *mut u8).expect("an address"))
    }

    unsafe fn host_free(&self, ptr: NonNull<u8>) -> Called<()> {
        let mut state = self.called();
        state.call("host_free")?;
        let (start, len) = (ptr.as_ptr() as u64, state.host.get(&(ptr.as_ptr() as u64)).map_or(0, |b| 8 * b.len() as u64));
        let reads = |work: &Work| matches!(work, Work::Copy { src, .. } if (start..start + len).contains(src));
        if state.streams.values().flatten().any(reads) {
            state.violate("host memory freed before a copy has read it".into());
        }
        if state.host.remove(&start).is_none() {
            state.violate("host memory freed twice".into());
        }
        Ok(())
    }

    fn alloc(&self, bytes: u64) -> Called<DevicePtr> {
        let mut state = self.called();
        state.call("alloc")?;
        let used: u64 = state.device.values().map(|block| 8 * block.len() as u64).sum();
        if used + bytes > state.device_limit {
            return Err(Fault { code: OUT_OF_MEMORY, reason: "CUDA_ERROR_OUT_OF_MEMORY: out of memory".into() });
        }
        let mut block = vec![0xCDCD_CDCD_CDCD_CDCD; (bytes as usize).div_ceil(8)];
        let address = block.as_mut_ptr() as u64;
        state.device.insert(address, block);
        state.number(address);
        Ok(DevicePtr(address))
    }

    unsafe fn free(&self, ptr: DevicePtr) -> Called<()> {
        let mut state = self.called();
        state.call("free")?;
        let Some(block) = state.device.remove(&ptr.0) else {
            state.violate("device memory freed twice".into());
            return Ok(());
        };
        let range = ptr.0..ptr.0 + 8 * block.len() as u64;
        let uses = |work: &Work| match work {
            Work::Copy { dst, src, .. } => range.contains(dst) || range.contains(src),
            Work::Zero { dst, .. } => range.contains(dst),
            Work::Launch { parameters, .. } => parameters.iter().any(|address| range.contains(address)),
            _ => false,
        };
        if state.streams.values().flatten().any(uses) {
            state.violate("device memory freed before the work on it was done".into());
        }
        Ok(())
    }

    fn stream_create(&self) -> Called<Stream> {
        let mut state = self.called();
        state.call("stream_create")?;
        let stream = state.fresh();
        state.streams.insert(stream, VecDeque::new());
        Ok(Stream(stream))
    }

    unsafe fn stream_destroy(&self, stream: Stream) -> Called<()> {
        let mut state = self.called();
        state.call("stream_destroy")?;
        if state.streams.get(&stream.0).is_some_and(VecDeque::is_empty) {
            state.streams.remove(&stream.0);
        } else {
            state.leaving.push(stream.0);
        }
        Ok(())
    }

    fn event_create(&self, timed: bool) -> Called<EventHandle> {
        let mut state = self.called();
        state.call("event_create")?;
        let event = state.fresh();
        if timed {
            state.timed.insert(event);
        }
        state.events.insert(event, 0);
        Ok(EventHandle(event))
    }

    unsafe fn event_destroy(&self, event: EventHandle) -> Called<()> {
        let mut state = self.called();
        state.call("event_destroy")?;
        if state.events.remove(&event.0).is_none() {
            state.violate("an event destroyed twice".into());
        }
        Ok(())
    }

    unsafe fn record(&self, event: EventHandle, stream: Stream) -> Called<()> {
        let mut state = self.called();
        state.call("record")?;
        let ticket = state.fresh();
        *state.events.get_mut(&event.0).expect("a living event") = ticket;
        state.streams.get_mut(&stream.0).expect("a living stream").push_back(Work::Record { event, ticket });
        Ok(())
    }

    unsafe fn query(&self, event: EventHandle) -> Called<bool> {
        let mut state = self.called();
        state.call("query")?;
        Ok(state.passed.contains(&state.events[&event.0]))
    }

    unsafe fn synchronize(&self, event: EventHandle) -> Called<()> {
        let mut state = self.called();
        state.call("synchronize")?;
        let ticket = state.events[&event.0];
        if !state.passed.contains(&ticket) {
            state.pass(event, ticket);
        }
        Ok(())
    }

    unsafe fn elapsed_ns(&self, start: EventHandle, end: EventHandle) -> Called<u64> {
        let mut state = self.called();
        state.call("elapsed_ns")?;
        for event in [start.0, end.0] {
            if !state.timed.contains(&event) || !state.passed.contains(&state.events[&event]) {
                state.violate(format!("the time of event {event}, which has none"));
            }
        }
        Ok(1000)
    }

    unsafe fn stream_wait(&self, stream: Stream, event: EventHandle) -> Called<()> {
        let mut state = self.called();
        state.call("stream_wait")?;
        let ticket = state.events[&event.0];
        if ticket == 0 {
            state.violate("a stream waits for an event that was never recorded".into());
        }
        state.streams.get_mut(&stream.0).expect("a living stream").push_back(Work::Wait { event, ticket });
        Ok(())
    }

    unsafe fn h2d(&self, dst: DevicePtr, src: NonNull<u8>, bytes: u64, stream: Stream) -> Called<()> {
        let mut state = self.called();
        state.call("h2d")?;
        let src = src.as_ptr() as u64;
        let work = Work::Copy { dst: dst.0, src, bytes, sum: Some(sum_of(src, bytes)) };
        state.streams.get_mut(&stream.0).expect("a living stream").push_back(work);
        Ok(())
    }

    unsafe fn d2d(&self, dst: DevicePtr, src: DevicePtr, bytes: u64, stream: Stream) -> Called<()> {
        let mut state = self.called();
        state.call("d2d")?;
        let work = Work::Copy { dst: dst.0, src: src.0, bytes, sum: None };
        state.streams.get_mut(&stream.0).expect("a living stream").push_back(work);
        Ok(())
    }

    unsafe fn zero(&self, dst: DevicePtr, bytes: u64, stream: Stream) -> Called<()> {
        let mut state = self.called();
        state.call("zero")?;
        state.streams.get_mut(&stream.0).expect("a living stream").push_back(Work::Zero { dst: dst.0, bytes });
        Ok(())
    }

    /// The image is the source.
    fn module_load(&self, image: &[u8]) -> Called<Module> {
        let mut state = self.called();
        state.call("module_load")?;
        let module = state.fresh();
        let kernels = OnCpu::compile(std::str::from_utf8(image).expect("source")).expect("a C++ compiler");
        state.modules.push((module, kernels));
        Ok(Module(module))
    }

    unsafe fn module_unload(&self, module: Module) -> Called<()> {
        let mut state = self.called();
        state.call("module_unload")?;
        if state.streams.values().flatten().any(|work| matches!(work, Work::Launch { .. })) {
            state.violate("machine code given back before the kernels had run".into());
        }
        state.modules.retain(|(m, _)| *m != module.0);
        Ok(())
    }

    unsafe fn function(&self, module: Module, name: &str) -> Called<Function> {
        let mut state = self.called();
        state.call("function")?;
        let (_, kernels) = *state.modules.iter().find(|(m, _)| *m == module.0).expect("a loaded module");
        state.functions.push((kernels, name.to_owned()));
        Ok(Function(state.functions.len() as u64 - 1))
    }

    unsafe fn launch(&self, function: Function, _: Grid, parameters: &[u64], stream: Stream) -> Called<()> {
        let mut state = self.called();
        state.call("launch")?;
        let work = Work::Launch { function, parameters: parameters.to_vec() };
        state.streams.get_mut(&stream.0).expect("a living stream").push_back(work);
        Ok(())
    }
}
