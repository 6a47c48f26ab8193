//! A file driver of libhdf5's of our own: whatever libhdf5 reads of a file goes through a [`Guard`].
//!
//! The declarations are those of `H5FDdevelop.h` with a class of version 1; libhdf5 refuses to register one of another
//! version than its own. The bindings have an earlier layout.

use std::cell::Cell;
use std::ffi::{CString, c_char, c_int, c_uint, c_ulong, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::{Arc, OnceLock};

use hdf5_metno::plist::FileAccess;
use hdf5_metno::sync::sync;
use hdf5_metno::{File, from_id, h5check};
use hdf5_metno_sys::h5::{haddr_t, herr_t, hsize_t};
use hdf5_metno_sys::h5f::{H5F_ACC_RDONLY, H5F_close_degree_t, H5Fopen};
use hdf5_metno_sys::h5i::hid_t;
use hdf5_metno_sys::h5p::{H5Pget_driver_info, H5Pset_driver};

use super::guard::Guard;

const CLASS_VERSION: c_uint = 1;
/// Of the numbers that are free for testing.
const CLASS_VALUE: c_int = 511;
/// Of `H5FD_mem_t`.
const N_MEMORY_TYPES: usize = 7;

/// What libhdf5 knows of an open file, `H5FD_t`.
#[repr(C)]
struct Public {
    driver_id: hid_t,
    class: *const Class,
    number: c_ulong,
    access_flags: c_uint,
    feature_flags: c_ulong,
    max_address: haddr_t,
    base_address: haddr_t,
    threshold: hsize_t,
    alignment: hsize_t,
    paged_aggregation: bool,
}

/// A file that libhdf5 has open.
#[repr(C)]
struct Opened {
    public: Public,
    /// End of what libhdf5 takes for the file.
    end: haddr_t,
    guard: Arc<Guard>,
}

/// `H5FD_class_t`. Callbacks that only other kinds of drivers have are pointers here, and null.
#[repr(C)]
struct Class {
    version: c_uint,
    value: c_int,
    name: *const c_char,
    max_address: haddr_t,
    close_degree: H5F_close_degree_t,
    terminate: *const c_void,
    superblock: [*const c_void; 3],
    access_list_size: usize,
    access_list: [*const c_void; 3],
    transfer_list_size: usize,
    transfer_list: [*const c_void; 2],
    open: unsafe extern "C" fn(*const c_char, c_uint, hid_t, haddr_t) -> *mut Opened,
    close: unsafe extern "C" fn(*mut Opened) -> herr_t,
    compare: unsafe extern "C" fn(*const Opened, *const Opened) -> c_int,
    query: unsafe extern "C" fn(*const Opened, *mut c_ulong) -> herr_t,
    type_map: *const c_void,
    allocate: [*const c_void; 2],
    get_end: unsafe extern "C" fn(*const Opened, c_int) -> haddr_t,
    set_end: unsafe extern "C" fn(*mut Opened, c_int, haddr_t) -> herr_t,
    file_bytes: unsafe extern "C" fn(*const Opened, c_int) -> haddr_t,
    handle: *const c_void,
    read: unsafe extern "C" fn(*mut Opened, c_int, hid_t, haddr_t, usize, *mut u8) -> herr_t,
    write: unsafe extern "C" fn(*mut Opened, c_int, hid_t, haddr_t, usize, *const u8) -> herr_t,
    vectors_and_selections: [*const c_void; 4],
    flush_and_truncate: [*const c_void; 2],
    lock: unsafe extern "C" fn(*mut Opened, bool) -> herr_t,
    unlock: unsafe extern "C" fn(*mut Opened) -> herr_t,
    delete_and_control: [*const c_void; 2],
    free_lists: [c_int; N_MEMORY_TYPES],
}

unsafe extern "C" {
    fn H5FDregister(class: *const Class) -> hid_t;
}

/// How files are opened: read only, without a lock.
#[derive(Debug)]
pub(super) struct Access(FileAccess);

impl Access {
    pub(super) fn new() -> hdf5_metno::Result<Self> {
        // cluster file systems refuse locks, and nothing is written here
        FileAccess::build().file_locking(false).finish().map(Self)
    }

    /// Opens a file for reading through `guard`.
    pub(super) fn open(&self, path: &str, guard: &Arc<Guard>) -> hdf5_metno::Result<File> {
        let path = CString::new(path).map_err(|e| e.to_string())?;
        let info: *const Guard = Arc::as_ptr(guard);
        let opened = sync(|| {
            let driver = driver()?;
            // SAFETY: an open list, a registered driver, and what that one expects: the address of a guard, which libhdf5
            // copies. The guard outlives the call of H5Fopen, in which `open_file` takes it.
            unsafe {
                h5check(H5Pset_driver(self.0.id(), driver, (&raw const info).cast()))?;
                h5check(H5Fopen(path.as_ptr(), H5F_ACC_RDONLY, self.0.id()))
            }
        })?;
        // SAFETY: a file that was opened here, and belongs to nobody else.
        unsafe { from_id(opened) }
    }
}

/// The driver's number, for as long as the process runs; called behind libhdf5's lock.
fn driver() -> hdf5_metno::Result<hid_t> {
    static DRIVER: OnceLock<hid_t> = OnceLock::new();
    if let Some(&driver) = DRIVER.get() {
        return Ok(driver);
    }
    let none = ptr::null();
    let class = Class {
        version: CLASS_VERSION,
        value: CLASS_VALUE,
        name: c"annbatch".as_ptr(),
        max_address: i64::MAX as u64,
        close_degree: H5F_close_degree_t::H5F_CLOSE_WEAK,
        terminate: none,
        superblock: [none; 3],
        access_list_size: size_of::<*const Guard>(),
        access_list: [none; 3],
        transfer_list_size: 0,
        transfer_list: [none; 2],
        open: open_file,
        close,
        compare,
        query,
        type_map: none,
        allocate: [none; 2],
        get_end,
        set_end,
        file_bytes,
        handle: none,
        read,
        write,
        vectors_and_selections: [none; 4],
        flush_and_truncate: [none; 2],
        lock,
        unlock,
        delete_and_control: [none; 2],
        // nothing is allocated in the file
        free_lists: [0; N_MEMORY_TYPES],
    };
    // SAFETY: a class as libhdf5 declares it, which it copies, with a name that is never freed.
    let driver = h5check(unsafe { H5FDregister(&raw const class) })?;
    Ok(*DRIVER.get_or_init(|| driver))
}

thread_local! {
    /// Whether libhdf5 followed a link to another file, which was not opened, in a call of this thread.
    static ASKED_FOR_ANOTHER: Cell<bool> = const { Cell::new(false) };
}

/// Whether a link to another file was followed on this thread since this was last asked.
pub(super) fn asked_for_another() -> bool {
    ASKED_FOR_ANOTHER.take()
}

/// Runs a callback; no panic may cross.
fn guarded<T>(failed: T, callback: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(callback)).unwrap_or(failed)
}

