"""`make bench-node`: the node's engine, in both its classes, and llama.cpp take turns at the same work on the same file.

Environment: ROUNDS (3), THREADS (2), SEQUENCES ("1 4 8 16 32"), TOKENS (128, of an answer), PREFILL (512, of the prompt whose
reading is measured), STREAMS (10), LONG (1500, of the prompt that is read beside them).
Writes OUT (a list of rows), OUT with the ending -rounds.json (every round's figures) and with .svg (a plot).
"""
import argparse
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys

import bandwidth
import plot

HERE = pathlib.Path(__file__).parent
DEFAULTS = {"ROUNDS": "3", "THREADS": "2", "SEQUENCES": "1 4 8 16 32", "TOKENS": "128", "PREFILL": "512", "STREAMS": "10", "LONG": "1500"}
PROMPT = 64  # tokens of the prompts before measured answers
STREAM_PROMPT = 128  # of the streams' prompts
QUIET = 0.9  # least share of its cores that llama.cpp must have had
MIB = 1 << 20
NAME = "bench-node"  # in messages
WORDS = """river miller winter lantern quiet orchard bridge copper letter valley harbour seven thunder basket garden
 northern paper candle village stone sailor morning forest silver market teacher distant island yellow mountain evening
 carpenter window autumn bread kitchen whisper meadow engine summer ribbon""".split()


def setting(name):
    text = os.environ.get(name) or DEFAULTS[name]
    try:
        values = [int(word) for word in text.split()]
    except ValueError:
        values = []
    if not values or min(values) < 1 or (name != "SEQUENCES" and len(values) > 1):
        raise SystemExit(f"bench-node: {name} is '{text}'; give a whole number above 0{', or several' if name == 'SEQUENCES' else ''}")
    return values if name == "SEQUENCES" else values[0]


class Driver:
    """An engine in a process of its own."""

    def __init__(self, name, command):
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self.read()

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{NAME}: {self.name} ended with status {self.process.wait()}; its words are above")
        reply = json.loads(line)
        if "error" in reply:
            raise SystemExit(f"{NAME}: {self.name}: {reply['error']}")
        return reply

    def ask(self, **command):
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self.read()

    def run(self, *waves):
        return self.ask(do="run", waves=[{"when": when, "jobs": jobs} for when, jobs in waves])

    def end(self):
        self.process.stdin.close()
        self.process.wait()


# What people ask; cut to PROMPT tokens, the template's included.
QUESTIONS = (
    "My neighbour's dog barks every night when I come home from work. I like the dog and I like my neighbour. How do I tell him without a quarrel, and what can he do about it?",
    "Why is the sky blue at noon and red in the evening? Explain it to a child of ten years who has never heard of wavelengths, with one experiment that we can do in the kitchen.",
    "We have four days in Lisbon in October, with two small children and little money. What should we see, how do we get around, and which parts of the city should we rather avoid?",
    "I want to bake bread without yeast for the first time. Which flour do I need, how long does the dough have to rest, and how do I know that the loaf is done inside?",
    "Write the beginning of a detective story that takes place in a lighthouse during a storm. The keeper has vanished, his supper is still warm, and the only boat is tied up at the pier.",
    "What is the difference between a virus and a bacterium? My doctor did not give me antibiotics for a cold, and I would like to understand why that was the right decision.",
    "Our small shop sells used books, and fewer people come in every year. Suggest what we could change in the window, in the room and on the web, beginning with what costs least.",
    "Describe how a bill becomes a law in the United States, from the first idea to the signature, and say at which of these points most of the proposals fail and for what reasons.",
)
MORE = "Please answer in whole sentences, and give an example for each of the points that you make."


