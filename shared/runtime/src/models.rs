//! Where the files of models lie, and when one comes.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use infera_protocol::registry::Registry;

/// How often files that are missing are looked for.
const LOOK: Duration = Duration::from_secs(2);

/// The files that are named by model, and a folder for those of models that the holders admit later.
#[derive(Debug, Clone, Default)]
pub struct ModelFiles {
    named: BTreeMap<String, PathBuf>,
    folder: Option<PathBuf>,
}

/// What can be told of files without reading them: length and time of the last change, in the registry's order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen(Vec<Option<(PathBuf, u64, Option<SystemTime>)>>);

impl ModelFiles {
    /// `named`: files by model id; `folder`: holds others as ID.gguf.
    #[must_use]
    pub fn new(named: BTreeMap<String, PathBuf>, folder: Option<PathBuf>) -> Self {
        Self { named, folder }
    }

    /// The ids that have a file of their own.
    pub fn named(&self) -> impl Iterator<Item = &String> {
        self.named.keys()
    }

    /// The file that is named for the model, else the one in the folder if it is there.
    #[must_use]
    pub fn of(&self, id: &str) -> Option<PathBuf> {
        let in_folder =
            || Some(self.folder.as_ref()?.join(format!("{id}.gguf"))).filter(|path| path.is_file());
        self.named.get(id).cloned().or_else(in_folder)
    }

    /// Looks at the files of a registry's models.
    #[must_use]
    pub fn seen(&self, registry: &Registry) -> Seen {
        let of = |id: &str| {
            let path = self.of(id)?;
            let meta = fs::metadata(&path).ok()?;
            Some((path, meta.len(), meta.modified().ok()))
        };
        Seen(registry.models.iter().map(|model| of(&model.id)).collect())
    }

    /// Waits until one of these files comes, grows or is replaced. `seen` must have been looked at before they were
    /// read.
    pub async fn changed(&self, registry: &Registry, seen: &Seen) {
        while self.seen(registry) == *seen {
            tokio::time::sleep(LOOK).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_file_goes_before_the_folder() {
        let folder = tempfile::tempdir().unwrap();
        let named = [("a".to_owned(), PathBuf::from("/models/a"))].into();
        let files = ModelFiles::new(named, Some(folder.path().to_owned()));
        assert_eq!(files.of("b"), None);
        for id in ["a", "b"] {
            fs::write(folder.path().join(format!("{id}.gguf")), "").unwrap();
        }
        assert_eq!(files.of("a"), Some(PathBuf::from("/models/a")));
        assert_eq!(files.of("b"), Some(folder.path().join("b.gguf")));
        assert_eq!(ModelFiles::default().of("b"), None);
    }
}
