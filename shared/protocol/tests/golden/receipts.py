"""Checks receipts without any of Infera's code: a second implementation of docs/src/receipts.md.

    python3 receipts.py VECTORS                  recomputes every vector; exit status 1 at the first that differs
    python3 receipts.py check DOCUMENT --manifest network.json --registry models.json [--rpc URL]

The second form prints a line for each check. Exit status 0: all hold; 1: one failed; 2: it could not be checked; 3: nothing
is wrong, but not everything could be checked. Without --rpc the batch's root is printed, for you to compare with the chain's.
Only Python's standard library, 3.8 or newer.
"""

import argparse
import json
import pathlib
import sys
import urllib.request

import receipts_crypto as crypto
import receipts_format as form
import receipts_verdict as rules
from receipts_format import Wrong, ensure, raw, shown

MAX_DOCUMENT_BYTES, MAX_VERSIONS = 16 * 1024 * 1024, 4096


class History:
    """The registry in force and the versions before it, newest first."""

    def __init__(self, current, find):
        self.hash = shown(crypto.keccak(form.REGISTRY(current).encode()))
        self.versions = [current]
        while replaced := self.versions[-1].get("replaces"):
            data = find(replaced["registry_hash"])
            if data is None:
                break
            ensure(len(self.versions) <= MAX_VERSIONS, "the registry has too many former versions")
            ensure(shown(crypto.keccak(data)) == replaced["registry_hash"], "a former registry is not the one that is named")
            former, _ = form.read(form.REGISTRY, data)
            before = former.get("replaces")
            ensure(not before or before["at_ms"] < replaced["at_ms"], "a former registry is younger than its successor")
            self.versions.append(former)

    def in_force(self, first_ms, last_ms):
        until, found = float("inf"), []
        for version in self.versions:
            since = (version.get("replaces") or {"at_ms": float("-inf")})["at_ms"]
            if since <= last_ms and first_ms < until:
                found.append(version)
            until = since
        return found

    def unknown_before(self, at_ms):
        former = self.versions[-1].get("replaces")
        return former["registry_hash"] if former and at_ms < former["at_ms"] else None


class Report(list):
    """(name, outcome, reason) of each check, in order."""

    def run(self, name, check, *arguments):
        try:
            check(*arguments)
            self.append((name, "passed", ""))
        except Wrong as error:
            self.append((name, "failed", str(error)))

    def skip(self, name, reason):
        self.append((name, "not_checked", reason))

    def status(self):
        outcomes = {outcome for _, outcome, _ in self}
        return 1 if "failed" in outcomes else 3 if "not_checked" in outcomes else 0


def check(data, manifest, history):
    """Every check that needs no chain; the document, where it could be read."""
    report = Report()
    same = history.hash == manifest["registry_hash"]
    report.run("registry", ensure, same, f"the registry's hash is {history.hash}")
    try:
        ensure(len(data) <= MAX_DOCUMENT_BYTES, "the document is too long")
        document, canonical = form.read(form.DOCUMENT, data)
        ensure(canonical == data, "not the canonical encoding")
    except Wrong as error:
        report.append(("encoding", "failed", str(error)))
        return report, None
    report.append(("encoding", "passed", ""))
    receipt, evidence = document["receipt"], document["evidence"]
    check_receipt(report, receipt, manifest)
    check_registry(report, receipt, history)
    check_anchor(report, document)
    if evidence is None:
        report.skip("evidence", "the document has none: fetch it with the API key of the account that asked")
    else:
        check_evidence(report, receipt, evidence, history)
    return report, document


def holds(key, message, proof):
    result = crypto.proves(raw(key), message, raw(proof))
    ensure(result is not None, "the key is no element of ristretto255")
    ensure(result, "the proof does not hold for this key and input")


