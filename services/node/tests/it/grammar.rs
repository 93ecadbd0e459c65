//! Bias and grammars inside the draw, on the real model.

use infera_grammar::{Matcher, Vocabulary};
use infera_node::engine::{Class, Engine, Event, Finish, Job, ScoreJob};
use infera_prompt::Prompt;
use infera_protocol::grammar::{Grammar, GrammarKind};
use infera_protocol::sampling::SamplingParams;
use serde_json::{Value, json};

use crate::engine::{Answer, alone, assert_same, collect, config, job, together};
use crate::{ONE_AT_A_TIME, model_path};

struct World {
    prompt: Prompt,
    vocabulary: Vocabulary,
    engine: Engine,
}

impl World {
    fn new(class: Class) -> Self {
        let prompt = Prompt::load(&model_path()).unwrap();
        let vocabulary = Vocabulary::new(prompt.tokenizer(), prompt.end_tokens()).unwrap();
        Self { prompt, vocabulary, engine: Engine::start(config(class, 2)).unwrap() }
    }

    fn job(&self, text: &str, temperature: f32, max_tokens: u32, grammar: &Grammar) -> Job {
        Job {
            grammar: Some(self.vocabulary.compile(grammar).unwrap()),
            ..job(&self.prompt, text, temperature, max_tokens)
        }
    }

    /// As many at a time as there are slots.
    fn run(&self, jobs: &[Job]) -> Vec<Answer> {
        jobs.chunks(8).flat_map(|jobs| together(&self.engine, jobs)).collect()
    }
}

fn regex(text: &str) -> Grammar {
    Grammar { kind: GrammarKind::Regex, text: text.into() }
}

fn schema(value: &Value) -> Grammar {
    Grammar { kind: GrammarKind::JsonSchema, text: value.to_string() }
}

const SUBJECTS: [&str; 7] = [
    "a red apple",
    "the city of Paris",
    "Ada Lovelace",
    "a black cat",
    "the planet Mars",
    "a bicycle",
    "a piano",
];

fn schemas() -> [Value; 3] {
    let text = json!({ "type": "string", "maxLength": 12 });
    [
        json!({ "type": "object", "additionalProperties": false, "required": ["name", "kind", "size"], "properties": {
            "name": text, "kind": { "enum": ["person", "place", "thing"] },
            "size": { "type": "integer", "minimum": 1, "maximum": 1000 } } }),
        json!({ "type": "object", "additionalProperties": false, "required": ["facts", "true"], "properties": {
            "facts": { "type": "array", "items": text, "maxItems": 3 }, "true": { "type": "boolean" } } }),
        json!({ "type": "object", "additionalProperties": false, "required": ["item"], "properties": { "item": {
            "type": "object", "additionalProperties": false, "required": ["colour"], "properties": {
                "colour": { "enum": ["red", "green", "blue", "black", "white"] },
                "tags": { "type": "array", "items": { "enum": ["a", "b"] }, "maxItems": 2 } } } } }),
    ]
}

/// Whether a value satisfies a schema, for the keywords that are used here: written from the specification and not
/// from the library that makes the masks.
fn satisfies(value: &Value, schema: &Value) -> bool {
    let within = |key: &str, value: f64, least: bool| {
        schema
            .get(key)
            .and_then(Value::as_f64)
            .is_none_or(|bound| if least { value >= bound } else { value <= bound })
    };
    let typed = match schema["type"].as_str() {
        Some("string") => {
            value.as_str().is_some_and(|s| within("maxLength", s.chars().count() as f64, false))
        }
        Some("boolean") => value.is_boolean(),
        Some("integer") => value
            .as_i64()
            .is_some_and(|n| within("minimum", n as f64, true) && within("maximum", n as f64, false)),
        Some("array") => value.as_array().is_some_and(|list| {
            within("maxItems", list.len() as f64, false)
                && list.iter().all(|v| satisfies(v, &schema["items"]))
        }),
        Some("object") => value.as_object().is_some_and(|map| {
            let required = schema["required"]
                .as_array()
                .unwrap()
                .iter()
                .all(|key| map.contains_key(key.as_str().unwrap()));
            required && map.iter().all(|(key, value)| satisfies(value, &schema["properties"][key]))
        }),
        _ => schema.get("enum").is_some(),
    };
    typed && schema.get("enum").is_none_or(|values| values.as_array().unwrap().contains(value))
}

