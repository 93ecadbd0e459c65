"""What follows from evidence: the rules of docs/src/receipts.md on requests, outputs, referees, agreement, and the receipt."""

import struct

from receipts_crypto import keccak, ln
from receipts_format import (
    ALWAYS_PPM, MIXED, EPOCH_MS, Wrong, account_hash, answer_hash, be32, below, beta, calibration_hash, commitments_root,
    delivery_order, draw_referees, eligible_root, ensure, f32, happens, prompt_hash, raw, read, request_hash,
    salted_output, shown, EVIDENCE,
)  # fmt: skip

MIN_REPLICAS, MAX_REPLICAS, MAX_REFEREES, FULL = 3, 7, 16, 1_000_000
PLANTED_PPM, DECIDING_VOTES, U64_MAX, NO_ORDER = 50_000, 3, 2**64 - 1, 2**32 - 1


def epoch_of(ms):
    return max(ms, 0) // EPOCH_MS


def quorum(k):
    return k // 2 + 1


# Requests and outputs.


def check_request(e):
    r, s = e["request"], e["request"]["sampling"]
    grammar = r.get("grammar")
    ensure(1 <= len(r["prompt"]) <= 8192, "the prompt has no tokens or too many")
    ensure(1 <= r["max_tokens"] <= 8192, "max_tokens is out of range")
    ensure(len(r["stop"]) <= 4 and all(1 <= len(stop.encode()) <= 64 for stop in r["stop"]), "stop is out of range")
    ensure(not grammar or 1 <= len(grammar["text"].encode()) <= 16 * 1024, "the grammar is empty or too long")
    ensure(1 <= s["top_k"] <= 64 and 0 < f32(s["top_p"]) <= 1, "top_k or top_p is out of range")
    ranges = ("temperature", 0, 2), ("min_p", 0, 1), ("frequency_penalty", -2, 2), ("presence_penalty", -2, 2)
    for name, low, high in ranges:
        ensure(low <= f32(s[name]) <= high, f"{name} is out of range")
    bias = s.get("logit_bias") or {}
    ensure(len(bias) <= 300 and all(-100 <= f32(b) <= 100 for b in bias.values()), "logit_bias is out of range")
    ensure(MIN_REPLICAS <= e["k"] <= MAX_REPLICAS, f"k is {e['k']}")
    first, last = epoch_of(e["submitted_at_ms"]), epoch_of(e["decided_at_ms"])
    ensure(first <= e["epoch"] <= last, f"epoch is {e['epoch']}; submission and verdict allow {first} to {last}")


def fingerprints(data):
    """One list of (token, log-probability) per token; None where the bytes are no fingerprints."""
    prints, at = [], 0
    while at < len(data):
        count = data[at]
        end = at + 1 + 6 * count
        if not 1 <= count <= 8 or end > len(data):
            return None
        entries = [struct.unpack_from(">IHe", data[i : i + 6] + data[i + 4 : i + 6]) for i in range(at + 1, end, 6)]
        tokens = {token for token, _, _ in entries}
        # Finite, at most 0, and zero without a sign.
        if len(tokens) < count or any(bits != 0 and not 0x8001 <= bits <= 0xFBFF for _, bits, _ in entries):
            return None
        prints.append([(token, value) for token, _, value in entries])
        at = end
    return prints


def output_fits(request, output, end_tokens):
    tokens, finish, most = output["tokens"], output["finish"], request["max_tokens"]
    if not 1 <= len(tokens) <= most:
        return False
    end = next((i for i, token in enumerate(tokens) if token in end_tokens), None)
    if end is not None and end + 1 < len(tokens) or (finish == "eos") != (end is not None):
        return False
    if finish == "length" and len(tokens) != most or finish == "stop" and not request["stop"]:
        return False
    if finish == "grammar" and not request.get("grammar"):
        return False
    prints = fingerprints(raw(output["fingerprints"]))
    return prints is not None and len(prints) == len(tokens)


# Referees' reports.


def scores_of(data):
    """Margins by token; None where the bytes are no report."""
    margins, at = [], 0
    while at < len(data):
        end = at + 4 + (1 + 6 * data[at + 4] if len(data) > at + 4 else 0)
        if end <= at + 4 or end > len(data) or fingerprints(data[at + 4 : end]) is None:
            return None
        margins.append(struct.unpack_from(">I", data, at)[0])
        at = end
    return margins


