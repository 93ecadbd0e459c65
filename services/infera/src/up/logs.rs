//! Logs that do not grow for ever: one that is large when its process starts becomes `NAME.log.1`.

use std::{fs, io, path::Path};

/// Size from which a log is put aside, bytes.
const LARGE: u64 = 16 * 1024 * 1024;
/// Old logs that are kept.
const KEPT: u32 = 3;

/// Puts a large log aside: `.1` is the newest of the old ones.
pub fn rotate(log: &Path) -> io::Result<()> {
    rotate_from(log, LARGE)
}

fn rotate_from(log: &Path, large: u64) -> io::Result<()> {
    match fs::metadata(log) {
        Ok(meta) if meta.len() >= large => {}
        Ok(_) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    let old = |number: u32| log.with_added_extension(number.to_string());
    for number in (1..KEPT).rev() {
        match fs::rename(old(number), old(number + 1)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    fs::rename(log, old(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_logs_are_put_aside_and_three_are_kept() {
        let dir = infera_testkit::TempDir::new().unwrap();
        let log = dir.path().join("a.b.log");
        rotate_from(&log, 4).unwrap();
        for n in 1..=6 {
            fs::write(&log, "small").unwrap();
            rotate_from(&log, 100).unwrap();
            assert!(log.exists(), "small logs go on");
            fs::write(&log, format!("log {n}")).unwrap();
            rotate_from(&log, 4).unwrap();
            assert!(!log.exists());
        }
        let mut left: Vec<_> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| {
                let name = entry.file_name().into_string().unwrap();
                (name, fs::read_to_string(entry.path()).unwrap())
            })
            .collect();
        left.sort();
        let expected = [("a.b.log.1", "log 6"), ("a.b.log.2", "log 5"), ("a.b.log.3", "log 4")];
        assert_eq!(left, expected.map(|(name, text)| (name.to_owned(), text.to_owned())));
    }
}
