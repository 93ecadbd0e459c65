"""`deploy/gpu/bench`: the node's engine on a GPU, beside what the GPU's memory allows and beside transformers.

Environment: DEVICE (cuda:0), ROUNDS (3), SEQUENCES ("1 64 256"), TOKENS (128, of an answer), PREFILL (512), CONTEXT (2048).
Writes OUT, a list of {metric, value, unit, baseline, ratio, command}; values are medians of the rounds.

A step of decoding reads all weights once and the keys and values of every sequence: the limit is what the GPU's measured
bandwidth allows for these bytes, at the mean length of the sequences.
"""
import argparse
import json
import os
import pathlib
import statistics
import sys
import time

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "node"))
import bench as node  # noqa: E402 (the driver of the engine and the prompts)

node.NAME = "bench-gpu"
MIB = 1 << 20
DEFAULTS = {"ROUNDS": "3", "SEQUENCES": "1 64 256", "TOKENS": "128", "PREFILL": "512", "CONTEXT": "2048"}
COPY = 1 << 30  # bytes that are copied to measure the bandwidth
COPIES = 20


def settings():
    found = {name: os.environ.get(name) or default for name, default in DEFAULTS.items()}
    try:
        values = {name: [int(word) for word in text.split()] for name, text in found.items()}
    except ValueError:
        raise SystemExit(f"bench-gpu: whole numbers are wanted, these are given: {found}")
    for name, several in values.items():
        if not several or min(several) < 1 or (name != "SEQUENCES" and len(several) > 1):
            raise SystemExit(f"bench-gpu: {name} is '{found[name]}'; give a whole number above 0{', or several' if name == 'SEQUENCES' else ''}")
    if max(values["SEQUENCES"]) > 256:
        raise SystemExit("bench-gpu: SEQUENCES are at most 256")
    return {name: several if name == "SEQUENCES" else several[0] for name, several in values.items()}


def say(text):
    print(f"bench-gpu: {text}", file=sys.stderr, flush=True)


