//! Whether the engine may compute, and whether it holds a model.

use parking_lot::{Condvar, Mutex};

/// What the engine's thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// It holds a model.
    Running,
    /// It holds none.
    Paused,
    /// It takes memory for one, and can't be stopped before the end.
    Loading,
    /// It has ended.
    Ended,
}

/// How a wait for the engine's thread ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waited {
    Reached,
    /// The opposite was asked for meanwhile.
    Overtaken,
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
        let is_new = std::mem::replace(&mut self.state.lock().wanted, running) != running;
        self.changed.notify_all();
        is_new
    }

    /// Whether the engine may compute.
    pub fn is_open(&self) -> bool {
        self.state.lock().wanted
    }

    /// A load begins; false if a pause was asked for.
    pub fn begins(&self) -> bool {
        let mut state = self.state.lock();
        if state.wanted {
            state.phase = Phase::Loading;
        }
        state.wanted
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

    /// Waits until the thread is where it was asked to be, has ended, or was asked for the opposite.
    pub fn wait(&self, running: bool) -> Waited {
        let wanted = if running { Phase::Running } else { Phase::Paused };
        let mut state = self.state.lock();
        while state.phase != wanted && state.phase != Phase::Ended && state.wanted == running {
            self.changed.wait(&mut state);
        }
        match state.phase {
            Phase::Ended => Waited::Ended,
            phase if phase == wanted => Waited::Reached,
            _ => Waited::Overtaken,
        }
    }
}
