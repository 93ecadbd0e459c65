use super::*;

#[derive(serde::Deserialize)]
struct Dialect {
    messages: Vec<Message>,
    now_ms: i64,
    cases: Vec<Case>,
}

#[derive(serde::Deserialize)]
struct Case {
    template: String,
    text: Option<String>,
}

fn names() -> Names {
    Names { bos: Some("<s>".into()), eos: Some("</s>".into()), ..Names::default() }
}

fn rendered(source: &str, messages: &[Message]) -> Result<String, String> {
    let template = Template::new(source, names()).map_err(|e| e.to_string())?;
    template.render(messages, 0).map_err(|e| e.to_string())
}

#[test]
fn constructs_mean_what_jinja2_means() {
    let dialect: Dialect =
        serde_json::from_str(include_str!("../../tests/it/fixtures/dialect.json")).unwrap();
    assert!(dialect.cases.len() > 35);
    for Case { template, text } in &dialect.cases {
        let made = Template::new(template, names()).map_err(|e| e.to_string());
        let got = made.and_then(|t| t.render(&dialect.messages, dialect.now_ms).map_err(|e| e.to_string()));
        match text {
            Some(text) => assert_eq!(got.as_ref(), Ok(text), "{template}"),
            None => assert!(got.is_err(), "{template} gave {got:?}"),
        }
    }
}

#[test]
fn hostile_templates_are_stopped() {
    let deep = |open: &str, n: usize, close: &str| format!("{}1{}", open.repeat(n), close.repeat(n));
    let doubling = "{% set x = x ~ x %}".repeat(60);
    let elifs = format!("{{% if a %}}{}{{% endif %}}", "{% elif a %}".repeat(MANY));
    const MANY: usize = 5000;
    for (source, text) in [
        // Endless, or as good as.
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}".to_owned(), "endless loop"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".into(), "recursion"),
        ("{% macro f(x) %}{{ g(x) }}{% endmacro %}{% macro g(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}".into(), ""),
        ("{% for i in range(99999999) %}{% endfor %}".into(), "too many elements"),
        // Texts that grow.
        (format!("{{% set x = 'xxxxxxxx' %}}{doubling}{{{{ x|length }}}}"), "builds more than"),
        (
            "{% set n = namespace(x='xx') %}{% for i in range(80) %}{% set n.x = n.x + n.x %}{% endfor %}".into(),
            "builds more than",
        ),
        ("{{ 'x' * 100000000000 }}".into(), "builds more than"),
        ("{{ ('x' * 10000000) ~ ('x' * 10000000) }}".into(), "builds more than"),
        (
            "{% set n = namespace(x='x') %}{% for i in range(80) %}{% set n.x = n.x|replace('x', 'xx') %}{% endfor %}"
                .into(),
            "builds more than",
        ),
        (
            "{% set n = namespace(x='x') %}{% for i in range(80) %}{% set n.x = [n.x, n.x]|join(n.x) %}{% endfor %}"
                .into(),
            "builds more than",
        ),
        (
            "{% macro d(x, n) %}{% if n %}{{ d(x, n - 1) }}{{ d(x, n - 1) }}{% else %}xxxxxxxxxx{% endif %}{% endmacro %}{{ d(1, 16) }}"
                .into(),
            "",
        ),
        (
            format!("{{% for i in range(90000) %}}{{% set x %}}{}{{% endset %}}{{% endfor %}}", "y".repeat(20_000)),
            "builds more than",
        ),
        (format!("{{% for i in range(90000) %}}{}{{% endfor %}}", "y".repeat(20_000)), "builds more than"),
        // Lists that grow.
        (
            "{% set n = namespace(x=[1]) %}{% for i in range(80) %}{% set n.x = n.x + n.x %}{% endfor %}".into(),
            "values",
        ),
        (
            "{% set n = namespace(x=[1]) %}{% for i in range(80) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}"
                .into(),
            "nest",
        ),
        (
            "{% set n = namespace(x=[1]) %}{% for i in range(99999) %}{% set n.x = n.x[0:] %}{% endfor %}".into(),
            "endless loop",
        ),
        // Cycles.
        ("{% set n = namespace() %}{% set n.x = n %}{{ n }}".into(), "cannot be kept"),
        ("{% set n = namespace() %}{% set n.x = [n] %}{{ n.x }}".into(), "cannot be kept"),
        ("{% set n = namespace() %}{% set n.x = {'a': [[n]]} %}".into(), "cannot be kept"),
        ("{% set m = namespace() %}{% set n = namespace(x=m) %}".into(), "cannot be kept"),
        ("{% macro f() %}{{ n.x }}{% endmacro %}{% set n = namespace(x=f) %}".into(), "cannot be kept"),
        ("{{ dict(a=namespace()) }}".into(), "cannot be kept"),
        // Trees that are too deep to walk.
        (format!("{{{{ 1{} }}}}", "+1".repeat(MANY)), "operators"),
        (format!("{{{{ x{} }}}}", ".y".repeat(MANY)), "operators"),
        (format!("{{{{ x{} }}}}", "|trim".repeat(MANY)), "operators"),
        (format!("{{{{ {}x }}}}", "not ".repeat(MANY)), "operators"),
        (format!("{{{{ {} }}}}", deep("(", MANY, ")")), "operators"),
        (format!("{{{{ {} }}}}", deep("[", 180, "]")), ""),
        (deep("{% if true %}", MANY, "{% endif %}"), ""),
        (deep("{% for i in [1] %}", 149, "{% endfor %}"), ""),
        (elifs, "elif"),
        (format!("{{{{ [{}] }}}}", "1,".repeat(70_000)), "items"),
        (format!("{{{{ f({}) }}}}", "1,".repeat(70_000)), "Too many arguments"),
        // Other files.
        ("{% include 'chat' %}".into(), "include"),
        ("{% extends 'chat' %}".into(), "extends"),
        ("{% import 'chat' as c %}".into(), "import"),
        ("{% block b %}{{ self.b() }}{% endblock %}".into(), "block"),
        ("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}".into(), "recursive"),
        // Nonsense.
        ("{{ f(*x) }}".into(), "starred"),
        ("{{ 2 ** 999 }}".into(), "**"),
        ("{{ 'x'|nope }}".into(), "nope"),
        ("{{ 'x'.nope() }}".into(), "nope"),
        ("{{ 9223372036854775807 + 1 }}".into(), "cannot add"),
        ("{{ 'x'[::0] }}".into(), "zero"),
        ("{{ {[1]: 2} }}".into(), "key"),
        ("{{ [1]|tojson(indent=99999999) }}".into(), "at most"),
        ("{% set messages[0].role = 'x' %}".into(), ""),
        ("{% if %}".into(), "syntax error"),
        ("{{".into(), "syntax error"),
    ] {
        let shown: String = source.chars().take(120).collect();
        let got = rendered(&source, &[Message::new("user", "x")]).expect_err(&shown);
        assert!(got.contains(text), "{shown}: {got}");
        assert!(got.len() < 600, "{shown}: {} letters of error", got.len());
    }
}