def check_receipt(report, r, manifest):
    domain = {"chain_id": r["chain_id"], "contract": r["contract"]}
    report.run("network", ensure, domain == manifest["domain"], "made for another chain or contract")
    known = r["dispatcher"] in manifest["dispatchers"]
    report.run("dispatcher", ensure, known, f"{r['dispatcher']} is not a dispatcher of this network")
    hash = raw(r["request_hash"])
    assign = form.assign_message(
        domain, r["id"], hash, r["asked_k"], r["attempt"], r["epoch"], raw(r["eligible_root"])
    )
    report.run("assignment proof", holds, r["dispatcher"], assign, r["assign_proof"])
    post = form.post_message(domain, hash, r["attempt"], raw(r["commitments_root"]))
    report.run("post-draw proof", holds, r["dispatcher"], post, r["post_proof"])
    first, last = rules.epoch_of(r["submitted_at_ms"]), rules.epoch_of(r["decided_at_ms"])
    report.run("epoch", ensure, first <= r["epoch"] <= last, f"submission and verdict allow {first} to {last}")
    report.run("quorum", check_quorum, r)
    paid = sum(p["amount_micro"] for p in r["payments"])
    report.run("payments", ensure, paid == r["charged_micro"], f"payments sum to {paid}")


def check_quorum(r):
    verified, unpaid = r["verified"], r["unpaid"]
    ensure(rules.MIN_REPLICAS <= r["asked_k"] <= rules.MAX_REPLICAS, f"{r['asked_k']} replicas were asked for")
    revealed = len(verified) + sum(u["reason"] == "outlier" for u in unpaid)
    ensure(r["k"] == max(r["asked_k"], revealed) <= rules.MAX_REPLICAS, f"k is {r['k']}, {revealed} revealed")
    ensure(len(verified) >= rules.quorum(r["k"]), f"{len(verified)} of {r['k']} agree")
    for who in ("node", "operator"):
        named = [v[who] for v in verified + unpaid]
        ensure(len(named) == len(set(named)), f"a {who} stands in it twice")
    paid, earned = [p["operator"] for p in r["payments"]], [v["operator"] for v in verified]
    ensure(paid == earned, "the payments do not go to the verified operators in their order")
    each = r["price_micro"] * (r["prompt_tokens"] + r["output_tokens"])
    ensure(all(p["amount_micro"] == each for p in r["payments"]), f"a payment is not {each}")


def by_history(report, name, holds, missing, reason):
    if not holds and missing:
        report.skip(name, f"the registry {missing}, in force when it was submitted, is not there")
    else:
        report.run(name, ensure, holds, reason)


def check_registry(report, r, history):
    versions = history.in_force(r["submitted_at_ms"], r["decided_at_ms"])
    missing = history.unknown_before(r["submitted_at_ms"])
    models = [model_of(version, r["model_root"]) for version in versions]
    priced = any(model and model["price_micro"] == r["price_micro"] for model in models)
    by_history(report, "model", priced, missing, "no registry in force has this model at this price")
    hashes = [shown(form.calibration_hash(version["calibration"])) for version in versions]
    by_history(report, "calibration", r["calibration_hash"] in hashes, missing, "not that of a registry in force")


def model_of(registry, root):
    return next((model for model in registry["models"] if model["weights_root"] == root), None)


def check_anchor(report, document):
    anchor = document["anchor"]
    if document["status"] == "anchored" and anchor:
        root = form.root_of(form.leaf(document["receipt"]), map(raw, anchor["proof"]))
        same = shown(root) == anchor["receipts_root"]
        report.run("merkle proof", ensure, same, f"leads to {shown(root)}")
    elif document["status"] == "pending" and not anchor:
        report.skip("merkle proof", "the receipt waits for its batch; fetch it again in a moment")
    else:
        report.run("merkle proof", ensure, False, "status and anchor contradict each other")


