//! The embedder on the real weights.

use infera_embed::{DIMENSIONS, EmbedError, Embedder, cosine};
use infera_testkit::{TempDir, embedder_path};

fn embedder() -> Embedder {
    Embedder::load(&embedder_path()).unwrap()
}

#[tokio::test]
async fn near_in_meaning_is_near_in_space() {
    let texts = [
        "Paris is the capital of France.",
        "The capital of France is the city of Paris.",
        "France's capital city is Paris, on the Seine.",
        "Sort the list with quicksort and return its median.",
    ];
    let vectors = embedder().embed(texts.map(str::to_owned).to_vec()).await.unwrap();
    for vector in &vectors {
        assert_eq!(vector.len(), DIMENSIONS);
        assert!((vector.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-5);
    }
    let near = cosine(&vectors[0], &vectors[1]);
    assert!(near > 0.9, "{near}");
    assert!(cosine(&vectors[0], &vectors[2]) > 0.8);
    let far = cosine(&vectors[0], &vectors[3]);
    assert!(far < 0.2, "{far}");
}

#[tokio::test]
async fn every_text_has_a_vector() {
    let embedder = embedder();
    let long = "word ".repeat(100_000);
    let texts = vec![String::new(), "\u{0}\u{fffd}🦀".to_owned(), long.clone(), format!("{long} and more")];
    let vectors = embedder.embed(texts).await.unwrap();
    assert!(vectors.iter().all(|v| v.len() == DIMENSIONS && v.iter().all(|x| x.is_finite())));
    // What comes after the 256th token does not count.
    assert_eq!(vectors[2], vectors[3]);
}

#[tokio::test]
async fn clones_answer_the_same_at_the_same_time() {
    let embedder = embedder();
    let alone = embedder.embed_blocking("one and the same").unwrap();
    let many = (0..8).map(|_| {
        let embedder = embedder.clone();
        tokio::spawn(async move { embedder.embed(vec!["one and the same".to_owned()]).await.unwrap() })
    });
    for answer in many.collect::<Vec<_>>() {
        assert_eq!(answer.await.unwrap()[0], alone);
    }
}

#[test]
fn a_missing_or_broken_file_is_named() {
    let dir = TempDir::new().unwrap();
    let missing = Embedder::load(dir.path()).unwrap_err();
    assert!(
        matches!(&missing, EmbedError::File { path, .. } if path.ends_with("tokenizer.json")),
        "{missing}"
    );
    std::fs::copy(embedder_path().join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    let missing = Embedder::load(dir.path()).unwrap_err();
    assert!(missing.to_string().contains("model.safetensors"), "{missing}");
    std::fs::write(dir.path().join("model.safetensors"), b"not weights").unwrap();
    let broken = Embedder::load(dir.path()).unwrap_err();
    assert!(broken.to_string().contains("model.safetensors"), "{broken}");
}

#[derive(serde::Deserialize)]
struct Reference {
    text: String,
    vector: Vec<f32>,
}

/// `tests/reference.py` recorded these with another implementation, in f64.
#[test]
fn a_second_implementation_agrees() {
    let references: Vec<Reference> = serde_json::from_str(include_str!("reference.json")).unwrap();
    assert_eq!(references.len(), 3);
    let embedder = embedder();
    for reference in references {
        let vector = embedder.embed_blocking(&reference.text).unwrap();
        assert_eq!(vector.len(), reference.vector.len());
        let furthest = vector.iter().zip(&reference.vector).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(furthest < 1e-5, "{:?} differs by {furthest}", reference.text);
    }
}
