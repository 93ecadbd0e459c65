//! Whether the engine may compute, and whether it holds a model.

use parking_lot::{Condvar, Mutex};

/// What the engine's thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// It holds a model.
    Running,
    /// It holds none.
    Paused,
    /// It has ended.
    Ended,
}

#[derive(Debug)]
struct State {
    wanted: bool,
    phase: Phase,
}

#[derive(Debug)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    pub fn new() -> Self {
        Self { state: Mutex::new(State { wanted: true, phase: Phase::Running }), changed: Condvar::new() }
    }

    /// Asks for a pause or its end; false if that was asked for already.
    pub fn ask(&self, running: bool) -> bool {
        std::mem::replace(&mut self.state.lock().wanted, running) != running
    }

    /// Whether the engine may compute.
    pub fn is_open(&self) -> bool {
        self.state.lock().wanted
    }

    /// The thread has loaded a model (true) or let go of it.
    pub fn reached(&self, running: bool) {
        self.set(if running { Phase::Running } else { Phase::Paused });
    }

    pub fn ended(&self) {
        self.set(Phase::Ended);
    }

    fn set(&self, phase: Phase) {
        self.state.lock().phase = phase;
        self.changed.notify_all();
    }

    /// Waits until the thread is where it was asked to be; false if it has ended.
    pub fn wait(&self, running: bool) -> bool {
        let wanted = if running { Phase::Running } else { Phase::Paused };
        let mut state = self.state.lock();
        while state.phase != wanted && state.phase != Phase::Ended {
            self.changed.wait(&mut state);
        }
        state.phase == wanted
    }
}