#[test]
fn what_is_just_allowed_works() {
    for source in [
        format!("{{{{ 1{} }}}}", "+1".repeat(guard::MAX_OPERATORS)),
        format!("{{% if a %}}{}{{% endif %}}", "{% elif a %}".repeat(guard::MAX_ELIF)),
        format!("{{{{ [{}]|length }}}}", "1,".repeat(guard::MAX_ITEMS)),
        format!("{}1{}", "{% if true %}".repeat(40), "{% endif %}".repeat(40)),
    ] {
        let shown: String = source.chars().take(60).collect();
        assert!(rendered(&source, &[Message::new("user", "x")]).is_ok(), "{shown}");
    }
}

#[test]
fn a_template_of_any_length_is_refused_by_its_length() {
    let source = "x".repeat(100 << 20);
    let got = Template::new(&source, names()).unwrap_err().to_string();
    assert_eq!(got, "unsupported model: chat template: 104857600 bytes, the limit is 262144");
}

#[test]
fn long_chats_fit_the_limits() {
    let many: Vec<Message> =
        (0..2001).map(|i| Message::new(["user", "assistant"][i % 2], "some words ".repeat(100))).collect();
    for name in ["qwen3", "llama3_1", "gemma3", "mistral_v3_tekken", "smollm2"] {
        let path = format!("{}/tests/it/fixtures/templates/{name}.jinja", env!("CARGO_MANIFEST_DIR"));
        let text = rendered(&std::fs::read_to_string(path).unwrap(), &many);
        assert!(text.as_ref().is_ok_and(|t| t.len() > 2_000_000), "{name} {:?}", text.err());
    }
}
