"""Runs llama.cpp for `make bench-node`, through its C interface: the same commands and answers as services/node/examples/bench.rs,
without "prompt". Draws are greedy whatever a job's temperature.

Work is put into batches as llama.cpp's server does: every step has one token of each sequence that is past its prompt and as much
of the others' prompts as fits into n_batch. A context is made for each command, outside its time, with just the room that its jobs
need. All other settings are llama.cpp's defaults: 16-bit keys and values, flash attention, n_batch 2048, n_ubatch 512.
"""
import argparse
import ctypes
import json
import sys
import time

import numpy as np


def status(field):
    """A line of /proc/self/status, in bytes."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


class Batch:
    """A llama_batch whose arrays are numpy's, so that filling one costs next to nothing."""

    def __init__(self, size):
        self.token = np.zeros(size, np.int32)
        self.pos = np.zeros(size, np.int32)
        self.count = np.ones(size, np.int32)
        self.seq = np.zeros(size, np.int32)
        self.logits = np.zeros(size, np.int8)
        base, step = self.seq.ctypes.data, self.seq.itemsize
        self.seqs = (ctypes.POINTER(ctypes.c_int32) * size)(
            *(ctypes.cast(base + i * step, ctypes.POINTER(ctypes.c_int32)) for i in range(size)))
        self.raw = lib.llama_batch(
            n_tokens=0, token=self.of(self.token, ctypes.c_int32), embd=None, pos=self.of(self.pos, ctypes.c_int32),
            n_seq_id=self.of(self.count, ctypes.c_int32), seq_id=self.seqs, logits=self.of(self.logits, ctypes.c_int8))
        self.used = 0

    @staticmethod
    def of(array, kind):
        return array.ctypes.data_as(ctypes.POINTER(kind))

    def add(self, sequence, start, tokens, wanted):
        """`wanted`: how many of the last tokens' logits."""
        span = slice(self.used, self.used + len(tokens))
        self.token[span] = tokens
        self.pos[span] = np.arange(start, start + len(tokens))
        self.seq[span] = sequence
        self.logits[span] = 0
        self.logits[span.stop - wanted:span.stop] = 1
        self.used = span.stop


class Context:
    """Room for `sequences` of `length` tokens each."""

    BATCH = 2048

    def __init__(self, model, threads, sequences, length, outputs):
        params = lib.llama_context_default_params()
        params.n_ctx = sequences * -(-length // 256) * 256
        params.n_seq_max = sequences
        params.n_batch = self.BATCH
        params.n_outputs_max = outputs
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False  # a buffer for each sequence: at 8 and 32 sequences 9 to 26 % more tokens per CPU second than one for all
        params.no_perf = True
        self.raw = lib.llama_init_from_model(model, params)
        if not self.raw:
            raise RuntimeError("llama.cpp refused the context")
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self.batch = Batch(self.BATCH)
        # The first decoding of a context is slower than the others.
        self.batch.add(0, 0, [1], 1)
        self.decode(1)
        lib.llama_memory_clear(lib.llama_get_memory(self.raw), True)

    def decode(self, outputs):
        """Computes the batch; logits of the rows that want them, [outputs][vocabulary]."""
        self.batch.raw.n_tokens, self.batch.used = self.batch.used, 0
        code = lib.llama_decode(self.raw, self.batch.raw)
        if code:
            raise RuntimeError(f"llama_decode gave {code}")
        if not outputs:
            lib.llama_synchronize(self.raw)
            return np.empty((0, self.vocabulary), np.float32)
        return np.ctypeslib.as_array(lib.llama_get_logits(self.raw), (outputs, self.vocabulary))

    def free(self):
        lib.llama_free(self.raw)


class Job:
    def __init__(self, index, work, now):
        self.index, self.prompt, self.wanted = index, work["prompt"], work["tokens"]
        self.submitted, self.read = now, 0
        self.times, self.tokens = [], []

    def is_over(self):
        return len(self.tokens) >= self.wanted


def step(context, jobs, began):
    """One batch for all jobs that are not over."""
    batch, rows = context.batch, []
    for job in jobs:
        if job.tokens:
            batch.add(job.index, len(job.prompt) + len(job.tokens) - 1, job.tokens[-1:], 1)
            rows.append(job)
    for job in jobs:
        if not job.tokens:
            piece = job.prompt[job.read:job.read + context.BATCH - batch.used]
            if piece:
                last = job.read + len(piece) == len(job.prompt)
                batch.add(job.index, job.read, piece, int(last))
                job.read += len(piece)
                rows += [job] if last else []
    for job, logits in zip(rows, context.decode(len(rows))):
        job.tokens.append(int(np.argmax(logits)))
        job.times.append(time.perf_counter() - began)


def run(model, threads, waves):
    works = [work for wave in waves for work in wave["jobs"]]
    length = max(len(work["prompt"]) + work["tokens"] for work in works)
    context = Context(model, threads, len(works), length, len(works))
    try:
        jobs, waves, first = [], list(waves), None
        began, cpu = time.perf_counter(), time.process_time()
        while waves or not all(job.is_over() for job in jobs):
            while waves and all(len(job.tokens) >= waves[0]["when"] for job in jobs):
                now = time.perf_counter() - began
                jobs += [Job(len(jobs) + i, work, now) for i, work in enumerate(waves.pop(0)["jobs"])]
            step(context, [job for job in jobs if not job.is_over()], began)
            if first is None and not waves and all(job.tokens for job in jobs):
                first = time.process_time() - cpu
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    finally:
        context.free()
    seen = [{"submitted": job.submitted, "times": job.times, "tokens": job.tokens} for job in jobs]
    return {"wall_secs": wall, "cpu_secs": cpu, "first_cpu_secs": first, "jobs": seen}


def score(model, threads, prompt, answer):
    """How far each token of the answer is below the best one, in logits."""
    tokens = prompt + answer[:-1]
    if len(tokens) > Context.BATCH:
        raise ValueError(f"prompt and answer have {len(tokens)} tokens, at most {Context.BATCH} are scored")
    context = Context(model, threads, 1, len(tokens), len(answer))
    try:
        began, cpu = time.perf_counter(), time.process_time()
        context.batch.add(0, 0, tokens, len(answer))
        gaps = [float(logits.max() - logits[token]) for token, logits in zip(answer, context.decode(len(answer)))]
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    finally:
        context.free()
    return {"wall_secs": wall, "cpu_secs": cpu, "gaps": gaps}


def answer(model, threads, command):
    match command:
        case {"do": "run", "waves": waves}:
            return run(model, threads, waves)
        case {"do": "score", "prompt": prompt, "answer": tokens}:
            return score(model, threads, prompt, tokens)
        case {"do": "memory"}:
            return {"peak_bytes": status("VmHWM")}
    raise ValueError(f"no such command: {command.get('do')}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    base, began = status("VmRSS"), time.perf_counter()
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(args.model.encode(), lib.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {args.model}")
    load = time.perf_counter() - began
    ready = {"load_secs": load, "base_bytes": base, "weights_bytes": lib.llama_model_size(model),
             "system": lib.llama_print_system_info().decode().strip()}
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        try:
            reply = answer(model, args.threads, json.loads(line))
        except (RuntimeError, ValueError) as error:
            reply = {"error": str(error)}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    # Here, so that what importing it costs is not taken for the model's memory and time.
    from llama_cpp import llama_cpp as lib

    @lib.llama_log_callback
    def log(level, text, _):
        if level == 4:  # an error
            sys.stderr.write(text.decode(errors="replace"))

    lib.llama_log_set(log, None)
    main()
