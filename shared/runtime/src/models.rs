//! Where the files of models lie, and when one comes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, SystemTime};

use infera_protocol::registry::Registry;

/// How often files that are missing are looked for.
const LOOK: Duration = Duration::from_secs(2);

/// The files that are named by model, and a folder for those of models that the holders admit later. A model is a GGUF
/// file, or a folder with safetensors as transformers writes it.
#[derive(Debug, Clone, Default)]
pub struct ModelFiles {
    named: BTreeMap<String, PathBuf>,
    folder: Option<PathBuf>,
}

/// What can be told of files without reading them, in the registry's order: where a model lies, and its files' lengths
/// and times of the last change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen(Vec<Option<(PathBuf, Vec<About>)>>);

type About = (u64, Option<SystemTime>);

impl ModelFiles {
    /// `named`: models by id; `folder`: holds others as ID.gguf, or as the folder ID.
    #[must_use]
    pub fn new(named: BTreeMap<String, PathBuf>, folder: Option<PathBuf>) -> Self {
        Self { named, folder }
    }

    /// The ids that have a file of their own.
    pub fn named(&self) -> impl Iterator<Item = &String> {
        self.named.keys()
    }

    /// Where the model is said to lie, else the place in the folder if it is there.
    #[must_use]
    pub fn of(&self, id: &str) -> Option<PathBuf> {
        let in_folder = || {
            // Holders vote for ids, and one must not lead out of the folder.
            let mut parts = Path::new(id).components();
            let is_name = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
            let folder = self.folder.as_ref().filter(|_| is_name)?;
            let file = Some(folder.join(format!("{id}.gguf"))).filter(|path| path.is_file());
            file.or_else(|| Some(folder.join(id)).filter(|path| path.join("config.json").is_file()))
        };
        self.named.get(id).cloned().or_else(in_folder)
    }

    /// Looks at the files of a registry's models.
    #[must_use]
    pub fn seen(&self, registry: &Registry) -> Seen {
        let of = |id: &str| {
            let path = self.of(id)?;
            let of_file = |path: &Path| {
                let meta = fs::metadata(path).ok()?;
                Some((meta.len(), meta.modified().ok()))
            };
            let mut files = vec![of_file(&path)?];
            for entry in fs::read_dir(&path).into_iter().flatten().flatten() {
                files.extend(of_file(&entry.path()));
            }
            files.sort_unstable();
            Some((path, files))
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
    use infera_protocol::bytes::Hash32;
    use infera_testkit::evidence::{Network, model};

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

    #[test]
    fn a_folder_of_files_is_a_model_once_it_has_its_config() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("c-1.5b");
        fs::create_dir(&at).unwrap();
        let files = ModelFiles::new(BTreeMap::new(), Some(folder.path().to_owned()));
        assert_eq!(files.of("c-1.5b"), None);
        fs::write(at.join("config.json"), "{}").unwrap();
        assert_eq!(files.of("c-1.5b"), Some(at.clone()));
        let registry = Network::serving(vec![model("c-1.5b", Hash32([1; 32]))]).registry;
        let seen = files.seen(&registry);
        assert_eq!(files.seen(&registry), seen);
        fs::write(at.join("tokenizer.json"), "{}").unwrap();
        assert_ne!(files.seen(&registry), seen, "a file in it came");
        for other in ["../c-1.5b", "./c-1.5b", "c-1.5b/..", at.to_str().unwrap(), ""] {
            assert_eq!(files.of(other), None, "{other}");
        }
    }
}
