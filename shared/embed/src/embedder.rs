//! Texts to vectors.

use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use tokenizers::{Tokenizer, TruncationParams};

use crate::bert::Bert;
use crate::error::EmbedError;

/// Numbers in a vector.
pub const DIMENSIONS: usize = 384;
/// Tokens that count, the two that mark the ends included; the rest of a longer text is cut off.
/// This is what all-MiniLM-L6-v2 was trained for.
pub const MAX_TOKENS: usize = 256;

/// all-MiniLM-L6-v2 in f32 on one CPU thread. Clones share the weights (90 MB); texts are computed
/// one after another, about 16 ms each.
#[derive(Clone)]
pub struct Embedder {
    inner: Arc<Inner>,
}

struct Inner {
    tokenizer: Tokenizer,
    model: Mutex<Bert>,
}

impl std::fmt::Debug for Embedder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Embedder(all-MiniLM-L6-v2)")
    }
}

impl Embedder {
    /// Reads `tokenizer.json` and `model.safetensors` of `dir`. Blocks for about 0.2 s. Sets
    /// libtorch's threads to 1 for the whole process: more threads than free cores collapse it.
    ///
    /// # Errors
    /// [`EmbedError::File`] names the file and what is wrong with it.
    pub fn load(dir: &Path) -> Result<Self, EmbedError> {
        tch::set_num_threads(1);
        let path = dir.join("tokenizer.json");
        let file =
            |reason: tokenizers::Error| EmbedError::File { path: path.clone(), reason: reason.to_string() };
        let mut tokenizer = Tokenizer::from_file(&path).map_err(file)?;
        let truncation = TruncationParams { max_length: MAX_TOKENS, ..TruncationParams::default() };
        tokenizer.with_truncation(Some(truncation)).map_err(file)?.with_padding(None);
        let model = Mutex::new(Bert::load(&dir.join("model.safetensors"))?);
        Ok(Self { inner: Arc::new(Inner { tokenizer, model }) })
    }

    /// The vectors of `texts`, each of [`DIMENSIONS`] numbers and length 1. Computes on tokio's
    /// blocking threads.
    ///
    /// # Errors
    /// [`EmbedError`]; none that depends on a text's content is known.
    pub async fn embed(&self, texts: Vec<String>) -> Result<Vec<Vec<f32>>, EmbedError> {
        let this = self.clone();
        tokio::task::spawn_blocking(move || texts.iter().map(|text| this.embed_blocking(text)).collect())
            .await
            .map_err(|_| EmbedError::Lost)?
    }

    /// The vector of one text, computed on this thread.
    ///
    /// # Errors
    /// As [`Embedder::embed`].
    pub fn embed_blocking(&self, text: &str) -> Result<Vec<f32>, EmbedError> {
        let encoding =
            self.inner.tokenizer.encode(text, true).map_err(|e| EmbedError::Tokenize(e.to_string()))?;
        let ids: Vec<i64> = encoding.get_ids().iter().map(|id| i64::from(*id)).collect();
        Ok(self.inner.model.lock().embed(&ids)?)
    }
}

/// Cosine of two vectors of the same size; 0 where one of them is zero.
pub fn cosine(a: &[f32], b: &[f32]) -> f32 {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f32>();
    let lengths = (dot(a, a) * dot(b, b)).sqrt();
    if lengths > 0.0 { (dot(a, b) / lengths).clamp(-1.0, 1.0) } else { 0.0 }
}

/// The cosine as the protocol counts it: millionths, negative ones as 0.
pub fn similarity_millionths(a: &[f32], b: &[f32]) -> u32 {
    // Between 0 and 1,000,000, so nothing is cut.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let millionths = (f64::from(cosine(a, b).max(0.0)) * 1e6).round() as u32;
    millionths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosine_is_of_directions() {
        assert!((cosine(&[2.0, 0.0], &[5.0, 0.0]) - 1.0).abs() < 1e-6);
        assert!(cosine(&[1.0, 0.0], &[0.0, 3.0]).abs() < 1e-6);
        assert!(cosine(&[0.0, 0.0], &[0.0, 3.0]).abs() < 1e-6);
        assert_eq!(similarity_millionths(&[1.0, 0.0], &[-1.0, 0.0]), 0);
        assert_eq!(similarity_millionths(&[1.0, 1.0], &[1.0, 1.0]), 1_000_000);
    }
}
