"""Recomputes receipts.json: `python3 receipts.py receipts.json`. The first vector that differs ends it."""

import struct

import receipts_crypto as crypto
import receipts_format as form
import receipts_verdict as rules
from receipts import History, check
from receipts_format import raw, shown


class Differs(Exception):
    pass


def same(what, actual, expected):
    if actual != expected:
        raise Differs(f"{what}\n  computed {actual!r}\n  expected {expected!r}")


def primitives(v):
    for case in v["keccak"]:
        same(f"keccak of {case['input']!r}", shown(crypto.keccak(case["input"].encode())), case["output"])
    for case in v["blake3_keyed"]:
        hash = crypto.blake3_keyed(raw(case["key"]), case["input"].encode())
        same(f"keyed BLAKE3 of {case['input']!r}", shown(hash), case["output"])
    for case in v["numbers"]:
        (value,) = struct.unpack(">f", bytes.fromhex(case["bits"]))
        same(f"number {case['bits']}", form.real(value), case["text"])
        same(f"number {case['text']}", f"{form.f32_bits(float(case['text'])):08x}", case["bits"])
    for case in v["signatures"]:
        holds = crypto.signed(*(raw(case[name]) for name in ("key", "digest", "signature")))
        same(f"signature: {case['why']}", holds, case["holds"])


def receipt_values(receipt):
    return {"abi_encode": shown(form.abi_encode(receipt)), "leaf": shown(form.leaf(receipt))}


def result_values(e, slot):
    output, salt = slot["reveal"]["output"], slot["reveal"]["salt"]
    place = place_of(e, slot["node"])
    return {
        "tokens_root": shown(form.tokens_root(output)),
        "fingerprint_root": shown(form.fingerprint_root(output)),
        "output_hash": shown(form.answer_hash(output)),
        "salted_output_hash": shown(form.salted_output(e["salt"], output)),
        "commitment": shown(form.commitment(place, output, salt)),
    }


def place_of(e, node):
    hash = form.request_hash(e["domain"], e["request"])
    return form.network(e["domain"]) + hash + form.be32(e["attempt"]) + raw(node)


def evidence_values(e):
    verdict, domain = rules.Verdict(e), e["domain"]
    hash, eligible = form.request_hash(domain, e["request"]), form.eligible_root(e["eligible"])
    committed = form.commitments_root(e["slots"][: e["post_slots"]])
    beta, members = form.beta(e["assign_proof"]), [m for m in e["eligible"] if e["class"] in (form.MIXED, m["class"])]
    assign = form.assign_message(domain, e["request"]["id"], hash, e["k"], e["attempt"], e["epoch"], eligible)
    declined = [(slot["node"], slot["decline"]) for slot in e["slots"] if slot["decline"]]
    decline = lambda node, d: form.digest("infera.decline.v1", place_of(e, node), form.sized(d["reason"].encode()))
    reports = [(referee["node"], report) for referee in e["referees"] for report in referee["reports"]]
    report = lambda node, r: form.report_digest(place_of(e, node), r["subject"], r["scores"])
    defects = [verdict.defect(referee["node"]) for referee in e["referees"]]
    return {
        "request_hash": shown(hash),
        "account_hash": shown(form.account_hash(e["salt"], e["account"])),
        "prompt_hash": shown(form.prompt_hash(e["salt"], e["request"]["prompt"])),
        "calibration_hash": shown(form.calibration_hash(e["terms"]["calibration"])),
        "eligible_root": shown(eligible),
        "assign_message": shown(assign),
        "beta": shown(beta),
        "draw": [m["node"] for m in form.draw(beta, members)],
        "results": [result_values(e, slot) for slot in e["slots"] if slot["reveal"]],
        "declines": [shown(decline(node, d)) for node, d in declined],
        "commitments_root": shown(committed),
        "post_message": shown(form.post_message(domain, hash, e["attempt"], committed)),
        "beta2": shown(verdict.beta2),
        "delivery_order": form.delivery_order(verdict.beta2, verdict.members()),
        "referee_order": [m["node"] for m in verdict.referee_order],
        "reports": [shown(report(node, r)) for node, r in reports],
        "defects": [defect and shown(form.answer_hash(defect[1])) for defect in defects],
        "evidence_root": shown(rules.evidence_root(e)),
    }


def documents(v, history):
    for case in v["documents"]:
        data, name = case["document"].encode(), case["name"]
        report, document = check(data, v["manifest"], history)
        same(f"{name}: checks", [[check, outcome] for check, outcome, _ in report], case["checks"])
        same(f"{name}: status", report.status(), case["status"])
        computed = {}
        if case["receipt"]:
            computed["receipt"] = receipt_values(document["receipt"])
        if case["evidence"]:
            computed["evidence"] = evidence_values(document["evidence"])
        for part, values in computed.items():
            same(f"{name}: names of {part}", sorted(values), sorted(case[part]))
            for field in values:
                same(f"{name}: {field}", values[field], case[part][field])


def batch(v):
    leaves = [raw(leaf) for leaf in v["batch"]["leaves"]]
    same("batch: root", shown(form.tree(leaves)[0]), v["batch"]["root"])
    for leaf, proof in zip(leaves, v["batch"]["proofs"]):
        same("batch: proof", [shown(hash) for hash in form.proof_of(leaves, leaf)], proof)
        same("batch: root of a proof", shown(form.root_of(leaf, map(raw, proof))), v["batch"]["root"])


def edits(v, history):
    texts = {case["name"]: case["document"] for case in v["documents"]}
    for edit in v["edits"]:
        text = texts[edit["of"]]
        same(f"{edit['find']} stands in it", edit["find"] in text, True)
        report, _ = check(text.replace(edit["find"], edit["put"], 1).encode(), v["manifest"], history)
        failed = [name for name, outcome, _ in report if outcome == "failed"]
        same(f"{edit['of']} with {edit['put']}", failed, edit["failed"])


def run(v):
    former = {shown(crypto.keccak(text.encode())): text.encode() for text in v["former"]}
    history = History(v["registry"], former.get)
    try:
        primitives(v)
        documents(v, history)
        batch(v)
        edits(v, history)
    except Differs as difference:
        print(f"differs: {difference}")
        return 1
    print(f"all as expected: {len(v['documents'])} documents, {len(v['edits'])} edits")
    return 0
