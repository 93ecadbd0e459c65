"""The encodings of docs/src/receipts.md: documents as canonical JSON, what is hashed and how, the leaf, the draws.

Values are as Python reads them from JSON: byte values are text (`0x` and hex), and `raw` makes bytes of them.
"""

import json
import re
import struct
from fractions import Fraction

from receipts_crypto import blake3_keyed, keccak, ln, vrf_output

EPOCH_MS, MIXED, ALWAYS_PPM = 10_000, "mixed", 1_000_000


class Wrong(Exception):
    """Something does not hold; says what."""


def ensure(holds, reason):
    if not holds:
        raise Wrong(reason)


# The canonical encoding. A form takes a value and gives its one text, or raises Wrong.


def number(low, high):
    def write(value):
        ensure(type(value) is int and low <= value <= high, f"{value!r} is no integer from {low} to {high}")
        return str(value)

    return write


u32, u64, i64 = number(0, 2**32 - 1), number(0, 2**64 - 1), number(-(2**63), 2**63 - 1)


def real(value):
    """A 32-bit float: the fewest digits that read back as the same float; the nearest of those."""
    ensure(type(value) in (int, float) and abs(value) < 2**128, f"{value!r} is no 32-bit float")
    value = f32(value)
    sign, bits = ("-" if struct.pack(">f", value)[0] >> 7 else ""), f32_bits(abs(value))
    if bits == 0:
        return sign + "0.0"
    digits, exponent = shortest(abs(value), bits)
    point = len(digits) + exponent
    if -5 <= point <= 0:
        text = "0." + "0" * -point + digits
    elif 0 < point <= 13:
        text = digits[:point].ljust(point, "0") + "." + (digits[point:] or "0")
    else:
        text = digits[0] + ("." + digits[1:] if digits[1:] else "") + f"e{point - 1:+d}"
    return sign + text


def shortest(value, bits):
    exact = Fraction(value)
    for count in range(1, 10):
        exponent = len(str(int(exact))) - count if exact >= 1 else -count
        while exact < Fraction(10) ** (exponent + count - 1):
            exponent -= 1
        below = int(exact / Fraction(10) ** exponent)
        fits = [n for n in (below, below + 1) if f32_bits(f32(float(n * Fraction(10) ** exponent))) == bits]
        if fits:
            best = min(fits, key=lambda n: (abs(n * Fraction(10) ** exponent - exact), n % 2))
            digits = str(best).rstrip("0")
            return digits, exponent + len(str(best)) - len(digits)
    raise Wrong(f"{value!r} is no 32-bit float")


def f32(value):
    try:
        return struct.unpack(">f", struct.pack(">f", value))[0]
    except OverflowError as error:
        raise Wrong(f"{value!r} is no 32-bit float") from error


def f32_bits(value):
    return struct.unpack(">I", struct.pack(">f", value))[0]


def text(value):
    ensure(type(value) is str, f"{value!r} is no text")
    return json.dumps(value, ensure_ascii=False)


def flag(value):
    ensure(type(value) is bool, f"{value!r} is neither true nor false")
    return "true" if value else "false"


def matching(pattern):
    pattern = re.compile(pattern)

    def write(value):
        ensure(type(value) is str and pattern.fullmatch(value), f"{value!r} does not match {pattern.pattern}")
        return f'"{value}"'

    return write


def fixed(length):
    return matching(f"0x[0-9a-f]{{{2 * length}}}")


def one_of(*names):
    return matching("|".join(names))


def array(form, length=None):
    def write(value):
        ensure(type(value) is list and length in (None, len(value)), f"{value!r} is no list of the right length")
        return "[" + ",".join(map(form, value)) + "]"

    return write


def null_or(form):
    return lambda value: "null" if value is None else form(value)


def struct_of(*fields):
    """Fields in this order, all of them and no others; one of three parts is left out where it is empty or null."""

    def write(value):
        ensure(type(value) is dict, f"{value!r} is no object")
        unknown = value.keys() - {field[0] for field in fields}
        ensure(not unknown, f"unknown field {min(unknown, default='')}")
        parts = []
        for name, form, *optional in fields:
            if optional and value.get(name) in (None, [], {}):
                continue
            ensure(name in value, f"missing field {name}")
            parts.append(f'"{name}":{form(value[name])}')
        return "{" + ",".join(parts) + "}"

    return write


def bias_map(value):
    ensure(type(value) is dict and all(re.fullmatch(r"0|[1-9]\d*", token) for token in value), "no map of token ids")
    ordered = sorted(map(int, value))
    return "{" + ",".join(f'"{u32(token)}":{real(value[str(token)])}' for token in ordered) + "}"