def bandwidth(torch, device):
    """Bytes a second that a large copy reads and writes, the best of some."""
    size = COPY if device.type == "cuda" else COPY // 16
    a = torch.ones(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    best = 0.0
    for _ in range(COPIES):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        b.copy_(a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * size / (time.perf_counter() - began))
    del a, b
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return best


def taken(torch, device):
    """MiB of the device that anybody holds."""
    if device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / MIB


def speed(times):
    """Tokens a second, from the moment when all sequences have their first token to the last token."""
    began, ended = max(t[0] for t in times), max(t[-1] for t in times)
    return sum(t > began for of in times for t in of) / (ended - began)


class Samples:
    def __init__(self):
        self.values = {}

    def note(self, name, value):
        self.values.setdefault(name, []).append(value)
        say(f"{name} {value:.4g}")

    def median(self, name):
        values = self.values.get(name)
        return statistics.median(values) if values else None


class Work:
    """The same prompts for everybody, other ones in each round."""

    def __init__(self, driver, setting):
        prompts = node.Prompts(driver)
        rounds = range(setting["ROUNDS"] + 1)  # the first warms up
        self.decode = [{n: prompts.questions(n) for n in setting["SEQUENCES"]} for _ in rounds]
        self.prefill = [prompts.long(setting["PREFILL"]) for _ in rounds]


def engine(args, setting, shim, samples, name, work=None, torch=None, device=None):
    """All measurements of one engine process; gives the work and what the weights need."""
    most, context = max(setting["SEQUENCES"]), setting["CONTEXT"]
    os.environ["INFERA_CUDA_GRAPHS"] = shim
    before = taken(torch, device)
    threads = str(min(16, os.cpu_count() or 1))
    command = [args.engine, args.model, "--class", "bf16", "--device", str(device), "--threads", threads]
    driver = node.Driver(name, [*command, "--slots", str(most), "--context", str(context), "--cache", str((most + 1) * context)])
    work = work or Work(driver, setting)
    loaded = taken(torch, device)
    for number in range(setting["ROUNDS"] + 1):
        for n in setting["SEQUENCES"]:
            reply = driver.run((0, node.jobs(work.decode[number][n], setting["TOKENS"])))
            if number:
                samples.note(f"{name}.decode_b{n}", speed([job["times"] for job in reply["jobs"]]))
        reply = driver.run((0, node.jobs([work.prefill[number]], 1)))
        if number:
            samples.note(f"{name}.prefill", len(work.prefill[number]) / reply["jobs"][0]["times"][0])
    for number in range(setting["ROUNDS"]):
        samples.note(f"{name}.pause", driver.ask(do="pause", prompts=work.decode[number][most])["pause_secs"])
        samples.note(f"{name}.pause_left", max(taken(torch, device) - before, 0.0))
        samples.note(f"{name}.resume", driver.ask(do="resume")["resume_secs"])
    samples.note(f"{name}.memory", loaded - before)
    weights = driver.ready["weights_bytes"]
    driver.end()
    return work, weights


def load(args, torch, device):
    """The same file's weights as bf16, in transformers."""
    from transformers import AutoModelForCausalLM

    path = pathlib.Path(args.model)
    options = {"gguf_file": path.name, "dtype": torch.bfloat16}
    try:
        from transformers import GgufConfig
    except ImportError:
        pass  # an older one dequantises in any case
    else:
        options["quantization_config"] = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(path.parent, **options).eval().to(device)


def transformers(model, setting, samples, work):
    """Continuous batching, with its defaults: CUDA graphs, and flash attention where that is installed."""
    from transformers import GenerationConfig

    def run(prompts, tokens):
        config = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        began = time.perf_counter()
        # Its manager is made for the work at hand; making it and recording graphs is no part of what is measured.
        options = {"generation_config": config, "record_timestamps": True, "persistent_manager": tokens == 1}
        outputs = list(model.generate_batch(prompts, **options).values())
        if len(outputs) != len(prompts) or any(o.error or len(o.timestamps) != tokens for o in outputs):
            raise SystemExit(f"bench-gpu: transformers failed: {[o.error for o in outputs if o.error][:1]}")
        return began, [o.timestamps for o in outputs]

    for number in range(setting["ROUNDS"] + 1):
        for n in setting["SEQUENCES"]:
            _, times = run(work.decode[number][n], setting["TOKENS"])
            if number:
                samples.note(f"transformers.decode_b{n}", speed(times))
        began, times = run([work.prefill[number]], 1)
        if number:
            samples.note("transformers.prefill", len(work.prefill[number]) / (times[0][0] - began))


def rows(setting, samples, weights, config, command):
    table = []

    def row(metric, unit, value, baseline=None):
        ratio = value / baseline if value is not None and baseline else None
        short = [None if v is None else float(f"{v:.4g}") for v in (value, baseline, ratio)]
        table.append({"metric": metric, "value": short[0], "unit": unit, "baseline": short[1], "ratio": short[2], "command": command})

    get = samples.median
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = config.num_hidden_layers * 2 * heads * size * 2  # bytes of keys and values in bf16
    length = node.PROMPT + setting["TOKENS"] / 2
    row("gpu_bandwidth", "GB/s", get("bandwidth") / 1e9)
    for n in setting["SEQUENCES"]:
        limit = n * get("bandwidth") / (weights + n * length * token)
        graphs = get(f"graphs.decode_b{n}")
        best = graphs or get(f"eager.decode_b{n}")
        row(f"gpu_decode_b{n}_of_limit", "tokens/s", best, limit)
        row(f"gpu_decode_b{n}_graphs_over_eager", "tokens/s", graphs, get(f"eager.decode_b{n}"))
        row(f"gpu_decode_b{n}_over_transformers", "tokens/s", best, get(f"transformers.decode_b{n}"))
    prefill = get("graphs.prefill") or get("eager.prefill")
    row(f"gpu_prefill_{setting['PREFILL']}", "tokens/s", prefill, get("transformers.prefill"))
    name = "graphs" if get("graphs.pause") is not None else "eager"
    row("gpu_pause", "s", get(f"{name}.pause"))
    row("gpu_resume", "s", get(f"{name}.resume"))
    row("gpu_memory_left_in_pause", "MiB", get(f"{name}.pause_left"), get(f"{name}.memory"))
    return table


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--shim", required=True, help="libinfera_cuda_graphs.so, or off")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    setting = settings()
    import torch

    device = torch.device(os.environ.get("DEVICE", "cuda:0"))
    about = torch.cuda.get_device_name(device) if device.type == "cuda" else "the processor: A DRY RUN, its figures mean nothing"
    say(f"{about}; torch {torch.__version__}")
    samples = Samples()
    for _ in range(setting["ROUNDS"]):
        samples.note("bandwidth", bandwidth(torch, device))
    # Both with the shim where there is one: it also decides how products are summed.
    eager = "off" if args.shim == "off" else f"off:{args.shim}"
    work, weights = engine(args, setting, eager, samples, "eager", torch=torch, device=device)
    if args.shim != "off":
        engine(args, setting, args.shim, samples, "graphs", work, torch, device)
    model = load(args, torch, device)
    transformers(model, setting, samples, work)
    changed = [f"{name}='{os.environ[name]}'" for name in DEFAULTS if os.environ.get(name) not in (None, "", DEFAULTS[name])]
    table = rows(setting, samples, weights, model.config, " ".join([*changed, "deploy/gpu/bench", f"({about})"]))
    show = lambda value: "-" if value is None else f"{value:.4g}"
    print(f"{'metric':36} {'value':>10} {'unit':10} {'baseline':>10} {'ratio':>8}")
    for row in table:
        print(f"{row['metric']:36} {show(row['value']):>10} {row['unit']:10} {show(row['baseline']):>10} {show(row['ratio']):>8}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