def check_evidence(report, r, e, history):
    versions = history.in_force(e["submitted_at_ms"], e["decided_at_ms"])
    terms = [terms_of(version, e["request"]["model_root"]) for version in versions]
    mine = {"end_tokens": [], **e["terms"]}
    missing = history.unknown_before(e["submitted_at_ms"])
    by_history(report, "terms", mine in terms, missing, "not those of a registry in force")
    root = shown(rules.evidence_root(e))
    report.run("evidence root", ensure, root == r["evidence_root"], f"the evidence hashes to {root}")
    report.run("request", rules.check_request, e)
    report.run("draw", check_draw, e)
    report.run("commitments and reveals", check_slots, e)
    report.run("post draw", check_post, e)
    report.run("referees", check_referees, e)
    report.run("agreement", check_agreement, r, e)
    if len({v["output_hash"] for v in r["verified"]}) > 1:
        report.skip("similarity", "how alike the texts are takes the tokenizer and the embedding model")
    if e["unfit"]:
        report.skip("fitness", "whether a result breaks the grammar or goes on after a stop string takes the tokenizer")
    report.run("every field", check_fields, r, e)


def terms_of(registry, root):
    model = model_of(registry, root)
    names = "similarity_threshold_millionths", "vocab_size", "end_tokens"
    return model and {"calibration": registry["calibration"], **{name: model[name] for name in names}}


def check_draw(e):
    nodes = [member["node"] for member in e["eligible"]]
    ensure(all(a < b for a, b in zip(nodes, nodes[1:])), "the eligible set is not in canonical order")
    members = lambda name: [m for m in e["eligible"] if name in (form.MIXED, m["class"])]
    enough = lambda name: len({m["operator"] for m in members(name)}) >= e["k"]
    if e["class"] == form.MIXED:
        ensure(not any(enough(m["class"]) for m in e["eligible"]), "a class has enough operators")
    else:
        ensure(enough(e["class"]), "the class has too few operators")
    hash, root = form.request_hash(e["domain"], e["request"]), form.eligible_root(e["eligible"])
    assign = form.assign_message(e["domain"], e["request"]["id"], hash, e["k"], e["attempt"], e["epoch"], root)
    holds(e["dispatcher"], assign, e["assign_proof"])
    drawn = form.draw(form.beta(e["assign_proof"]), members(e["class"]))
    first_of("slot", e["slots"], drawn)


def first_of(what, actual, drawn):
    named, expected = ([(x["node"], x["operator"]) for x in some] for some in (actual, drawn))
    ensure(named == expected[: len(named)], f"the {what}s are not the first of the draw")


def place_of(e, node):
    hash = form.request_hash(e["domain"], e["request"])
    return form.network(e["domain"]) + hash + form.be32(e["attempt"]) + raw(node)


def check_slots(e):
    for slot in e["slots"]:
        commitment, reveal, decline, outcome = (slot[n] for n in ("commitment", "reveal", "decline", "outcome"))
        place = place_of(e, slot["node"])
        signed = lambda digest, by: crypto.signed(raw(slot["node"]), digest, raw(by["signature"]))
        if commitment:
            ensure(signed(raw(commitment["digest"]), commitment), "a commitment is not signed by its node")
        if decline:
            digest = form.digest("infera.decline.v1", place, form.sized(decline["reason"].encode()))
            ensure(signed(digest, decline), "a decline is not signed by its node")
        opened = commitment and reveal
        opened = opened and shown(form.commitment(place, reveal["output"], reveal["salt"])) == commitment["digest"]
        ends = e["terms"].get("end_tokens") or []
        counts = bool(opened) and rules.output_fits(e["request"], reveal["output"], ends)
        untouched = not commitment and not reveal
        refereed = any(r["operator"] == slot["operator"] for r in e["referees"])
        fits = {
            "revealed": counts,
            "mismatch": bool(commitment and reveal) and not counts,
            "no_reveal": bool(commitment) and not reveal,
            "refereed": untouched and refereed,
        }.get(outcome, untouched)
        ensure(fits and (outcome == "declined") == bool(decline), f"{outcome} does not fit what {slot['node']} signed")


