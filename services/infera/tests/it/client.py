"""What a developer does after changing base_url: the pip `openai` client against a running network.

usage: client.py BASE_URL API_KEY MODEL. Prints one JSON object: the `infera` objects of the answers.
Fails with an AssertionError that says what a user would have seen.
"""
import json
import sys

import openai

base_url, key, model = sys.argv[1:4]
client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=120)
question = [{"role": "user", "content": "What is the capital of France?"}]


def check_verdict(infera):
    assert infera["verdict"] == "verified", infera
    assert infera["similarity"] == 1.0, infera
    assert len(set(infera["nodes"])) >= 3, infera


assert model in [m.id for m in client.models.list()], "the model is not listed"

plain = client.chat.completions.create(model=model, messages=question, temperature=0, max_tokens=48)
text = plain.choices[0].message.content
assert "Paris" in text, text
assert plain.choices[0].finish_reason in ("stop", "length"), plain
assert plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens
check_verdict(plain.infera)

chunks = list(
    client.chat.completions.create(
        model=model, messages=question, temperature=0, max_tokens=48, stream=True,
        stream_options={"include_usage": True},
    )
)
streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
assert streamed == text, (streamed, text)
assert sum(1 for c in chunks if c.choices and c.choices[0].delta.content) > 1, "it did not stream"
assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == plain.usage.total_tokens
last = [c for c in chunks if c.choices and c.choices[0].finish_reason][-1]
check_verdict(last.infera)

seeded = [
    client.chat.completions.create(model=model, messages=question, temperature=0.8, seed=7, max_tokens=24)
    for _ in range(2)
]
assert seeded[0].choices[0].message.content == seeded[1].choices[0].message.content, "a seed must repeat"

repeat = [
    client.chat.completions.create(
        model=model, messages=question, temperature=0, max_tokens=8,
        extra_headers={"Idempotency-Key": "once-" + plain.id},
    )
    for _ in range(2)
]
assert repeat[0].infera["receipt"] == repeat[1].infera["receipt"], "a repeat was computed twice"


def refused(expected, param=None, client=client, **change):
    request = {"model": model, "messages": question, **change}
    try:
        client.chat.completions.create(**request)
    except expected as error:
        if param:
            assert error.param == param, error.body
        assert error.body["message"], error.body
        return
    raise AssertionError(f"{change} was not refused")


refused(openai.AuthenticationError, client=client.with_options(api_key="nonsense"))
refused(openai.AuthenticationError, client=client.with_options(api_key=key[:-6] + "AAAAAA"))
refused(openai.NotFoundError, model="no-such-model")
refused(openai.BadRequestError, "messages", messages=[])
refused(openai.BadRequestError, "temperature", temperature=9)
refused(openai.BadRequestError, "n", n=9)
refused(openai.BadRequestError, extra_body={"make_it_nice": True})

two = client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": "Name a colour."}], n=2, max_tokens=6, logprobs=True, top_logprobs=2
)
assert [choice.index for choice in two.choices] == [0, 1], two
assert all(len(token.top_logprobs) == 2 for token in two.choices[0].logprobs.content), two

schema = {"type": "object", "properties": {"capital": {"type": "string", "maxLength": 20}}, "required": ["capital"], "additionalProperties": False}
shaped = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "What is the capital of France? Answer in JSON."}],
    response_format={"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}},
    max_tokens=60,
    temperature=0,
)
assert list(json.loads(shaped.choices[0].message.content)) == ["capital"], shaped

print(json.dumps({"plain": plain.infera, "stream": last.infera, "text": text}))
