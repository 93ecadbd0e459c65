//! The functions that libtorch's C interface lacks, from `libinfera_cuda_graphs.so` (`deploy/gpu/shim.cpp`).
//!
//! The library is compiled against the CUDA libtorch at hand, by `deploy/gpu/build-shim`, and looked for when a GPU is
//! used: one node program serves machines with and without it. Libraries are opened and never closed, so that their
//! functions stay valid.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Names the library, if it is in another place. `off`: it records no graphs; `off:PATH` names it, too.
const VARIABLE: &str = "INFERA_CUDA_GRAPHS";
const OFF: &[u8] = b"off";
const FILE: &str = "libinfera_cuda_graphs.so";
/// What `infera_cuda_abi` gives.
const ABI: c_int = 1;
/// Longest message, in bytes, its end included.
const ROOM: usize = 512;

type Failing<A> = unsafe extern "C" fn(A, *mut c_char, usize) -> c_int;

#[derive(Debug, Clone, Copy)]
struct Functions {
    memory: unsafe extern "C" fn(c_int, *mut u64, *mut u64, *mut c_char, usize) -> c_int,
    setup: Failing<c_int>,
    release: Failing<c_int>,
    begin: unsafe extern "C" fn(c_int, *mut *mut c_void, *mut c_char, usize) -> c_int,
    end: Failing<*mut c_void>,
    replay: Failing<*mut c_void>,
    free: unsafe extern "C" fn(*mut c_void),
}

/// The library, for one device.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct Shim {
    functions: Functions,
    device: c_int,
    records: bool,
}