def check_post(e):
    ensure(e["post_slots"] <= len(e["slots"]), "the post draw covers more slots than there are")
    root = form.commitments_root(e["slots"][: e["post_slots"]])
    hash = form.request_hash(e["domain"], e["request"])
    holds(e["dispatcher"], form.post_message(e["domain"], hash, e["attempt"], root), e["post_proof"])


def check_referees(e):
    first_of("referee", e["referees"], rules.Verdict(e).referee_order)
    for referee in e["referees"]:
        reports = referee["reports"]
        ensure((referee["outcome"] == "reported") == bool(reports), "reports and outcome do not fit together")
        ensure(len({r["subject"] for r in reports}) == len(reports), "two reports about one answer")
        for report in reports:
            digest = form.report_digest(place_of(e, referee["node"]), report["subject"], report["scores"])
            by_node = crypto.signed(raw(referee["node"]), digest, raw(report["signature"]))
            ensure(by_node, "a report is not signed by its node")


def check_agreement(r, e):
    named = sorted(v["node"] for v in r["verified"])
    ensure(named == rules.Verdict(e).members(), "another verified set follows from the reveals")


def check_fields(r, e):
    rebuilt = rules.build(e)
    wrong = [name for name in rebuilt if rebuilt[name] != r[name]]
    ensure(not wrong, f"from the evidence follows another {', '.join(wrong)}")


def check_chain(document, manifest, url):
    """The root that the contract has for the batch is the one that the proof leads to."""
    anchor, domain = document["anchor"], manifest["domain"]
    chain = int(call(url, "eth_chainId", []), 16)
    ensure(chain == domain["chain_id"], f"{url} is chain {chain}")
    data = crypto.keccak(b"batches(uint64)")[:4] + form.word(anchor["sequence"])
    root = call(url, "eth_call", [{"to": domain["contract"], "data": shown(data)}, "latest"])
    ensure(root == anchor["receipts_root"], f"batch {anchor['sequence']} has the root {root} on the chain")


def call(url, method, params):
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        answer = json.load(response)
    if "result" not in answer:
        raise OSError(f"{method}: {answer.get('error')}")
    return answer["result"]


def check_file(arguments):
    parser = argparse.ArgumentParser(prog="receipts.py check")
    parser.add_argument("document", type=pathlib.Path)
    parser.add_argument("--manifest", type=pathlib.Path, required=True)
    parser.add_argument("--registry", type=pathlib.Path, required=True)
    parser.add_argument("--rpc")
    args = parser.parse_args(arguments)

    def find(hash):
        path = args.registry.parent / "registries" / f"{hash}.json"
        return path.read_bytes() if path.is_file() else None

    try:
        data = args.document.read_bytes()
        manifest, _ = form.read(form.MANIFEST, args.manifest.read_bytes())
        current, _ = form.read(form.REGISTRY, args.registry.read_bytes())
    except (OSError, Wrong) as error:
        print(f"receipts.py: {error}", file=sys.stderr)
        return 2
    try:
        report, document = check(data, manifest, History(current, find))
    except Wrong as error:
        report, document = Report([("registry", "failed", str(error))]), None
    anchor = document and document["anchor"]
    try:
        if anchor and args.rpc:
            report.run("chain", check_chain, document, manifest, args.rpc)
    except (OSError, ValueError) as error:
        print(f"receipts.py: the chain could not be asked: {error}", file=sys.stderr)
        return 1 if report.status() == 1 else 2
    for name, outcome, reason in report:
        mark = {"passed": "ok     ", "failed": "FAILED ", "not_checked": "skipped"}[outcome]
        print(f"  {mark}  {name}" + (f": {reason}" if reason else ""))
    if anchor and not args.rpc:
        print(f"  open     chain: batch {anchor['sequence']} must have the root {anchor['receipts_root']}")
    return report.status()


def main(arguments):
    if arguments[:1] == ["check"]:
        return check_file(arguments[1:])
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    import receipts_vectors

    return receipts_vectors.run(json.loads(pathlib.Path(arguments[0]).read_bytes()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