def confirms(length, margins, bounds):
    if len(margins) != length or any(m >= bounds["margin_milli"] * 1000 for m in margins):
        return False
    clipped = sum(min(m, bounds["clip_milli"] * 1000) for m in margins)
    return -(-clipped // max(len(margins), 1)) <= bounds["mean_micro"]


def bounds_between(e, node_a, node_b):
    classes = {member["node"]: member["class"] for member in e["eligible"]}
    if node_a not in classes or node_b not in classes:
        return None
    wanted = sorted((classes[node_a], classes[node_b]))
    return next((p["bounds"] for p in e["terms"]["calibration"]["pairs"] if p["classes"] == wanted), None)


def is_planted(beta2, referee):
    return happens(keccak(b"infera.planting.v1" + beta2 + raw(referee)), b"defect", PLANTED_PPM)


def planted(beta2, referee, output, vocabulary):
    key = keccak(b"infera.defect.v1" + beta2 + raw(referee))
    tokens = list(output["tokens"])
    places = len(tokens) - (output["finish"] == "eos" and len(tokens) > 1)
    at = below(key, b"place", places)
    if at < len(tokens):
        tokens[at] = (tokens[at] + 1 + below(key, b"token", max(vocabulary - 1, 1))) % max(vocabulary, 1)
    return {**output, "tokens": tokens}


# The verdict.


class Verdict:
    def __init__(self, e):
        self.e, self.beta2 = e, beta(e["post_proof"])
        self.revealed = [s for s in e["slots"] if s["outcome"] == "revealed" and s["reveal"]]
        self.answers = {}
        for slot in self.revealed:
            output = slot["reveal"]["output"]
            self.answers.setdefault(answer_hash(output), (slot["node"], output))
        seen = {s["operator"] for s in e["slots"] if s["outcome"] not in ("busy", "refereed")}
        self.referee_order = draw_referees(self.beta2, e["eligible"], seen)
        self.votes = self.count_votes()

    def defect(self, referee):
        if not self.answers or not is_planted(self.beta2, referee):
            return None
        author, output = next(iter(self.answers.values()))
        return author, planted(self.beta2, referee, output, self.e["terms"]["vocab_size"])

    def count_votes(self):
        """By answer: how many referees confirm it, and how many deny it."""
        votes = {}
        for referee in (r for r in self.e["referees"] if r["outcome"] == "reported"):
            node = referee["node"]
            reports = {}
            for report in referee["reports"]:
                reports.setdefault(report["subject"], scores_of(raw(report["scores"])))

            def verdict(author, output):
                bounds, margins = bounds_between(self.e, node, author), reports.get(shown(answer_hash(output)))
                return None if bounds is None or margins is None else confirms(len(output["tokens"]), margins, bounds)

            defect = self.defect(node)
            # Who does not notice a planted defect has said nothing.
            if defect and verdict(*defect) is not False:
                continue
            for answer, (author, output) in self.answers.items():
                said = verdict(author, output)
                if said is not None:
                    good, bad = votes.get(answer, (0, 0))
                    votes[answer] = (good + said, bad + (not said))
        return votes

    def standing(self, answer):
        good, bad = self.votes.get(answer, (0, 0))
        if not good and not bad:
            return "unscored"
        if not bad or good >= 2 and good > bad:
            return "confirmed"
        return "refuted" if bad >= 2 and bad > good else "contested"

    def audited(self):
        ppm = {member["node"]: member["audit_ppm"] for member in self.e["eligible"]}
        rates = [ppm[s["node"]] for s in self.revealed if s["node"] in ppm]
        return happens(self.beta2, b"audit", max(rates, default=0))

    def similarity(self, a, b):
        wanted = [shown(min(a, b)), shown(max(a, b))]
        return next((s["millionths"] for s in self.e["similarities"] if s["answers"] == wanted), None)

    def alike(self, a, b):
        similarity = self.similarity(a, b)
        (author_a, output_a), (author_b, output_b) = self.answers[a], self.answers[b]
        bounds = bounds_between(self.e, author_a, author_b)
        if similarity is None or bounds is None:
            return False
        tied = nearly_tied(self.e["request"], bounds, output_a, output_b)
        return tied and similarity >= self.e["terms"]["similarity_threshold_millionths"]

    def members(self):
        """The verified set by node id, as if no further node could be drawn."""
        e, fit, nodes = self.e, {}, set()
        for slot in self.revealed:
            if slot["node"] not in nodes and slot["node"] not in e["unfit"]:
                fit.setdefault(answer_hash(slot["reveal"]["output"]), []).append(slot["node"])
            nodes.add(slot["node"])
        unequal = len(fit) > 1 or sum(map(len, fit.values())) < len(nodes)
        more = min(len(self.referee_order), MAX_REFEREES) > len(e["referees"])
        if (self.audited() or unequal) and more:
            due = any(self.standing(answer) in ("unscored", "contested") for answer in fit)
            ensure(not due, "a referee was due and there is no report")
        largest = self.largest(fit)
        ensure(len(largest) >= quorum(max(e["k"], len(nodes))), "the reveals have no quorum")
        return largest

    def largest(self, fit):
        candidates = [a for a in sorted(fit) if self.standing(a) != "refuted"][:MAX_REPLICAS]
        best = []
        for chosen in range(1, 1 << len(candidates)):
            answers = [a for i, a in enumerate(candidates) if chosen >> i & 1]
            agree = len(answers) == 1 or all(self.standing(a) == "confirmed" for a in answers) and all(
                self.alike(a, b) for i, a in enumerate(answers) for b in answers[i + 1 :]
            )
            nodes = sorted(node for a in answers for node in fit[a])
            if agree and (len(nodes) > len(best) or len(nodes) == len(best) and nodes < best):
                best = nodes
        return best


def mix(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & U64_MAX
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & U64_MAX
    return x ^ (x >> 31)


def gumbel(seed, position, token):
    gamma = 0x9E3779B97F4A7C15
    state = mix((seed + gamma) & U64_MAX)
    bits = mix((state + ((position << 32) | token) * gamma) & U64_MAX)
    return -ln(-ln(((bits >> 12) + 0.5) / 2.0**52))


def nearly_tied(request, bounds, a, b):
    """Whether two unequal outputs part where either token might have been drawn."""
    parting = next((i for i, (x, y) in enumerate(zip(a["tokens"], b["tokens"])) if x != y), None)
    if parting is None:
        return False
    prints = [fingerprints(raw(output["fingerprints"])) for output in (a, b)]
    if any(p is None or len(p) <= parting for p in prints):
        return False
    print_a, print_b = (dict(p[parting]) for p in prints)
    shared = print_a.keys() & print_b.keys()
    tolerance = bounds["fingerprint_milli"] / 1000.0
    if not shared or any(abs(f32(print_a[t] - print_b[t])) > tolerance for t in shared):
        return False
    s, prefix = request["sampling"], a["tokens"][:parting]
    temperature, bias = f32(s["temperature"]), s.get("logit_bias") or {}

    def score(token, logprob):
        z, times = logprob, float(prefix.count(token))
        if str(token) in bias:
            z = f32(z + f32(bias[str(token)]))
        if times:
            z = f32(f32(z - f32(times * f32(s["frequency_penalty"]))) - f32(s["presence_penalty"]))
        return z + temperature * gumbel(request["seed"], parting, token)

    def tied(entries, own, other):
        scores = {token: score(token, logprob) for token, logprob in entries.items()}
        rival = scores.get(other, min(scores.values()))
        return own in scores and scores[own] - rival < bounds["near_tie_milli"] / 1000.0

    token_a, token_b = a["tokens"][parting], b["tokens"][parting]
    return tied(print_a, token_a, token_b) and tied(print_b, token_b, token_a)


def build(e):
    """The receipt that follows from the evidence."""
    verdict = Verdict(e)
    members = verdict.members()
    slots = {s["node"]: s for s in reversed(verdict.revealed)}
    ordered = [slots[node] for node in delivery_order(verdict.beta2, members)]
    outputs = [s["reveal"]["output"] for s in ordered]
    verified = [
        {"node": s["node"], "operator": s["operator"], "output_hash": shown(salted_output(e["salt"], output))}
        for s, output in zip(ordered, outputs)
    ]
    tokens = len(e["request"]["prompt"]), len(outputs[0]["tokens"])
    each = e["price_micro"] * sum(tokens)
    charged = each * len(verified)
    ensure(charged <= U64_MAX, "the price overflows")
    answers = sorted({answer_hash(output) for output in outputs})
    alike = [verdict.similarity(a, b) for i, a in enumerate(answers) for b in answers[:i]]
    unpaid = [
        {"node": s["node"], "operator": s["operator"], "reason": s["outcome"].replace("revealed", "outlier")}
        for s in e["slots"] if s["node"] not in members
    ]  # fmt: skip
    return {
        "id": e["request"]["id"],
        "chain_id": e["domain"]["chain_id"],
        "contract": e["domain"]["contract"],
        "request_hash": shown(request_hash(e["domain"], e["request"])),
        "account_hash": shown(account_hash(e["salt"], e["account"])),
        "epoch": e["epoch"],
        "attempt": e["attempt"],
        "model_root": e["request"]["model_root"],
        "class": e["class"],
        "calibration_hash": shown(calibration_hash(e["terms"]["calibration"])),
        "prompt_hash": shown(prompt_hash(e["salt"], e["request"]["prompt"])),
        "output_hash": verified[0]["output_hash"],
        "asked_k": e["k"],
        "k": max(e["k"], len(verdict.revealed)),
        "verified": verified,
        "unpaid": unpaid,
        "referees": [r["node"] for r in e["referees"] if r["outcome"] == "reported"],
        "lowest_similarity_millionths": min((s for s in alike if s is not None), default=FULL),
        "prompt_tokens": tokens[0],
        "output_tokens": tokens[1],
        "price_micro": e["price_micro"],
        "charged_micro": charged,
        "payments": [{"operator": v["operator"], "amount_micro": each} for v in verified],
        "dispatcher": e["dispatcher"],
        "eligible_root": shown(eligible_root(e["eligible"])),
        "commitments_root": shown(commitments_root(e["slots"][: e["post_slots"]])),
        "evidence_root": shown(evidence_root(e)),
        "assign_proof": e["assign_proof"],
        "post_proof": e["post_proof"],
        "submitted_at_ms": e["submitted_at_ms"],
        "decided_at_ms": e["decided_at_ms"],
    }


def evidence_root(e):
    return keccak(EVIDENCE(e).encode())
