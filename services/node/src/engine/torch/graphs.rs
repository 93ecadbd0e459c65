//! One CUDA graph for each size of a batch: what a decoding step launches is recorded once and launched at once from then
//! on.
//!
//! The first step of a size runs as it is, since libraries allocate and choose kernels in it; the second is recorded, and
//! replayed to be computed; all later ones are replayed. A size that cannot be recorded stays as it is.

use std::collections::HashMap;
use std::rc::Rc;

use super::super::error::EngineError;
use super::shim::{Graph, Shim};

/// Rows of the batch, and tokens that its attention goes over.
pub(super) type Size = (usize, usize);

enum State<T> {
    Warm,
    /// Replaying writes `output` again. The graph goes first: the output lies in its memory.
    Recorded {
        graph: Graph,
        output: Rc<T>,
    },
    Unrecorded,
}

/// Graphs of one model, with what they give.
pub(super) struct Graphs<T> {
    /// `None`: nothing is recorded.
    shim: Option<Shim>,
    states: HashMap<Size, State<T>>,
}

impl<T> Graphs<T> {
    pub fn new(shim: Option<Shim>) -> Self {
        Self { shim: shim.filter(Shim::records), states: HashMap::new() }
    }

    /// What `compute` gives for this size. `compute` must launch the same work on the same memory each time, and wait for
    /// nothing; its output is valid until the next call.
    pub fn run(
        &mut self,
        size: Size,
        compute: &mut dyn FnMut() -> Result<T, EngineError>,
    ) -> Result<Rc<T>, EngineError> {
        let Some(shim) = self.shim else { return compute().map(Rc::new) };
        match self.states.get(&size) {
            None => {
                self.states.insert(size, State::Warm);
                compute().map(Rc::new)
            }
            Some(State::Unrecorded) => compute().map(Rc::new),
            Some(State::Recorded { graph, output }) => {
                graph.replay().map_err(|why| EngineError::Device(format!("replaying a graph: {why}")))?;
                Ok(output.clone())
            }
            Some(State::Warm) => match record(shim, compute) {
                Ok((graph, output)) => {
                    let output = Rc::new(output);
                    self.states.insert(size, State::Recorded { graph, output: output.clone() });
                    Ok(output)
                }
                Err(why) => {
                    tracing::warn!(%why, batch = size.0, reach = size.1, "no graph for this size: it stays slower");
                    self.states.insert(size, State::Unrecorded);
                    compute().map(Rc::new)
                }
            },
        }
    }
}

/// Records and launches for the first time.
fn record<T>(shim: Shim, compute: &mut dyn FnMut() -> Result<T, EngineError>) -> Result<(Graph, T), String> {
    let recording = shim.begin()?;
    let output = compute();
    let graph = recording.end()?;
    let output = output.map_err(|e| e.to_string())?;
    graph.replay()?;
    Ok((graph, output))
}

#[cfg(test)]
pub(super) mod tests {
    use std::ffi::OsStr;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use super::*;