HASH, NODE, ADDRESS, SIGNATURE, PROOF = fixed(32), fixed(32), fixed(20), fixed(64), fixed(80)
BYTES = matching("0x([0-9a-f]{2})*")
UUID = matching("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
OUTCOMES = ("revealed", "no_commit", "no_reveal", "mismatch", "declined", "disconnected", "busy", "refereed")
REASONS = ("outlier",) + OUTCOMES[1:]
FINISHES = ("eos", "length", "stop", "grammar")
GRAMMARS = ("json_schema", "regex")

DOMAIN = struct_of(("chain_id", u64), ("contract", ADDRESS))
RECEIPT = struct_of(
    ("id", UUID), ("chain_id", u64), ("contract", ADDRESS), ("request_hash", HASH), ("account_hash", HASH),
    ("epoch", u64), ("attempt", u32), ("model_root", HASH), ("class", text), ("calibration_hash", HASH),
    ("prompt_hash", HASH), ("output_hash", HASH), ("asked_k", u32), ("k", u32),
    ("verified", array(struct_of(("node", NODE), ("operator", ADDRESS), ("output_hash", HASH)))),
    ("unpaid", array(struct_of(("node", NODE), ("operator", ADDRESS), ("reason", one_of(*REASONS))))),
    ("referees", array(NODE)), ("lowest_similarity_millionths", u32), ("prompt_tokens", u32), ("output_tokens", u32),
    ("price_micro", u64), ("charged_micro", u64),
    ("payments", array(struct_of(("operator", ADDRESS), ("amount_micro", u64)))),
    ("dispatcher", NODE), ("eligible_root", HASH), ("commitments_root", HASH), ("evidence_root", HASH),
    ("assign_proof", PROOF), ("post_proof", PROOF), ("submitted_at_ms", i64), ("decided_at_ms", i64),
)  # fmt: skip
SAMPLING = struct_of(
    ("temperature", real), ("top_p", real), ("top_k", u32), ("min_p", real), ("frequency_penalty", real),
    ("presence_penalty", real), ("logit_bias", bias_map, "optional"),
)  # fmt: skip
REQUEST = struct_of(
    ("id", UUID), ("model_root", HASH), ("prompt", array(u32)), ("sampling", SAMPLING), ("max_tokens", u32),
    ("stop", array(text)), ("seed", u64),
    ("grammar", struct_of(("kind", one_of(*GRAMMARS)), ("text", text)), "optional"),
)  # fmt: skip
BOUNDS = struct_of(
    ("near_tie_milli", u32), ("fingerprint_milli", u32), ("margin_milli", u32), ("clip_milli", u32),
    ("mean_micro", u32), ("drift_micro", u32), ("drift_limit_micro", u32),
)  # fmt: skip
CALIBRATION = struct_of(("pairs", array(struct_of(("classes", array(text, 2)), ("bounds", BOUNDS)))))
TERMS = struct_of(
    ("calibration", CALIBRATION), ("similarity_threshold_millionths", u32), ("vocab_size", u32),
    ("end_tokens", array(u32), "optional"),
)  # fmt: skip
ELIGIBLE = struct_of(
    ("node", NODE), ("operator", ADDRESS), ("class", text), ("weight", u32), ("audit_ppm", u32), ("trusted", flag)
)
OUTPUT = struct_of(("tokens", array(u32)), ("fingerprints", BYTES), ("finish", one_of(*FINISHES)))
SLOT = struct_of(
    ("node", NODE), ("operator", ADDRESS), ("outcome", one_of(*OUTCOMES)),
    ("commitment", null_or(struct_of(("digest", HASH), ("signature", SIGNATURE)))),
    ("reveal", null_or(struct_of(("output", OUTPUT), ("salt", HASH)))),
    ("decline", null_or(struct_of(("reason", text), ("signature", SIGNATURE)))),
)  # fmt: skip
REFEREE = struct_of(
    ("node", NODE), ("operator", ADDRESS), ("outcome", one_of("reported", "no_report", "declined", "disconnected")),
    ("reports", array(struct_of(("subject", HASH), ("scores", BYTES), ("signature", SIGNATURE)))),
)  # fmt: skip
EVIDENCE = struct_of(
    ("domain", DOMAIN), ("request", REQUEST), ("account", text), ("model", text), ("salt", HASH), ("k", u32),
    ("submitted_at_ms", i64), ("decided_at_ms", i64), ("attempt", u32), ("epoch", u64), ("class", text),
    ("price_micro", u64), ("terms", TERMS), ("eligible", array(ELIGIBLE)), ("dispatcher", NODE),
    ("assign_proof", PROOF), ("post_proof", PROOF), ("post_slots", u32), ("slots", array(SLOT)),
    ("referees", array(REFEREE)), ("unfit", array(NODE)),
    ("similarities", array(struct_of(("answers", array(HASH, 2)), ("millionths", u32)))),
)  # fmt: skip
ANCHOR = struct_of(("sequence", u64), ("receipts_root", HASH), ("proof", array(HASH)))
DOCUMENT = struct_of(
    ("receipt", RECEIPT), ("status", one_of("pending", "anchored")), ("anchor", null_or(ANCHOR)),
    ("evidence", null_or(EVIDENCE)),
)  # fmt: skip
MANIFEST = struct_of(
    ("network", text), ("domain", DOMAIN), ("rpc_url", text), ("dispatchers", array(NODE)), ("registry_hash", HASH)
)
MODEL = struct_of(
    ("id", text), ("weights_root", HASH), ("weights_bytes", u64), ("tokenizer_hash", HASH), ("template_hash", HASH),
    ("end_tokens", array(u32)), ("vocab_size", u32), ("context_length", u32),
    ("similarity_threshold_millionths", u32), ("price_micro", u64), ("created_secs", i64),
)  # fmt: skip
REGISTRY = struct_of(
    ("models", array(MODEL)), ("releases", array(HASH)), ("calibration", CALIBRATION),
    ("replaces", struct_of(("registry_hash", HASH), ("at_ms", i64)), "optional"),
)  # fmt: skip


def no_constant(name):
    raise Wrong(f"{name} is no number")


def read(form, data):
    """The value that these bytes are, and its canonical bytes."""
    try:
        value = json.loads(data.decode(), parse_constant=no_constant)
        return value, form(value).encode()
    except (ValueError, RecursionError) as error:
        raise Wrong(f"not JSON of this form: {error}") from error


# What is hashed: keccak-256 of parts in a row, of which the first is the domain string behind its length.


def raw(value):
    return bytes.fromhex(value[2:])


def shown(data):
    return "0x" + data.hex()


def be32(value):
    return struct.pack(">I", value)


def be64(value):
    return struct.pack(">Q", value)


def sized(data):
    return be32(len(data)) + data


def ids(tokens):
    return be32(len(tokens)) + b"".join(map(be32, tokens))


def digest(domain, *parts):
    return keccak(sized(domain.encode()) + b"".join(parts))


def network(domain):
    return be64(domain["chain_id"]) + raw(domain["contract"])


def uuid_bytes(value):
    return bytes.fromhex(value.replace("-", ""))


def request_hash(domain, request):
    s, grammar = request["sampling"], request.get("grammar")
    bias = s.get("logit_bias") or {}
    parts = [
        network(domain), uuid_bytes(request["id"]), raw(request["model_root"]), ids(request["prompt"]),
        be32(f32_bits(s["temperature"])), be32(f32_bits(s["top_p"])), be32(s["top_k"]), be32(f32_bits(s["min_p"])),
        be32(f32_bits(s["frequency_penalty"])), be32(f32_bits(s["presence_penalty"])), be32(request["max_tokens"]),
        be64(request["seed"]), be32(len(request["stop"])), *(sized(stop.encode()) for stop in request["stop"]),
    ]  # fmt: skip
    if not bias and grammar is None:
        return digest("infera.request.v1", *parts)
    parts.append(be32(len(bias)))
    parts += (be32(token) + be32(f32_bits(bias[str(token)])) for token in sorted(map(int, bias)))
    kind, body = (1 + GRAMMARS.index(grammar["kind"]), grammar["text"]) if grammar else (0, "")
    return digest("infera.request.v2", *parts, bytes([kind]), sized(body.encode()))


def finish_code(output):
    return bytes([1 + FINISHES.index(output["finish"])])


def tokens_root(output):
    return digest("infera.tokens.v1", ids(output["tokens"]))


def fingerprint_root(output):
    return keccak(b"infera.fingerprints.v1" + raw(output["fingerprints"]))


def answer_hash(output):
    return digest("infera.output.v1", ids(output["tokens"]), finish_code(output))


def commitment(place, output, salt):
    return digest(
        "infera.commitment.v1", place, tokens_root(output), fingerprint_root(output), finish_code(output), raw(salt)
    )


def report_digest(place, subject, scores):
    return digest("infera.report.v1", place, raw(subject), keccak(raw(scores)))


def account_hash(salt, account):
    return digest("infera.account.v1", raw(salt), sized(account.encode()))


def prompt_hash(salt, prompt):
    return digest("infera.prompt.v1", raw(salt), ids(prompt))


def salted_output(salt, output):
    return digest("infera.salted-output.v1", raw(salt), answer_hash(output))


def calibration_hash(calibration):
    return digest(
        "infera.calibration.v2",
        *(
            b"".join(sized(name.encode()) for name in pair["classes"])
            + b"".join(be32(pair["bounds"][name]) for name in (
                "near_tie_milli", "fingerprint_milli", "margin_milli", "clip_milli", "mean_micro", "drift_micro",
                "drift_limit_micro",
            ))
            for pair in calibration["pairs"]
        ),
    )  # fmt: skip


def eligible_leaf(e):
    parts = raw(e["node"]), raw(e["operator"]), sized(e["class"].encode()), be32(e["weight"]), be32(e["audit_ppm"])
    return keccak(digest("infera.eligible.v2", *parts, bytes([e["trusted"]])))


def eligible_root(eligible):
    return tree([eligible_leaf(e) for e in eligible])[0] if eligible else bytes(32)


def commitments_root(slots):
    return digest(
        "infera.commitments.v2",
        *(
            raw(s["node"])
            + bytes([1 + OUTCOMES.index(s["outcome"])])
            + (raw(s["commitment"]["digest"]) if s["commitment"] else bytes(32))
            for s in slots
        ),
    )


def assign_message(domain, request_id, hash, k, attempt, epoch, root):
    parts = network(domain), uuid_bytes(request_id), hash, be32(k), be32(attempt), be64(epoch), root
    return digest("infera.assign.v2", *parts)


def post_message(domain, hash, attempt, root):
    return digest("infera.post.v2", network(domain), hash, be32(attempt), root)


# Merkle trees: OpenZeppelin's standard.


def pair(a, b):
    return keccak(min(a, b) + max(a, b))


def tree(leaves):
    """2n - 1 nodes, the root first, the leaves at the end from the highest to the lowest."""
    nodes = [b""] * (len(leaves) - 1) + sorted(leaves, reverse=True)
    for i in reversed(range(len(leaves) - 1)):
        nodes[i] = pair(nodes[2 * i + 1], nodes[2 * i + 2])
    return nodes


def proof_of(leaves, leaf):
    nodes = tree(leaves)
    at, proof = len(leaves) - 1 + nodes[len(leaves) - 1 :].index(leaf), []
    while at:
        proof.append(nodes[at + 1 if at % 2 else at - 1])
        at = (at - 1) // 2
    return proof


def root_of(leaf, proof):
    for sibling in proof:
        leaf = pair(leaf, sibling)
    return leaf


# The leaf of a receipt: Solidity's abi.encode of the fields in their order.


def word(value):
    return max(value, 0).to_bytes(32, "big")


def left(data):
    return bytes(12) + data


def tail(data):
    return word(len(data)) + data + bytes(-len(data) % 32)


def rows(items):
    return word(len(items)) + b"".join(items)


def abi_encode(r):
    def who(v):
        return raw(v["node"]) + left(raw(v["operator"]))

    dynamic = {
        "class": tail(r["class"].encode()),
        "verified": rows([who(v) + raw(v["output_hash"]) for v in r["verified"]]),
        "unpaid": rows([who(u) + word(1 + REASONS.index(u["reason"])) for u in r["unpaid"]]),
        "referees": rows([raw(node) for node in r["referees"]]),
        "payments": rows([left(raw(p["operator"])) + word(p["amount_micro"]) for p in r["payments"]]),
        "assign_proof": tail(raw(r["assign_proof"])),
        "post_proof": tail(raw(r["post_proof"])),
    }
    # The canonical order is that of the document, which was compared.
    head, tails, offset = b"", b"", 32 * len(r)
    for name, value in r.items():
        if name in dynamic:
            head += word(offset + len(tails))
            tails += dynamic[name]
        elif name == "id":
            head += uuid_bytes(value) + bytes(16)
        elif name == "contract":
            head += left(raw(value))
        else:
            head += word(value) if isinstance(value, int) else raw(value)
    return head + tails


def leaf(receipt):
    return keccak(keccak(abi_encode(receipt)))


# The draws.


def beta(proof):
    return keccak(b"infera.beta.v2" + vrf_output(raw(proof)))


def expand(key, what):
    return int.from_bytes(blake3_keyed(key, what), "big")


def below(key, what, limit):
    return expand(key, what) % limit if limit else 0


def happens(key, what, ppm):
    return expand(key, what) % ALWAYS_PPM < ppm


def uniform(key, what):
    return ((expand(key, what) >> 11) + 0.5) / 2.0**53


def first_of_operators(ordered):
    """The first node of each operator."""
    operators = set()
    return [e for e in ordered if not (e["operator"] in operators or operators.add(e["operator"]))]


def draw(key, members):
    def score(e):
        return -ln(uniform(key, raw(e["node"]))) / float(e["weight"]), e["node"]

    return first_of_operators(sorted((e for e in members if e["weight"]), key=score))


def draw_referees(beta2, eligible, barred):
    key = keccak(b"infera.referees.v1" + beta2)

    def order(e):
        return not e["trusted"], expand(key, raw(e["node"])), e["node"]

    members = (e for e in eligible if e["weight"] and e["operator"] not in barred)
    return first_of_operators(sorted(members, key=order))


def delivery_order(beta2, nodes):
    return sorted(nodes, key=lambda node: (expand(beta2, raw(node)), node))