unsafe extern "C" fn open_file(_: *const c_char, _: c_uint, access: hid_t, _: haddr_t) -> *mut Opened {
    guarded(ptr::null_mut(), || {
        // SAFETY: libhdf5 gives the list of the call.
        let info = unsafe { H5Pget_driver_info(access) }.cast::<*const Guard>();
        // another file, to which a link leads: it has no guard, and is not read
        if info.is_null() {
            ASKED_FOR_ANOTHER.set(true);
            return ptr::null_mut();
        }
        // SAFETY: the guard of the call of `open` that is under way.
        let guard = unsafe {
            Arc::increment_strong_count(*info);
            Arc::from_raw(*info)
        };
        let public = Public {
            driver_id: 0,
            class: ptr::null(),
            number: 0,
            access_flags: 0,
            feature_flags: 0,
            max_address: 0,
            base_address: 0,
            threshold: 0,
            alignment: 0,
            paged_aggregation: false,
        };
        Box::into_raw(Box::new(Opened { public, end: 0, guard }))
    })
}

unsafe extern "C" fn close(file: *mut Opened) -> herr_t {
    guarded(-1, || {
        // SAFETY: made by `open_file`, and closed once.
        drop(unsafe { Box::from_raw(file) });
        0
    })
}

/// Every file that is opened is one of its own, so that nothing that was read for one purpose serves another.
unsafe extern "C" fn compare(a: *const Opened, b: *const Opened) -> c_int {
    a.cmp(&b) as c_int
}

unsafe extern "C" fn query(_: *const Opened, flags: *mut c_ulong) -> herr_t {
    // no buffering of metadata: the guard is to see each piece by itself
    // SAFETY: null, or a place for the answer.
    if let Some(flags) = unsafe { flags.as_mut() } {
        *flags = 0;
    }
    0
}

unsafe extern "C" fn get_end(file: *const Opened, _: c_int) -> haddr_t {
    // SAFETY: a file that is open.
    unsafe { (*file).end }
}

unsafe extern "C" fn set_end(file: *mut Opened, _: c_int, end: haddr_t) -> herr_t {
    // SAFETY: a file that is open; libhdf5 has one thread in it at a time.
    unsafe { (*file).end = end };
    0
}

unsafe extern "C" fn file_bytes(file: *const Opened, _: c_int) -> haddr_t {
    // SAFETY: a file that is open.
    unsafe { (*file).guard.file_bytes() }
}

unsafe extern "C" fn read(file: *mut Opened, memory: c_int, _: hid_t, address: haddr_t, n: usize, into: *mut u8) -> herr_t {
    guarded(-1, || {
        // SAFETY: a file that is open, and a buffer of `n` bytes that libhdf5 lends; it is filled with zeros first, as it need
        // not be initialized.
        let (file, into) = unsafe {
            ptr::write_bytes(into, 0, n);
            (&*file, std::slice::from_raw_parts_mut(into, n))
        };
        let read = file.guard.read(memory, address, into, file.public.base_address, file.end);
        if read { 0 } else { -1 }
    })
}

unsafe extern "C" fn write(_: *mut Opened, _: c_int, _: hid_t, _: haddr_t, _: usize, _: *const u8) -> herr_t {
    -1
}

/// Files are not locked. libhdf5 looks whether a file is being written only where a driver could lock it.
unsafe extern "C" fn lock(_: *mut Opened, _: bool) -> herr_t {
    0
}

unsafe extern "C" fn unlock(_: *mut Opened) -> herr_t {
    0
}
