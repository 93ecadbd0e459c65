use std::sync::atomic::{AtomicUsize, Ordering};

use infera_kernels::Cpu;

#[test]
fn every_task_runs_once_also_after_a_pause() {
    for threads in [1, 2, 5] {
        let mut cpu = Cpu::new(threads).unwrap();
        for round in 0..300 {
            let counts: Vec<AtomicUsize> = (0..round % 40).map(|_| AtomicUsize::new(0)).collect();
            cpu.each(counts.len(), &|i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(
                counts.iter().all(|c| c.load(Ordering::Relaxed) == 1),
                "round {round}, {threads} threads"
            );
            if round % 100 == 99 {
                // Long enough for the helpers to go to sleep.
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        }
    }
}

#[test]
fn a_panic_in_a_task_reaches_the_caller_and_the_threads_live_on() {
    let mut cpu = Cpu::new(3).unwrap();
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        cpu.each(50, &|i| assert!(i != 20, "task 20"));
    }));
    assert!(caught.is_err());
    let count = AtomicUsize::new(0);
    cpu.each(50, &|_| {
        count.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(count.into_inner(), 50);
}
