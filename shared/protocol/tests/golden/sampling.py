"""Writes sampling.json: the seeded draw once more, written from the protocol's text and not from the Rust code.

    python3 shared/protocol/tests/golden/sampling.py > shared/protocol/tests/golden/sampling.json

Noise and log-probabilities are compared bit by bit: the logarithm is that of FreeBSD's msun (e_log.c), which the Rust
`libm` follows; the exponential is Cephes' expf with every operation rounded to f32, the sum is taken in its lanes.
"""

import json
import math
import struct
from fractions import Fraction

M64 = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def mix(x):
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def noise_bits(seed, position, token):
    counter = (position << 32) | token
    state = mix((seed + GAMMA) & M64)
    return mix((state + counter * GAMMA) & M64)


def ln(x):
    """ln of a positive, normal x; every operation is one rounded IEEE double."""
    ln2_hi, ln2_lo = 6.93147180369123816490e-01, 1.90821492927058770002e-10
    lg = [6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01, 2.222219843214978396e-01,
          1.818357216161805012e-01, 1.531383769920937332e-01, 1.479819860511658591e-01]
    bits = struct.unpack("<Q", struct.pack("<d", x))[0]
    if bits == 0x3FF0000000000000:
        return 0.0
    high = (bits >> 32) + (0x3FF00000 - 0x3FE6A09E)
    k = (high >> 20) - 0x3FF
    high = (high & 0x000FFFFF) + 0x3FE6A09E
    f = struct.unpack("<d", struct.pack("<Q", (high << 32) | (bits & 0xFFFFFFFF)))[0] - 1.0
    hfsq = 0.5 * f * f
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    t1 = w * (lg[1] + w * (lg[3] + w * lg[5]))
    t2 = z * (lg[0] + w * (lg[2] + w * (lg[4] + w * lg[6])))
    return s * (hfsq + (t2 + t1)) + k * ln2_lo - hfsq + f + k * ln2_hi


def gumbel(seed, position, token):
    u = float(Fraction(2 * (noise_bits(seed, position, token) >> 12) + 1, 1 << 53))
    return -ln(-ln(u))


def f64(x):
    return "%016x" % struct.unpack("<Q", struct.pack("<d", x))[0]


def f32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def logits_of(n, salt):
    return [(noise_bits(salt, 0, i) >> 40) / 524288.0 - 16.0 for i in range(n)]


def bits32(x):
    return struct.unpack("<I", struct.pack("<f", x))[0]


LOG2_E, ROUND, LN2_HIGH, LN2_LOW = f32(math.log2(math.e)), 12582912.0, 0.693359375, f32(-2.1219444e-4)
POLYNOMIAL = [f32(c) for c in (1.9875692e-4, 1.3981999e-3, 8.333452e-3, 4.1665796e-2, 1.6666665e-1, 0.5)]


def exp(x):
    """e^x of an f32 x <= 0; every operation is rounded to f32."""
    x = max(x, -87.0)
    shifted = f32(f32(x * LOG2_E) + ROUND)
    n = f32(shifted - ROUND)
    r = f32(f32(x - f32(n * LN2_HIGH)) - f32(n * LN2_LOW))
    p = POLYNOMIAL[0]
    for c in POLYNOMIAL[1:]:
        p = f32(f32(p * r) + c)
    p = f32(f32(f32(p * f32(r * r)) + r) + 1.0)
    return f32(p * 2.0 ** int(n))


def log_sum_exp(logits):
    top, total = max(logits), 0.0
    for start in range(0, len(logits), 256):
        lanes = [0.0] * 16
        for i, z in enumerate(logits[start : start + 256]):
            lanes[i % 16] = f32(lanes[i % 16] + exp(f32(z - top)))
        for lane in lanes:
            total += lane
    return top + ln(total)


def draw(n, salt, seed, params, counts, length, bias=None, mask=None):
    raw = [f32(z) for z in logits_of(n, salt)]
    z = list(raw)
    for token, value in (bias or {}).items():
        z[token] = f32(z[token] + f32(value))
    for token, times in counts.items():
        if times:
            z[token] = f32(f32(z[token] - f32(times * params["frequency_penalty"])) - params["presence_penalty"])
    order = sorted(mask or range(n), key=lambda i: (-z[i], i))[: params["top_k"]]
    weights = [math.exp(z[i] - z[order[0]]) for i in order]
    keep = len(order)
    if params["top_p"] < 1:
        total, keep = 0.0, 0
        for w in weights:
            total += w
            keep += 1
            if total >= params["top_p"] * sum(weights):
                break
    if params["min_p"] > 0:
        keep = min(keep, sum(w >= params["min_p"] for w in weights))
    order = order[: max(keep, 1)]
    lse = log_sum_exp(raw)
    t = params["temperature"]
    tokens = [
        max(order, key=lambda i: (z[i] / t + gumbel(seed, p, i), -i)) if t > 0 else order[0] for p in range(length)
    ]
    if bias:
        params = {**params, "logit_bias": {str(k): v for k, v in bias.items()}}
    row = {
        "vocabulary": n, "salt": "%x" % salt, "seed": "%x" % seed, "params": params,
        "counts": {str(k): v for k, v in counts.items()}, "candidates": len(order),
        "logprobs": ["%08x" % bits32(min(f32(raw[i] - lse), 0.0)) for i in order[:8]], "tokens": tokens,
    }
    return {**row, "mask": mask} if mask else row


def main():
    points = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (42, 7, 49151), (M64, 0xFFFFFFFF, 0xFFFFFFFF), (2**63, 3, 17)]
    points += [(mix(i), mix(i + 1) & 0xFFFF, mix(i + 2) % 49152) for i in range(1, 26)]
    noise = [
        {"seed": "%x" % s, "position": p, "token": t, "bits": "%016x" % noise_bits(s, p, t), "gumbel": f64(gumbel(s, p, t))}
        for s, p, t in points
    ]

    def params(**changed):
        base = dict(temperature=1.0, top_p=1.0, top_k=64, min_p=0.0, frequency_penalty=0.0, presence_penalty=0.0)
        return {**base, **changed}

    draws = [
        draw(1000, 1, 42, params(), {}, 24),
        draw(1000, 1, 43, params(), {}, 24),
        draw(1000, 2, 42, params(temperature=0.0), {}, 4),
        draw(1000, 3, 7, params(temperature=2.0, top_k=20), {}, 24),
        draw(1000, 4, 7, params(temperature=1.5, top_p=0.5), {}, 24),
        draw(1000, 5, M64, params(temperature=0.5, min_p=0.25), {}, 24),
        draw(60, 6, 9, params(frequency_penalty=0.5, presence_penalty=0.25), {i: i % 4 for i in range(30)}, 24),
        draw(1, 7, 9, params(), {}, 2),
        draw(5000, 8, 11, params(temperature=0.8), {}, 24),
        draw(1000, 9, 12, params(), {}, 24, bias={3: 40.0, 7: -100.0, 500: 20.25, 999: 25.5}),
        draw(300, 10, 13, params(frequency_penalty=1.5), {i: 1 for i in range(0, 300, 7)}, 24,
             bias={i: (i % 11) - 5.0 for i in range(0, 300, 5)}, mask=[i for i in range(300) if i % 3 == 0]),
    ]
    print(json.dumps({"noise": noise, "draws": draws}, indent=1))


main()
