//! The files of a model as one string of bytes: the registry lists its BLAKE3 hash and length, and ranges of it are
//! proved.
//!
//! Of a GGUF file it is the file. Of a folder it is a head that names files with their lengths, and those files in the
//! same order, which is that of the bytes of their names:
//!
//! ```text
//! infera.model.v1\n
//! config.json 716\n
//! model.safetensors 281952\n
//! ...
//! \n
//! contents of config.json, contents of model.safetensors, ...
//! ```
//!
//! Everything that is read to answer is in it, and nothing else that may lie in the folder.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::FileExt,
    path::Path,
};

use crate::engine::weight_files;

const DOMAIN: &str = "infera.model.v1";
/// What a folder must have beside its weights, and what is read if it is there.
const NEEDED: [&str; 2] = ["config.json", "tokenizer.json"];
const OPTIONAL: [&str; 3] = ["chat_template.jinja", "generation_config.json", "tokenizer_config.json"];

/// An opened model.
#[derive(Debug)]
pub struct Pack {
    head: Vec<u8>,
    /// With their lengths, bytes.
    files: Vec<(File, u64)>,
}

impl Pack {
    /// Opens a GGUF file, or a folder as transformers writes it.
    ///
    /// # Errors
    /// A file is missing or can't be read; a bare safetensors file.
    pub fn open(path: &Path) -> io::Result<Self> {
        if !path.is_dir() {
            if path.extension().is_some_and(|extension| extension == "safetensors") {
                let text = "weights without a config.json and a tokenizer: name their folder";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
            return Ok(Self { head: Vec::new(), files: vec![opened(path)?] });
        }
        let mut names = weight_files(path).map_err(io::Error::other)?;
        names.extend(NEEDED.map(str::to_owned));
        names.extend(OPTIONAL.map(str::to_owned).into_iter().filter(|name| path.join(name).exists()));
        let (mut head, mut files) = (format!("{DOMAIN}\n"), Vec::new());
        for name in names {
            let (file, bytes) = opened(&path.join(&name))?;
            head.push_str(&format!("{name} {bytes}\n"));
            files.push((file, bytes));
        }
        head.push('\n');
        Ok(Self { head: head.into_bytes(), files })
    }

    /// Bytes of the whole.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|(_, bytes)| bytes).sum::<u64>() + self.head.len() as u64
    }

    /// All of it, from the beginning.
    pub fn reader(&self) -> impl Read {
        Reader { pack: self, at: 0 }
    }

    /// Fills `out` from this offset on.
    ///
    /// # Errors
    /// It ends before, or a file can't be read.
    pub fn read_exact_at(&self, mut out: &mut [u8], offset: u64) -> io::Result<()> {
        let mut skip = offset;
        let head = self.head.get(usize::try_from(skip).unwrap_or(usize::MAX)..).unwrap_or_default();
        let (first, rest) = out.split_at_mut(head.len().min(out.len()));
        first.copy_from_slice(&head[..first.len()]);
        out = rest;
        skip = skip.saturating_sub(self.head.len() as u64);
        for (file, bytes) in &self.files {
            if out.is_empty() {
                return Ok(());
            }
            let here = bytes.saturating_sub(skip).min(out.len() as u64);
            let (next, rest) = out.split_at_mut(usize::try_from(here).unwrap_or(usize::MAX));
            file.read_exact_at(next, skip)?;
            out = rest;
            skip = skip.saturating_sub(*bytes);
        }
        if out.is_empty() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

struct Reader<'a> {
    pack: &'a Pack,
    at: u64,
}

impl Read for Reader<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let left = self.pack.bytes() - self.at;
        let next = out.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.pack.read_exact_at(&mut out[..next], self.at)?;
        self.at += next as u64;
        Ok(next)
    }
}

/// An ordinary file, and its length.
fn opened(path: &Path) -> io::Result<(File, u64)> {
    let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", path.display()));
    // Asked first: opening a pipe would wait for a writer.
    if !fs::metadata(path).map_err(named)?.is_file() {
        let text = format!("{} is not a file", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let file = File::open(path).map_err(named)?;
    let bytes = file.metadata().map_err(named)?.len();
    Ok((file, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in files {
            fs::write(dir.path().join(name), content).unwrap();
        }
        dir
    }

    fn all(path: &Path) -> Vec<u8> {
        let (pack, mut bytes) = (Pack::open(path).unwrap(), Vec::new());
        pack.reader().read_to_end(&mut bytes).unwrap();
        assert_eq!(pack.bytes(), bytes.len() as u64);
        for start in 0..bytes.len() {
            for end in start..=bytes.len() {
                let mut part = vec![0; end - start];
                pack.read_exact_at(&mut part, start as u64).unwrap();
                assert_eq!(part, bytes[start..end]);
            }
        }
        for (offset, length) in [(bytes.len(), 1), (0, bytes.len() + 1), (bytes.len() + 9, 1)] {
            let past = pack.read_exact_at(&mut vec![0; length], offset as u64).unwrap_err();
            assert_eq!(past.kind(), io::ErrorKind::UnexpectedEof);
        }
        bytes
    }

    #[test]
    fn a_folder_is_what_is_read_to_answer_and_nothing_else() {
        let dir = folder(&[
            ("tokenizer.json", b"words"),
            ("config.json", b"{}"),
            ("model.safetensors", b"numbers"),
            ("README.md", b"hello"),
            ("consolidated.safetensors", b"again"),
        ]);
        let head = "infera.model.v1\nconfig.json 2\nmodel.safetensors 7\ntokenizer.json 5\n\n";
        assert_eq!(all(dir.path()), format!("{head}{{}}numberswords").into_bytes());
        fs::write(dir.path().join("chat_template.jinja"), "").unwrap();
        assert!(all(dir.path()).starts_with(b"infera.model.v1\nchat_template.jinja 0\nconfig.json 2\n"));
        let index =
            r#"{"weight_map": {"b": "two.safetensors", "a": "one.safetensors", "c": "one.safetensors"}}"#;
        for (name, content) in
            [("model.safetensors.index.json", index), ("one.safetensors", "1"), ("two.safetensors", "22")]
        {
            fs::write(dir.path().join(name), content).unwrap();
        }
        let text = String::from_utf8(all(dir.path())).unwrap();
        let names: Vec<&str> =
            text.lines().skip(1).map_while(|line| line.split_once(' ')).map(|(name, _)| name).collect();
        assert_eq!(
            names,
            [
                "chat_template.jinja",
                "config.json",
                "model.safetensors.index.json",
                "one.safetensors",
                "tokenizer.json",
                "two.safetensors"
            ]
        );
    }

    #[test]
    fn a_file_is_itself_and_what_is_no_model_is_refused() {
        let dir = folder(&[("model.gguf", b"GGUF..."), ("config.json", b"{}"), ("model.safetensors", b"1")]);
        assert_eq!(all(&dir.path().join("model.gguf")), b"GGUF...");
        let refused = |path: &Path| Pack::open(path).unwrap_err().to_string();
        assert!(refused(dir.path()).contains("tokenizer.json: No such file"), "{}", refused(dir.path()));
        assert!(refused(&dir.path().join("model.safetensors")).contains("name their folder"));
        fs::create_dir(dir.path().join("tokenizer.json")).unwrap();
        assert!(refused(dir.path()).contains("tokenizer.json is not a file"));
        assert!(refused(&dir.path().join("other.gguf")).contains("other.gguf"));
    }
}
