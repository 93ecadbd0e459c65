//! What `infera up` tells people and scripts once all is ready.

use std::time::{Duration, Instant};

use crate::{
    cli::UpArgs,
    client::UpFile,
    layout::{Layout, cache, write_secret},
    models::DEFAULT_MODEL,
    say,
    services::Ports,
};

pub(super) fn announce(
    layout: &Layout,
    args: &UpArgs,
    ports: Ports,
    api_key: &str,
    began: Instant,
) -> Result<(), String> {
    let up = UpFile {
        base_url: format!("{}/v1", ports.url("gateway")),
        api_key: api_key.to_owned(),
        explorer_url: ports.url("explorer"),
        rpc_url: ports.rpc_url(),
        profile: args.profile.name().to_owned(),
        settlement_url: ports.url("settlement"),
        mempool_url: ports.url("mempool"),
        dispatcher_url: ports.url("dispatcher"),
        verifier_url: ports.url("verifier"),
        model: DEFAULT_MODEL.to_owned(),
    };
    let bytes = serde_json::to_vec_pretty(&up).map_err(|e| e.to_string())?;
    // Before the file that says it: `--detach` ends with the file.
    say(banner(layout, &up, began.elapsed()));
    write_secret(&layout.up_json(), &bytes).map_err(|e| format!("cannot write up.json: {e}"))
}

fn banner(layout: &Layout, up: &UpFile, took: Duration) -> String {
    let UpFile { base_url, api_key, explorer_url, model, .. } = up;
    let python = cache().join("venv/bin/python");
    let python = if python.exists() { python.display().to_string() } else { "python3".into() };
    let infera = layout.program();
    let infera = infera.display();
    let question = "What is the capital of France?";
    let data = layout.root().display();
    format!(
        "
The network is up ({profile}, {took:.1} s).

  base URL   {base_url}
  API key    {api_key}
  explorer   {explorer_url}

Ask with curl:

  curl -s {base_url}/chat/completions -H 'Authorization: Bearer {api_key}' -H 'Content-Type: application/json' -d '{{\"model\":\"{model}\",\"messages\":[{{\"role\":\"user\",\"content\":\"{question}\"}}],\"temperature\":0}}'

Ask with Python (pip install openai), streamed, with the verdict:

  {python} -c 'from openai import OpenAI; c=OpenAI(base_url=\"{base_url}\", api_key=\"{api_key}\"); [print(x.choices[0].delta.content or getattr(x, \"infera\", \"\") or \"\", end=\"\", flush=True) for x in c.chat.completions.create(model=\"{model}\", messages=[dict(role=\"user\", content=\"{question}\")], temperature=0, stream=True)]; print()'

Check an answer's receipt (RECEIPT is the id under `infera`):

  curl -s {base_url}/receipts/RECEIPT -H 'Authorization: Bearer {api_key}' -o receipt.json && {infera} verify receipt.json --data {data}

{end}",
        profile = up.profile,
        took = took.as_secs_f32(),
        end = "Ctrl-C or `make down` ends it; the data stays.",
    )
}