/// Opens a library for good, its symbols visible to those that follow. The text is the loader's.
fn open(name: &Path) -> Result<*mut c_void, String> {
    let text = CString::new(name.as_os_str().as_bytes()).map_err(|e| e.to_string())?;
    // SAFETY: `text` is a C string; opening runs the library's initialisers, and the libraries opened here are libtorch
    // and our own, chosen by whoever runs the node.
    let library = unsafe { libc::dlopen(text.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if library.is_null() { Err(last_error()) } else { Ok(library) }
}

fn last_error() -> String {
    // SAFETY: dlerror gives null or a C string that is valid until this thread's next call of the loader.
    unsafe {
        let text = libc::dlerror();
        if text.is_null() {
            "unknown error of the loader".to_owned()
        } else {
            CStr::from_ptr(text).to_string_lossy().into_owned()
        }
    }
}

/// Opens a library by its file name alone, for what libtorch finds in it by itself. Has to precede libtorch's first call.
pub(in super::super) fn preload(name: &str) -> Result<(), String> {
    open(Path::new(name)).map(drop)
}

/// Gives memory of the processor that was freed back to the system: the matrices that a model is loaded through leave
/// holes that the allocator keeps.
pub(super) fn trim() {
    // SAFETY: malloc_trim may be called at any time, from any thread.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0);
    }
}

/// A function of an open library.
///
/// # Safety
/// `F` is a function pointer of the type that the library's function `name` has.
unsafe fn function<F: Copy>(library: *mut c_void, name: &CStr) -> Result<F, String> {
    const { assert!(size_of::<F>() == size_of::<*mut c_void>()) };
    // SAFETY: `library` is open, `name` a C string.
    let found = unsafe { libc::dlsym(library, name.as_ptr()) };
    if found.is_null() {
        return Err(last_error());
    }
    // SAFETY: not null, of a pointer's size, and of this type by the caller's promise.
    Ok(unsafe { std::mem::transmute_copy(&found) })
}

impl Functions {
    fn of(library: *mut c_void) -> Result<Self, String> {
        // SAFETY: the types are those of `deploy/gpu/shim.cpp` at this ABI, which is asked for first.
        unsafe {
            let abi: unsafe extern "C" fn() -> c_int = function(library, c"infera_cuda_abi")?;
            let abi = abi();
            if abi != ABI {
                return Err(format!(
                    "it has interface {abi}, this node needs {ABI}: run deploy/gpu/build-shim again"
                ));
            }
            Ok(Self {
                memory: function(library, c"infera_cuda_memory")?,
                setup: function(library, c"infera_cuda_setup")?,
                release: function(library, c"infera_cuda_release")?,
                begin: function(library, c"infera_graph_begin")?,
                end: function(library, c"infera_graph_end")?,
                replay: function(library, c"infera_graph_replay")?,
                free: function(library, c"infera_graph_free")?,
            })
        }
    }
}

/// Calls a function that writes a message if it fails.
fn call(function: impl FnOnce(*mut c_char, usize) -> c_int) -> Result<(), String> {
    let mut message: [c_char; ROOM] = [0; ROOM];
    if function(message.as_mut_ptr(), ROOM) == 0 {
        return Ok(());
    }
    let text: Vec<u8> = message.iter().take_while(|c| **c != 0).map(|c| c.to_ne_bytes()[0]).collect();
    Err(String::from_utf8_lossy(&text).into_owned())
}

impl Shim {
    /// Opens the library that the variable names, the one beside this program, or the one that the loader finds; `None` if
    /// there is none.
    pub fn find() -> Result<Option<Self>, String> {
        let beside = || Some(std::env::current_exe().ok()?.parent()?.join(FILE)).filter(|path| path.exists());
        Self::find_as(std::env::var_os(VARIABLE).as_deref(), beside)
    }

    /// As the variable says.
    pub(super) fn find_as(
        variable: Option<&OsStr>,
        beside: impl FnOnce() -> Option<PathBuf>,
    ) -> Result<Option<Self>, String> {
        let (records, named) = match variable.map(|name| (name, name.as_bytes().strip_prefix(OFF))) {
            None => (true, None),
            Some((_, Some(b""))) => (false, None),
            Some((_, Some([b':', path @ ..]))) => (false, Some(PathBuf::from(OsStr::from_bytes(path)))),
            Some((name, _)) => (true, Some(PathBuf::from(name))),
        };
        let found = match named.or_else(beside) {
            Some(path) => Self::open(&path)?,
            None => match Self::open(Path::new(FILE)) {
                Err(why) if why.contains("cannot open shared object file") => return Ok(None),
                found => found?,
            },
        };
        Ok(Some(Self { records, ..found }))
    }

    /// Whether graphs are wanted.
    pub(super) fn records(&self) -> bool {
        self.records
    }

    /// Opens this library.
    pub fn open(path: &Path) -> Result<Self, String> {
        let of = |e: String| format!("{}: {e}", path.display());
        let functions = Functions::of(open(path).map_err(of)?).map_err(of)?;
        Ok(Self { functions, device: 0, records: true })
    }

    /// For the device with this number.
    pub fn on(self, device: usize) -> Self {
        Self { device: c_int::try_from(device).unwrap_or(c_int::MAX), ..self }
    }

    /// Bytes of the device: free, and all.
    pub fn memory(self) -> Result<(u64, u64), String> {
        let (mut free, mut all) = (0, 0);
        // SAFETY: all pointers are valid for the call, `room` is the size of the message's memory.
        call(|message, room| unsafe {
            (self.functions.memory)(self.device, &raw mut free, &raw mut all, message, room)
        })?;
        Ok((free, all))
    }

    /// Sets how libtorch sums on GPUs, for this process.
    pub fn setup(self) -> Result<(), String> {
        // SAFETY: as above.
        call(|message, room| unsafe { (self.functions.setup)(self.device, message, room) })
    }

    /// Waits for the device and gives back what the allocator keeps.
    pub fn release(self) -> Result<(), String> {
        // SAFETY: as above.
        call(|message, room| unsafe { (self.functions.release)(self.device, message, room) })
    }

    /// Begins to record what this thread launches on the device.
    pub(super) fn begin(self) -> Result<Recording, String> {
        let mut graph = std::ptr::null_mut();
        // SAFETY: as above; the library writes `graph` only if it succeeds.
        call(|message, room| unsafe { (self.functions.begin)(self.device, &raw mut graph, message, room) })?;
        Ok(Recording(Graph { functions: self.functions, graph }))
    }
}

/// A graph that is being recorded. Dropping it gives up.
#[derive(Debug)]
pub(super) struct Recording(Graph);

impl Recording {
    /// Ends the recording.
    pub fn end(self) -> Result<Graph, String> {
        // SAFETY: `graph` is what `begin` gave; it is freed once, when it is dropped.
        call(|message, room| unsafe { (self.0.functions.end)(self.0.graph, message, room) })?;
        Ok(self.0)
    }
}

/// A recorded graph; the library ends a recording that goes on when it is freed.
#[derive(Debug)]
pub(super) struct Graph {
    functions: Functions,
    graph: *mut c_void,
}

impl Graph {
    /// Launches it again.
    pub fn replay(&self) -> Result<(), String> {
        // SAFETY: `graph` was recorded and is not freed.
        call(|message, room| unsafe { (self.functions.replay)(self.graph, message, room) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: `graph` is what `begin` gave and is not used after this.
        unsafe { (self.functions.free)(self.graph) }
    }
}
