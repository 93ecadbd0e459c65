"""`make bench-greedy`: greedy answers of the node's engine, in both its classes, beside llama.cpp's on the same file, token by token.

Where two answers part, each engine says how far the other's token is below its own, in logits. Two engines that compute with other
roundings part at near-ties only: a gap as wide as what their logits differ by. Environment: THREADS (2), TOKENS (64, of an answer).
Writes OUT (a list of rows) and OUT with the ending -partings.json (every parting with its prompt, tokens and gaps).
"""
import argparse
import json
import os
import pathlib
import sys

import bench
from bench import Driver, HERE, jobs

PROMPTS = 50
SYSTEM = "You are a helpful assistant."


def prompts(driver):
    """The first of the bench of trust: arithmetic, facts, stories, lists."""
    lines = (HERE.parent / "trust/prompts.txt").read_text(encoding="utf-8").splitlines()
    users = [line for line in lines if line][:PROMPTS]
    return users, [driver.ask(do="prompt", system=SYSTEM, user=user)["tokens"] for user in users]


def answers(driver, rendered, count):
    """One at a time, as the shortest way to what an engine says of a prompt alone."""
    return [driver.run((0, jobs([prompt], count)))["jobs"][0]["tokens"] for prompt in rendered]


def ended(tokens, ends):
    """An answer up to its end token; the bench lets engines go on."""
    last = next((at for at, token in enumerate(tokens) if token in ends), len(tokens) - 1)
    return tokens[:last + 1]


def parting(prompt, ours, theirs, engine, llama):
    """None for equal answers; otherwise where they part, and each engine's gap there."""
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), None)
    if at is None:
        return None
    gap = lambda driver, token: driver.ask(do="score", prompt=prompt, answer=ours[:at] + [token])["gaps"][-1]
    return {"position": at, "tokens": [ours[at], theirs[at]], "gap": gap(engine, theirs[at]), "llama_gap": gap(llama, ours[at])}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    threads, count = str(bench.setting("THREADS")), int(os.environ.get("TOKENS") or 64)
    llama = Driver("llama.cpp", [sys.executable, str(HERE / "llama.py"), args.model, "--threads", threads])
    rows, partings, theirs = [], {}, None

    def row(metric, unit, value, baseline=None):
        rows.append({"metric": metric, "value": value, "unit": unit, "baseline": baseline,
                     "ratio": value / baseline if baseline else None, "command": "make bench-greedy"})

    for name in ("exact", "fast"):
        engine = Driver(name, [args.engine, args.model, "--class", name, "--threads", threads])
        ends = set(engine.ready["end_tokens"])
        users, rendered = prompts(engine)
        theirs = theirs or answers(llama, rendered, count)
        found = []
        for user, prompt, own, other in zip(users, rendered, answers(engine, rendered, count), theirs):
            one = parting(prompt, ended(own, ends), ended(other, ends), engine, llama)
            found += [{"prompt": user, **one}] if one else []
        engine.end()
        gaps = sorted(max(one["gap"], one["llama_gap"]) for one in found)
        row(f"{name}_equal", "answers", len(users) - len(found), len(users))
        row(f"{name}_gap_median", "logits", gaps[len(gaps) // 2] if gaps else 0.0)
        row(f"{name}_gap_widest", "logits", gaps[-1] if gaps else 0.0)
        partings[name] = found
    llama.end()
    print(f"{'metric':24} {'value':>10} {'unit':10} {'baseline':>10}")
    for one in rows:
        print(f"{one['metric']:24} {one['value']:>10.4g} {one['unit']:10} {one['baseline'] if one['baseline'] else '-':>10}")
    for name, found in partings.items():
        for one in found:
            print(f"{name}: at {one['position']}, gap {one['gap']:.3f} ({one['llama_gap']:.3f} in llama.cpp): {one['prompt'][:70]}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    args.out.with_name(args.out.stem + "-partings.json").write_text(json.dumps(partings, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