class Prompts:
    """Prompts of a given length that differ from their first words on, so that no engine can know a beginning."""

    def __init__(self, driver):
        self.driver, self.count, self.random = driver, 0, random.Random(7)
        one, two = self.render("One.", "One."), self.render("Two.", "Two?")
        # What the template puts behind the user's words.
        self.tail = next(one[len(one) - i:] for i in range(len(one)) if one[-i - 1] != two[-i - 1])

    def render(self, system, user):
        return self.driver.ask(do="prompt", system=system, user=user)["tokens"]

    def cut(self, system, user, length):
        tokens = self.render(system, user)
        if len(tokens) < length:
            raise SystemExit(f"{NAME}: a prompt of {length} tokens was wanted, and its text has {len(tokens)}")
        return tokens[:length - len(self.tail)] + self.tail

    def questions(self, count):
        users = self.random.choices(QUESTIONS, k=count)
        first, self.count = self.count + 1, self.count + count
        return [self.cut(f"{first + i}. You are helpful.", f"{user} {MORE}", PROMPT) for i, user in enumerate(users)]

    def long(self, length):
        self.count += 1
        words = self.random.choices(WORDS, k=length)
        names = ", ".join(f"the {a} and the {b}" for a, b in zip(words[::2], words[1::2]))
        return self.cut(f"{self.count}. You tell stories.", f"Tell a long story about {names}.", length)

    def several(self, count, length):
        return [self.long(length) for _ in range(count)]

    def repetitive(self, length):
        self.count += 1
        text = "The red fox runs over the hill and the old dog sleeps in the sun by the gate. "
        return self.cut(f"{self.count}. You repeat.", "Repeat this many times: " + text * (length // 10), length)


def jobs(prompts, tokens, temperature=0.0):
    return [{"prompt": prompt, "tokens": tokens, "temperature": temperature, "seed": i} for i, prompt in enumerate(prompts)]


def prefill(driver, prompt):
    reply = driver.run((0, jobs([prompt], 1)))
    return {"speed": len(prompt) / reply["jobs"][0]["times"][0], "cpu_speed": len(prompt) / max(reply["cpu_secs"], 0.01)}


def decode(driver, prompts, tokens, temperature=0.0):
    """From the moment when all have their first token to the last token."""
    reply = driver.run((0, jobs(prompts, tokens, temperature)))
    times = [job["times"] for job in reply["jobs"]]
    began, ended = max(t[0] for t in times), max(t[-1] for t in times)
    count = sum(t > began for job in times for t in job)
    result = {"speed": count / (ended - began), "cpu_speed": count / max(reply["cpu_secs"] - reply["first_cpu_secs"], 0.01)}
    result["cores"] = reply["cpu_secs"] / reply["wall_secs"]
    if len(times) == 1:
        gaps = [b - a for a, b in zip(times[0], times[0][1:])]
        # Two tokens of one step come almost at once.
        result["guessed"] = sum(gap < statistics.median(gaps) / 4 for gap in gaps) / len(gaps)
    return result


def streams(driver, prompts, tokens, long):
    """All streams at once, then a long prompt beside them."""
    reply = driver.run((0, jobs(prompts, tokens)), (8, jobs([long], 1)))
    *short, reading = reply["jobs"]
    firsts = [job["times"][0] - job["submitted"] for job in short]
    began, ended = reading["submitted"], reading["times"][0]
    gaps = [b - a for job in short for a, b in zip(job["times"], job["times"][1:]) if b > began and a < ended]
    return {"median_ms": statistics.median(firsts) * 1e3, "spread": max(firsts) / statistics.median(firsts),
            "stall_ms": max(gaps) * 1e3, "long_ms": (ended - began) * 1e3}


def score(driver, prompt, answer):
    reply = driver.ask(do="score", prompt=prompt, answer=answer)
    return {"speed": len(answer) / reply["wall_secs"], "cpu_speed": len(answer) / max(reply["cpu_secs"], 0.01)}


def repeated(driver, prompt):
    """The same prompt twice: its first token, and its first token again."""
    first, again = (driver.run((0, jobs([prompt], 1)))["jobs"][0]["times"][0] * 1e3 for _ in range(2))
    return {"first_ms": first, "again_ms": again}


class Bench:
    def __init__(self, args):
        self.settings = {name: setting(name) for name in DEFAULTS}
        threads = str(self.settings["THREADS"])
        most = max(self.settings["SEQUENCES"])
        tokens, beside = self.settings["TOKENS"], self.settings["STREAMS"]
        # As much as llama.cpp's contexts take for the same sequences: whole 256s.
        cache = max(most * -(-(PROMPT + tokens) // 256) * 256, beside * (STREAM_PROMPT + tokens) + self.settings["LONG"] + 256)
        ours = [args.engine, args.model, "--threads", threads, "--slots", str(max(most, beside + 1)), "--cache", str(cache)]
        llama = [sys.executable, str(HERE / "llama.py"), args.model, "--threads", threads]
        self.drivers = [Driver("fast", [*ours, "--class", "fast"]), Driver("exact", [*ours, "--class", "exact"]), Driver("llama", llama)]
        self.prompts = Prompts(self.drivers[0])
        self.samples = {}

    def note(self, name, driver, values):
        for key, value in values.items():
            self.samples.setdefault(f"{driver.name}.{name}.{key}", []).append(value)

    def measure(self, turn, name, task, *args, only_ours=False):
        """Everybody once; who begins changes from round to round."""
        for driver in self.drivers[turn:] + self.drivers[:turn]:
            if not (only_ours and driver.name == "llama"):
                self.note(name, driver, task(driver, *args))
        shown = [f"{d.name} {self.samples[f'{d.name}.{name}.speed'][-1]:.0f}" for d in self.drivers if f"{d.name}.{name}.speed" in self.samples]
        print(f"bench-node: {name} {' '.join(shown)}".rstrip(), file=sys.stderr)

    def round(self, number):
        turn, get, prompts = number % len(self.drivers), self.settings.get, self.prompts
        self.samples.setdefault("bandwidth", []).append(bandwidth.measure(get("THREADS")))
        self.measure(turn, "prefill", prefill, prompts.long(get("PREFILL")))
        for count in get("SEQUENCES"):
            self.measure(turn, f"decode_b{count}", decode, prompts.questions(count), get("TOKENS"))
        if number == 0:
            for driver in self.drivers:
                self.note("memory", driver, {"mib": (driver.ask(do="memory")["peak_bytes"] - driver.ready["base_bytes"]) / MIB})
        self.measure(turn, "sampled", decode, prompts.questions(1), get("TOKENS"), 0.8, only_ours=True)
        self.measure(turn, "repetitive", decode, [prompts.repetitive(256)], get("TOKENS"))
        answer = prompts.long(PROMPT + get("TOKENS"))[PROMPT:]
        self.measure(turn, "score", score, prompts.questions(1)[0], answer)
        self.measure(turn, "streams", streams, prompts.several(get("STREAMS"), STREAM_PROMPT), get("TOKENS"), prompts.long(get("LONG")))
        self.measure(turn, "repeated", repeated, prompts.long(get("PREFILL")), only_ours=True)

    def cores(self, driver):
        """What the process had of the machine while it decoded: less than its threads where others were at work too."""
        names = [f"{driver.name}.decode_b{count}.cores" for count in self.settings["SEQUENCES"]]
        return statistics.median(value for name in names for value in self.samples[name])

    def median(self, name):
        values = self.samples.get(name)
        return statistics.median(values) if values else None

    def rows(self):
        changed = [f"{name}='{os.environ[name]}'" for name in DEFAULTS if os.environ.get(name) not in (None, "", DEFAULTS[name])]
        command = " ".join(["make bench-node", *changed])
        rows = []

        def row(metric, unit, value, baseline=None):
            ratio = value / baseline if baseline else None
            short = [None if v is None else float(f"{v:.4g}") for v in (value, baseline, ratio)]
            rows.append({"metric": metric, "value": short[0], "unit": unit, "baseline": short[1], "ratio": short[2], "command": command})

        def beside(metric, name, unit="tokens/s"):
            for side in ("fast", "exact"):
                row(f"{side}_{metric}", unit, self.median(f"{side}.{name}"), self.median(f"llama.{name}"))

        tasks = [(f"prefill_{self.settings['PREFILL']}", "prefill")]
        tasks += [(f"decode_b{n}", f"decode_b{n}") for n in self.settings["SEQUENCES"]]
        tasks += [("score", "score"), ("decode_b1_repetitive", "repetitive")]
        for metric, name in tasks:
            beside(metric, f"{name}.speed")
            beside(f"{metric}_cpu", f"{name}.cpu_speed", "tokens/CPU-s")
        self.own_rows(row, beside)
        return rows

    def own_rows(self, row, beside):
        """What is not one speed beside llama.cpp's."""
        for driver in self.drivers:
            row(f"{driver.name}_cores", "cores", self.cores(driver), self.settings["THREADS"])
        most = 8 if 8 in self.settings["SEQUENCES"] else max(self.settings["SEQUENCES"])
        limit = self.median("bandwidth") / self.drivers[0].ready["weights_bytes"]
        row("memory_bandwidth", "GB/s", self.median("bandwidth") / 1e9)
        row("bandwidth_limit_b1", "tokens/s", self.median("fast.sampled.speed"), limit)
        if 1 in self.settings["SEQUENCES"]:
            theirs = self.median("bandwidth") / self.drivers[2].ready["weights_bytes"]
            row("llama_bandwidth_limit_b1", "tokens/s", self.median("llama.decode_b1.speed"), theirs)
        for side in ("fast", "exact"):
            sampled = self.median(f"{side}.sampled.speed")
            row(f"{side}_decode_b1_sampled", "tokens/s", sampled, self.median("llama.decode_b1.speed"))
            row(f"{side}_guess_gain_b1", "tokens/s", self.median(f"{side}.repetitive.speed"), sampled)
            if 1 in self.settings["SEQUENCES"]:
                row(f"{side}_guessed_b1", "share of tokens", self.median(f"{side}.decode_b1.guessed"))
            row(f"{side}_together_b{most}", "tokens/s", self.median(f"{side}.decode_b{most}.speed"), sampled)
            row(f"{side}_ttft_repeated", "ms", self.median(f"{side}.repeated.again_ms"), self.median(f"{side}.repeated.first_ms"))
        row("determinism_tax", "tokens/s", self.median(f"exact.decode_b{most}.speed"), self.median(f"fast.decode_b{most}.speed"))
        row("ttft_p99_over_median", "ratio", self.median("fast.streams.spread"), self.median("llama.streams.spread"))
        row("exact_ttft_p99_over_median", "ratio", self.median("exact.streams.spread"), self.median("llama.streams.spread"))
        beside("ttft_median_streams", "streams.median_ms", "ms")
        beside("longest_stall", "streams.stall_ms", "ms")
        beside("ttft_long_beside_streams", "streams.long_ms", "ms")
        beside("memory_peak", "memory.mib", "MiB")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    bench = Bench(args)
    print(f"bench-node: llama.cpp: {bench.drivers[2].ready['system']}", file=sys.stderr)
    for driver in bench.drivers:
        # The first steps of a process find cold memory.
        driver.run((0, jobs(bench.prompts.questions(2), 8)))
    for number in range(bench.settings["ROUNDS"]):
        print(f"bench-node: round {number + 1} of {bench.settings['ROUNDS']}, load average {os.getloadavg()[0]:.1f}", file=sys.stderr)
        bench.round(number)
    for driver in bench.drivers:
        driver.end()
    rows = bench.rows()
    show = lambda value: "-" if value is None else f"{value:.4g}"
    print(f"{'metric':32} {'value':>10} {'unit':16} {'baseline':>10} {'ratio':>8}")
    for row in rows:
        print(f"{row['metric']:32} {show(row['value']):>10} {row['unit']:16} {show(row['baseline']):>10} {show(row['ratio']):>8}")
    # llama.cpp's threads never sleep while it computes.
    if bench.cores(bench.drivers[2]) < QUIET * bench.settings["THREADS"]:
        print("bench-node: THE MACHINE WAS BUSY: threads had to wait for cores, and llama.cpp loses far more by that than the "
              "engine; these are no results, run it again on a quiet machine", file=sys.stderr)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    rounds = {"settings": bench.settings, "samples": bench.samples}
    args.out.with_name(args.out.stem + "-rounds.json").write_text(json.dumps(rounds, indent=1) + "\n", encoding="utf-8")
    args.out.with_suffix(".svg").write_text(plot.draw(rows, bench.settings), encoding="utf-8")


if __name__ == "__main__":
    main()