    /// Stands in for `deploy/gpu/shim.cpp`: notes every call in the file LOG, and fails where the file FAIL says so.
    const FAKE: &str = r#"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static int done(const char *what, int number, char *error, size_t room) {
    char wanted[64] = "";
    FILE *log = fopen(LOG, "a"), *fail = fopen(FAIL, "r");
    fprintf(log, "%s %d\n", what, number);
    fclose(log);
    if (fail) { if (fscanf(fail, "%63s", wanted) != 1) wanted[0] = 0; fclose(fail); }
    if (strcmp(wanted, what)) return 0;
    snprintf(error, room, "%s fails, as asked%600s", what, "");
    return 1;
}
struct graph { int number; };
static int graphs;
int infera_cuda_abi(void) { return ABI; }
int infera_cuda_memory(int device, uint64_t *free, uint64_t *all, char *error, size_t room) {
    *free = 3000ull << 20; *all = 5000ull << 20;
    return done("memory", device, error, room);
}
int infera_cuda_setup(int device, char *error, size_t room) { return done("setup", device, error, room); }
int infera_cuda_release(int device, char *error, size_t room) { return done("release", device, error, room); }
int infera_graph_begin(int device, void **graph, char *error, size_t room) {
    if (done("begin", device, error, room)) return 1;
    struct graph *made = malloc(sizeof *made);
    made->number = graphs++;
    *graph = made;
    return 0;
}
int infera_graph_end(void *graph, char *error, size_t room) { return done("end", ((struct graph *)graph)->number, error, room); }
int infera_graph_replay(void *graph, char *error, size_t room) { return done("replay", ((struct graph *)graph)->number, error, room); }
void infera_graph_free(void *graph) { char none[1]; done("free", ((struct graph *)graph)->number, none, 0); free(graph); }
"#;

    pub struct Fake {
        folder: tempfile::TempDir,
        library: PathBuf,
    }

    impl Fake {
        pub fn new(abi: u32) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let (source, library) = (folder.path().join("fake.c"), folder.path().join("fake.so"));
            std::fs::write(&source, FAKE).unwrap();
            let define =
                |name: &str, file: &str| format!("-D{name}=\"{}\"", folder.path().join(file).display());
            let mut compiler = Command::new("cc");
            compiler.args(["-shared", "-fPIC", &define("LOG", "log"), &define("FAIL", "fail")]);
            compiler.arg(format!("-DABI={abi}")).arg("-o").args([&library, &source]);
            let output = compiler.output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Self { folder, library }
        }

        pub fn shim(&self) -> Shim {
            Shim::open(&self.library).unwrap().on(3)
        }

        pub fn fails(&self, what: &str) {
            std::fs::write(self.folder.path().join("fail"), what).unwrap();
        }

        /// The calls since the last time.
        fn calls(&self) -> Vec<String> {
            let path = self.folder.path().join("log");
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            let _ = std::fs::remove_file(path);
            text.lines().map(str::to_owned).collect()
        }
    }

    /// How often it is computed; each time gives another number.
    fn computed(graphs: &mut Graphs<u32>, size: Size, count: &mut u32) -> Result<Rc<u32>, EngineError> {
        graphs.run(size, &mut || {
            *count += 1;
            Ok(*count)
        })
    }

    #[test]
    fn a_size_is_run_then_recorded_then_replayed() {
        let fake = Fake::new(1);
        let (mut graphs, mut count) = (Graphs::new(Some(fake.shim())), 0);
        let mut run = |size| *computed(&mut graphs, size, &mut count).unwrap();
        assert_eq!((run((4, 128)), fake.calls()), (1, vec![]));
        assert_eq!(
            (run((4, 128)), fake.calls()),
            (2, vec!["begin 3".into(), "end 0".into(), "replay 0".into()])
        );
        assert_eq!((run((4, 128)), fake.calls()), (2, vec!["replay 0".into()]));
        // Another batch and another reach have graphs of their own.
        assert_eq!((run((8, 128)), run((4, 256)), fake.calls()), (3, 4, vec![]));
        assert_eq!((run((4, 256)), run((8, 128))), (5, 6));
        assert_eq!((run((8, 128)), run((4, 128)), run((4, 256))), (6, 2, 5));
        assert_eq!(fake.calls()[6..], ["replay 2", "replay 0", "replay 1"]);
        drop(graphs);
        let mut freed = fake.calls();
        freed.sort();
        assert_eq!(freed, ["free 0", "free 1", "free 2"]);
    }

    #[test]
    fn what_cannot_be_recorded_is_computed_as_it_is() {
        let fake = Fake::new(1);
        for (step, calls) in [
            ("begin", &["begin 3"][..]),
            ("end", &["begin 3", "end 0", "free 0"]),
            ("replay", &["begin 3", "end 1", "replay 1", "free 1"]),
        ] {
            fake.fails(step);
            let (mut graphs, mut count) = (Graphs::new(Some(fake.shim())), 0);
            let mut run = || *computed(&mut graphs, (2, 128), &mut count).unwrap();
            assert_eq!(run(), 1);
            let second = run();
            assert_eq!(fake.calls(), calls, "{step}");
            assert_eq!(second, if step == "begin" { 2 } else { 3 }, "what was recorded was not computed");
            assert_eq!(run(), second + 1);
            assert!(fake.calls().is_empty(), "it is not tried again");
        }
    }

    #[test]
    fn a_step_that_fails_while_it_is_recorded_ends_the_recording() {
        let fake = Fake::new(1);
        let (mut graphs, mut count) = (Graphs::new(Some(fake.shim())), 0);
        let mut run = || {
            graphs.run((1, 128), &mut || {
                count += 1;
                if count == 2 { Err(EngineError::Device("no memory".into())) } else { Ok(count) }
            })
        };
        assert_eq!((*run().unwrap(), *run().unwrap()), (1, 3));
        assert_eq!(fake.calls(), ["begin 3", "end 0", "free 0"]);
    }

    #[test]
    fn a_replay_that_fails_is_an_error_in_words() {
        let fake = Fake::new(1);
        let (mut graphs, mut count) = (Graphs::new(Some(fake.shim())), 0);
        for _ in 0..3 {
            computed(&mut graphs, (1, 128), &mut count).unwrap();
        }
        fake.fails("replay");
        let error = computed(&mut graphs, (1, 128), &mut count).unwrap_err().to_string();
        assert!(error.starts_with("replaying a graph: replay fails, as asked"), "{error}");
        assert_eq!(count, 2, "a broken device computes nothing more");
    }

    #[test]
    fn without_the_library_nothing_is_recorded() {
        let (mut graphs, mut count) = (Graphs::new(None), 0);
        let all: Vec<u32> = (0..4).map(|_| *computed(&mut graphs, (1, 128), &mut count).unwrap()).collect();
        assert_eq!(all, [1, 2, 3, 4]);
    }

    #[test]
    fn the_library_tells_and_frees_memory_and_its_interface_is_checked() {
        let fake = Fake::new(1);
        assert_eq!(fake.shim().memory(), Ok((3000 << 20, 5000 << 20)));
        fake.shim().setup().unwrap();
        fake.shim().release().unwrap();
        assert_eq!(fake.calls(), ["memory 3", "setup 3", "release 3"]);
        fake.fails("memory");
        // A message that is longer than its room is cut off.
        let message = fake.shim().memory().unwrap_err();
        assert!(message.starts_with("memory fails, as asked") && message.len() == 511, "{message}");
        let other = Shim::open(&Fake::new(2).library).unwrap_err();
        assert!(other.contains("it has interface 2, this node needs 1"), "{other}");
        let none = Shim::open(Path::new("/nowhere/lib.so")).unwrap_err();
        assert!(none.starts_with("/nowhere/lib.so: ") && none.contains("No such file"), "{none}");
    }

    #[test]
    fn off_is_the_library_without_graphs() {
        let fake = Fake::new(1);
        let path = || Some(fake.library.clone());
        let named = format!("off:{}", fake.library.display());
        for found in
            [Shim::find_as(Some(OsStr::new("off")), path), Shim::find_as(Some(OsStr::new(&named)), || None)]
        {
            let shim = found.unwrap().unwrap().on(3);
            shim.release().unwrap();
            assert_eq!((shim.memory(), fake.calls().len()), (Ok((3000 << 20, 5000 << 20)), 2));
            let (mut graphs, mut count) = (Graphs::new(Some(shim)), 0);
            let all: Vec<u32> =
                (0..3).map(|_| *computed(&mut graphs, (1, 128), &mut count).unwrap()).collect();
            assert_eq!((all, fake.calls()), (vec![1, 2, 3], vec![]));
        }
        assert!(Shim::find_as(Some(fake.library.as_os_str()), || None).unwrap().unwrap().records());
        assert!(Shim::find_as(None, path).unwrap().unwrap().records());
        let none = Shim::find_as(Some(OsStr::new("/nowhere/lib.so")), path).unwrap_err();
        assert!(none.starts_with("/nowhere/lib.so: ") && none.contains("No such file"), "{none}");
    }
}