#[test]
fn schemas_are_kept_to_at_any_temperature() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let world = World::new(Class::Fast);
    for temperature in [0.0, 1.0] {
        let schemas = schemas();
        let asked: Vec<(String, &Value)> = SUBJECTS
            .iter()
            .flat_map(|subject| schemas.iter().map(move |s| (format!("Describe {subject} as JSON."), s)))
            .collect();
        let jobs: Vec<Job> =
            asked.iter().map(|(text, s)| world.job(text, temperature, 96, &schema(s))).collect();
        for (answer, (question, s)) in world.run(&jobs).iter().zip(&asked) {
            let text = world.prompt.decode(&answer.tokens);
            assert_eq!(answer.finish, Finish::Grammar, "{question}: {text}");
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
            assert!(satisfies(&value, s), "{text} is not {s}");
            assert_eq!(world.vocabulary.check(&schema(s), &answer.tokens, answer.finish), Ok(()));
        }
    }
}

#[test]
fn json_mode_gives_objects_at_any_temperature() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let world = World::new(Class::Fast);
    let object = schema(&json!({ "type": "object" }));
    let mut whole = 0;
    for temperature in [0.0, 1.0] {
        let jobs: Vec<Job> = SUBJECTS
            .iter()
            .flat_map(|subject| {
                ["a short JSON object with one key", "JSON with the keys name and colour"].map(|form| {
                    world.job(&format!("Describe {subject} as {form}."), temperature, 160, &object)
                })
            })
            .collect();
        for answer in world.run(&jobs) {
            let text = world.prompt.decode(&answer.tokens);
            assert_eq!(world.vocabulary.check(&object, &answer.tokens, answer.finish), Ok(()), "{text}");
            match (answer.finish, serde_json::from_str::<Value>(&text)) {
                (Finish::Grammar, Ok(value)) if value.is_object() => whole += 1,
                // Cut at the limit: the beginning of an object, as `check` says.
                (Finish::Length, Err(error)) if error.is_eof() => {}
                other => panic!("{other:?}: {text}"),
            }
        }
    }
    // How often so small a model ends an object by itself; `schemas_are_kept_to` bounds all of its answers.
    assert!(whole >= 10, "{whole} of 42 came to their end");
}

#[test]
fn grammars_do_not_depend_on_company() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let world = World::new(Class::Exact);
    let schemas = schemas();
    let mut jobs = vec![
        world.job("Is the sky blue?", 1.0, 8, &regex("(yes|no|maybe)")),
        world.job("Describe a cat.", 1.0, 48, &schema(&schemas[0])),
        world.job("Describe a cat.", 0.0, 48, &schema(&schemas[1])),
        world.job("Name a date.", 1.0, 16, &regex(r"\d{4}-\d{2}-\d{2}")),
        job(&world.prompt, "Describe a cat.", 1.0, 24),
    ];
    jobs.push(Job { id: uuid::Uuid::now_v7(), ..jobs[1].clone() });
    let expected = alone(&world.engine, &jobs);
    assert_same(&together(&world.engine, &jobs), &expected, "in company");
    assert_eq!(expected[1], expected[5], "the same job under another id");
    for (answer, grammar) in
        [(&expected[0], regex("(yes|no|maybe)")), (&expected[3], regex(r"\d{4}-\d{2}-\d{2}"))]
    {
        assert_eq!(answer.finish, Finish::Grammar);
        assert_eq!(world.vocabulary.check(&grammar, &answer.tokens, Finish::Grammar), Ok(()));
    }
    // A scorer with the same grammar sees what the generator saw; a token that the grammar forbids is infinitely far off.
    let score = |job: &Job, tokens: &[u32]| {
        let asked = ScoreJob {
            id: uuid::Uuid::now_v7(),
            prompt: job.prompt.clone(),
            tokens: tokens.to_vec(),
            params: job.params.clone(),
            seed: job.seed,
            grammar: job.grammar.clone(),
        };
        world.engine.score(asked).unwrap().blocking_recv().unwrap().unwrap()
    };
    for (job, answer) in jobs.iter().zip(&expected) {
        for (score, print) in score(job, &answer.tokens).iter().zip(&answer.fingerprints) {
            assert_eq!((score.rank, score.margin, &score.fingerprint), (Some(0), 0.0, print));
        }
    }
    let beyond = [&expected[0].tokens[..], &[28, 28]].concat();
    let margins: Vec<f64> = score(&jobs[0], &beyond).iter().map(|score| score.margin).collect();
    assert_eq!(margins[margins.len() - 2], f64::INFINITY, "{margins:?}");
    assert!(margins[margins.len() - 1].is_finite(), "{margins:?}");
    // What is forbidden is no candidate; what is allowed has the model's own probability.
    let first = &expected[0].fingerprints[0];
    let total: f32 = first.entries().iter().map(|entry| entry.logprob().exp()).sum();
    assert!(total < 0.5, "raw log-probabilities are not those of the mask: {total}");
    for entry in first.entries() {
        let bytes = world.prompt.tokenizer().token_bytes(entry.token);
        assert!([b"yes".as_slice(), b"no", b"maybe"].iter().any(|word| word.starts_with(bytes)));
    }
}

