"""The stock OpenAI client against a gateway whose network answers every request with one text."""
import sys

import openai

base_url, api_key, model, answer = sys.argv[1:]
client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0)
question = [{"role": "user", "content": "What is the capital of France?"}]


def ask(**options):
    return client.chat.completions.create(**{"model": model, "messages": question, **options})


def refused(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise SystemExit(f"{kind.__name__} was expected")


assert [m.id for m in client.models.list()] == [model]
assert client.models.retrieve(model).owned_by == "infera"

price = client.models.retrieve(model).infera
quoted = client.post("/quote", body={"model": model, "messages": question, "max_tokens": 30}, cast_to=object)
assert quoted["hold_micro"] == price["price_micro"] * price["replicas"] * (quoted["prompt_tokens"] + 30)

first = ask()
assert first.choices[0].message.content == answer and first.choices[0].finish_reason == "stop"
assert first.infera["verdict"] == "verified" and first.infera["similarity"] == 1.0
assert len(first.infera["nodes"]) == 3 and first.infera["receipt_url"].endswith(first.infera["receipt"])
assert first.usage.total_tokens == first.usage.prompt_tokens + first.usage.completion_tokens
assert first._request_id

# An earlier answer goes back into the conversation as the client got it.
chat = [*question, first.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "and?"}]}]
cut = ask(messages=chat, stop=[answer[-4:]], max_tokens=30, seed=3, user="u", extra_headers={"Idempotency-Key": "a"})
assert cut.choices[0].message.content == answer[:-4]

chunks = list(ask(stream=True, stream_options={"include_usage": True}))
assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == answer
assert chunks[-1].usage.completion_tokens and chunks[-1].choices == []
assert chunks[-2].infera["verdict"] == "verified" and chunks[-2].choices[0].finish_reason == "stop"
with client.chat.completions.stream(model=model, messages=question, extra_body={"infera": {"stream": "fast"}}) as events:
    assert events.until_done().get_final_completion().choices[0].message.content == answer

two = ask(n=2, seed=7)
assert [c.index for c in two.choices] == [0, 1] and {c.message.content for c in two.choices} == {answer}
assert len({c["receipt"] for c in two.infera["choices"]}) == 2
texts = {0: "", 1: ""}
for chunk in ask(n=2, stream=True):
    for choice in chunk.choices:
        texts[choice.index] += choice.delta.content or ""
assert texts == {0: answer, 1: answer}

told = ask(logprobs=True, top_logprobs=2, logit_bias={"5": -100}).choices[0].logprobs.content
assert "".join(t.token for t in told) == answer and bytes(b for t in told for b in t.bytes).decode() == answer
assert all(t.logprob == -1.5 and [a.logprob for a in t.top_logprobs] == [-0.5, -1.5] for t in told)
with client.chat.completions.stream(model=model, messages=question, logprobs=True) as events:
    kept = events.until_done().get_final_completion().choices[0].logprobs.content
assert [t.token for t in kept] == [t.token for t in told]

schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
form = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema, "strict": True}}
assert ask(response_format=form).choices[0].message.content == answer
assert ask(response_format={"type": "json_object"}).choices[0].message.content == answer
assert ask(extra_body={"guided_regex": "a|b"}).choices[0].message.content == answer
bad = {**form, "json_schema": {"name": "place", "schema": {"type": "king"}}}
assert "king" in refused(openai.BadRequestError, lambda: ask(response_format=bad)).message

tool = {"type": "function", "function": {"name": "x"}}
for options, param in [({"tools": [tool]}, "tools"), ({"n": 9}, "n"), ({"temperature": 5}, "temperature")]:
    assert refused(openai.BadRequestError, lambda: ask(**options)).param == param
assert refused(openai.NotFoundError, lambda: ask(model="gpt-9")).code == "model_not_found"
assert refused(openai.APIStatusError, lambda: ask(user="x" * 20_000_000)).status_code == 413
stranger = openai.OpenAI(base_url=base_url, api_key="sk-x", max_retries=0)
assert refused(openai.AuthenticationError, stranger.models.list).code == "invalid_api_key"
