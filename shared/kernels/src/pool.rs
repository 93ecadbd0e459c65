//! Threads that share the tasks of one kernel after the other.
//!
//! A token of a small model is some 150 kernels of 20 to 100 microseconds: waking a sleeping thread for each would take
//! longer than the work. Helpers therefore spin for a moment after each kernel and only then go to sleep.

use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{JoinHandle, Thread};

/// Rounds of spinning before a helper sleeps: about 100 microseconds.
const SPINS: u32 = 20_000;
/// Rounds after which a spinner lets others have the core: it may wait for a thread that has none.
const YIELD_AFTER: u32 = 2_000;

type Task<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// The kernel is open to helpers.
const OPEN: u64 = 1 << 31;
/// One kernel, in the upper half of the state; the lower half below [`OPEN`] counts the helpers inside.
const EPOCH: u64 = 1 << 32;

#[derive(Default)]
struct Shared {
    /// Number of the kernel, whether helpers may still enter it, and how many are inside: one word, so that a helper that
    /// comes late, because something else had its core, can neither enter a finished kernel nor be waited for.
    state: AtomicU64,
    stop: AtomicBool,
    tasks: AtomicUsize,
    next: AtomicUsize,
    panicked: AtomicBool,
    task: UnsafeCell<Option<*const Task<'static>>>,
    sleeping: Vec<AtomicBool>,
}

// SAFETY: `task` is written by the owner only while no helper is inside a kernel, and read by helpers only inside.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `task` is only followed while `Pool::run`, which owns what it points to, waits.
unsafe impl Send for Shared {}

/// A fixed set of threads, the caller among them. Dropping it ends the helpers.
pub struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    handles: Vec<Thread>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pool({})", self.threads())
    }
}

impl Pool {
    /// `threads` threads, of which one is the caller of [`Pool::run`].
    ///
    /// # Errors
    /// The system has no more threads.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let helpers = threads.saturating_sub(1);
        let sleeping = (0..helpers).map(|_| AtomicBool::new(false)).collect();
        let shared = Arc::new(Shared { sleeping, ..Shared::default() });
        let mut pool = Self { shared, helpers: Vec::new(), handles: Vec::new() };
        for me in 0..helpers {
            let shared = pool.shared.clone();
            let thread = std::thread::Builder::new()
                .name(format!("engine-{}", me + 1))
                .spawn(move || help(&shared, me))?;
            pool.handles.push(thread.thread().clone());
            pool.helpers.push(thread);
        }
        Ok(pool)
    }

    /// Threads, the caller included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Calls `task(number, thread)` for every number below `tasks`, each once, on any thread, and returns when all are
    /// done. No two calls at one time have the same `thread`, which is below [`Pool::threads`].
    ///
    /// # Panics
    /// If a task panicked.
    pub fn run(&mut self, tasks: usize, task: &(dyn Fn(usize, usize) + Sync)) {
        if self.helpers.is_empty() || tasks <= 1 {
            (0..tasks).for_each(|i| task(i, 0));
            return;
        }
        let s = &*self.shared;
        // SAFETY: only the lifetime is forgotten; this function does not return before all helpers are done with it.
        let forgotten = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
        // SAFETY: the last kernel is closed and no helper is inside, see `Done`.
        unsafe { *s.task.get() = Some(forgotten) };
        s.tasks.store(tasks, Ordering::Relaxed);
        s.next.store(0, Ordering::Relaxed);
        let epoch = s.state.load(Ordering::Relaxed) / EPOCH;
        s.state.store(((epoch.wrapping_add(1) % EPOCH) * EPOCH) | OPEN, Ordering::SeqCst);
        for (me, thread) in self.handles.iter().enumerate() {
            if s.sleeping[me].load(Ordering::SeqCst) {
                thread.unpark();
            }
        }
        let done = Done(s);
        work(s, task, 0);
        drop(done);
        assert!(!s.panicked.swap(false, Ordering::Relaxed), "a task of the engine's threads panicked");
    }
}

/// Waits for the helpers, also when the caller's own task panics.
struct Done<'a>(&'a Shared);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0u32;
        while self.0.state.load(Ordering::Acquire) & (OPEN - 1) != 0 {
            pause(&mut spins);
        }
    }
}

fn pause(spins: &mut u32) {
    *spins += 1;
    if *spins >= YIELD_AFTER && spins.is_multiple_of(64) { std::thread::yield_now() } else { spin_loop() }
}

fn work(s: &Shared, task: &Task<'_>, thread: usize) {
    let tasks = s.tasks.load(Ordering::Relaxed);
    loop {
        let i = s.next.fetch_add(1, Ordering::Relaxed);
        if i >= tasks {
            return;
        }
        task(i, thread);
    }
}

/// Waits for a kernel after `seen` that is still open and enters it; `None` at the end.
fn enter(s: &Shared, me: usize, seen: u64) -> Option<u64> {
    let mut spins = 0u32;
    loop {
        let state = s.state.load(Ordering::Acquire);
        if state / EPOCH != seen && state & OPEN != 0 {
            if s.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                return Some(state / EPOCH);
            }
            continue;
        }
        if s.stop.load(Ordering::Acquire) {
            return None;
        }
        if spins < SPINS {
            pause(&mut spins);
            continue;
        }
        s.sleeping[me].store(true, Ordering::SeqCst);
        let state = s.state.load(Ordering::SeqCst);
        if (state / EPOCH == seen || state & OPEN == 0) && !s.stop.load(Ordering::SeqCst) {
            std::thread::park();
        }
        s.sleeping[me].store(false, Ordering::SeqCst);
        spins = 0;
    }
}

fn help(s: &Shared, me: usize) {
    let mut seen = 0;
    while let Some(epoch) = enter(s, me, seen) {
        seen = epoch;
        // SAFETY: the owner wrote it before it opened the kernel and waits until nobody is inside.
        if let Some(task) = unsafe { *s.task.get() } {
            // SAFETY: as above: what it points to outlives the kernel.
            let run = std::panic::AssertUnwindSafe(|| work(s, unsafe { &*task }, me + 1));
            if std::panic::catch_unwind(run).is_err() {
                s.panicked.store(true, Ordering::Relaxed);
            }
        }
        s.state.fetch_sub(1, Ordering::Release);
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.handles.iter().for_each(Thread::unpark);
        for helper in self.helpers.drain(..) {
            let _ = helper.join();
        }
    }
}