fn advanced(world: &World, grammar: &Grammar, text: &str) -> Matcher {
    let mut matcher = world.vocabulary.compile(grammar).unwrap();
    for token in world.prompt.tokenizer().encode(text).unwrap() {
        matcher.push(token).unwrap();
    }
    matcher
}

#[test]
fn a_grammar_at_its_end_or_beyond() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let world = World::new(Class::Fast);
    let base = job(&world.prompt, "Say red.", 1.0, 8);
    let grammar = regex("red");
    let only_the_end = Job { grammar: Some(advanced(&world, &grammar, "red")), ..base.clone() };
    let answer = collect(world.engine.generate(only_the_end).unwrap());
    assert_eq!((answer.finish, answer.tokens.len()), (Finish::Eos, 1));
    assert!(world.prompt.end_tokens().contains(&answer.tokens[0]));
    // The limit and the end at the same token: the grammar's end is the reason. A stop string comes before both.
    let red = world.prompt.tokenizer().encode("red").unwrap().len() as u32;
    let exact = Job { max_tokens: red, ..world.job("Say red.", 0.0, 8, &grammar) };
    assert_eq!(collect(world.engine.generate(exact.clone()).unwrap()).finish, Finish::Grammar);
    let stopped = Job { stop: vec!["ed".into()], ..exact };
    assert_eq!(collect(world.engine.generate(stopped).unwrap()).finish, Finish::Stop);
    // Nothing can follow: the job fails in words, and the engine goes on.
    let mut stuck = advanced(&world, &grammar, "red");
    assert!(stuck.push(100).is_err());
    let mut events = world.engine.generate(Job { grammar: Some(stuck), ..base.clone() }).unwrap();
    match events.blocking_recv() {
        Some(Event::Failed { reason }) => {
            assert!(reason.contains("grammar allows no further token"), "{reason}")
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(collect(world.engine.generate(base).unwrap()).tokens.len(), 8);
}

#[test]
fn a_bias_bans_and_forces() {
    let _one = ONE_AT_A_TIME.blocking_lock();
    let world = World::new(Class::Fast);
    let base = job(&world.prompt, "What is the capital of France?", 0.0, 6);
    let plain = collect(world.engine.generate(base.clone()).unwrap());
    let with = |bias: &[(u32, f32)]| {
        let params = SamplingParams { logit_bias: bias.iter().copied().collect(), ..base.params.clone() };
        collect(world.engine.generate(Job { params, ..base.clone() }).unwrap())
    };
    let token = plain.tokens[0];
    let banned = with(&[(token, -100.0)]);
    assert!(!banned.tokens.contains(&token) && banned.tokens[0] != token);
    let forced = with(&[(1_000, 100.0)]);
    assert_eq!(forced.tokens, [1_000; 6]);
    // The raw log-probability is still the model's: it did not want that token.
    assert!(forced.fingerprints[0].entries()[0].logprob() < -3.0);
}
