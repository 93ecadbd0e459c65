"""What receipts.py computes with, from the standards and with Python's standard library alone: keccak-256, BLAKE3 (keyed,
one block), Ed25519 (strict), ristretto255, the verifiable random function, and the logarithm of the draw.

Only for checking: it is slow, and its time depends on what it works on. docs/src/receipts.md names the standards.
"""

import functools
import hashlib
import struct

# keccak-256: FIPS 202's permutation at rate 136 with Ethereum's padding, which begins with 0x01.

M64 = (1 << 64) - 1


def _round_constants():
    bits, constants = 1, []
    for _ in range(24):
        constant = 0
        for j in range(7):
            bits = ((bits << 1) ^ ((bits >> 7) * 0x71)) & 0xFF
            if bits & 2:
                constant |= 1 << ((1 << j) - 1)
        constants.append(constant)
    return constants


def _lanes():
    """Where rho and pi move each lane, and by how many bits they turn it."""
    moves, x, y = [], 1, 0
    for t in range(24):
        source = x + 5 * y
        x, y = y, (2 * x + 3 * y) % 5
        moves.append((source, x + 5 * y, (t + 1) * (t + 2) // 2 % 64))
    return moves


ROUNDS, MOVES = _round_constants(), _lanes()


def _permute(a):
    for constant in ROUNDS:
        c = [a[x] ^ a[x + 5] ^ a[x + 10] ^ a[x + 15] ^ a[x + 20] for x in range(5)]
        d = [c[x - 1] ^ (c[(x + 1) % 5] << 1 & M64 | c[(x + 1) % 5] >> 63) for x in range(5)]
        a = [lane ^ d[i % 5] for i, lane in enumerate(a)]
        b = a[:]
        for source, target, turn in MOVES:
            b[target] = (a[source] << turn | a[source] >> (64 - turn)) & M64
        a = [b[i] ^ (~b[i - i % 5 + (i + 1) % 5] & b[i - i % 5 + (i + 2) % 5]) for i in range(25)]
        a[0] ^= constant
    return a


@functools.lru_cache(4096)
def keccak(data):
    rate = 136
    data = bytearray(data) + b"\x01"
    data += bytes(-len(data) % rate)
    data[-1] |= 0x80
    state = [0] * 25
    for start in range(0, len(data), rate):
        for i, lane in enumerate(struct.unpack_from("<17Q", data, start)):
            state[i] ^= lane
        state = _permute(state)
    return struct.pack("<4Q", *state[:4])


# BLAKE3 with a key, for inputs of at most one block of 64 bytes: all that the draws need.

IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
WORDS = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
MIXES = (
    (0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
    (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14),
)  # fmt: skip
CHUNK_START, CHUNK_END, ROOT, KEYED_HASH = 1, 2, 8, 16


def turn(x, n):
    return (x >> n | x << (32 - n)) & 0xFFFFFFFF


def blake3_keyed(key, data):
    """The first 8 bytes of the keyed hash."""
    assert len(data) <= 64
    words = list(struct.unpack("<16I", data.ljust(64, b"\0")))
    v = [*struct.unpack("<8I", key), *IV[:4], 0, 0, len(data), CHUNK_START | CHUNK_END | ROOT | KEYED_HASH]
    for _ in range(7):
        for i, (a, b, c, d) in enumerate(MIXES):
            for word, right_d, right_b in ((words[2 * i], 16, 12), (words[2 * i + 1], 8, 7)):
                v[a] = (v[a] + v[b] + word) & 0xFFFFFFFF
                v[d] = turn(v[d] ^ v[a], right_d)
                v[c] = (v[c] + v[d]) & 0xFFFFFFFF
                v[b] = turn(v[b] ^ v[c], right_b)
        words = [words[i] for i in WORDS]
    return struct.pack("<2I", v[0] ^ v[8], v[1] ^ v[9])


# The curve of Ed25519 and ristretto255, in extended coordinates (RFC 8032, section 5.1.4).

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
SQRT_M1 = pow(2, (P - 1) // 4, P)
IDENTITY = (0, 1, 1, 0)


def add(a, b):
    w, x = (a[1] - a[0]) * (b[1] - b[0]) % P, (a[1] + a[0]) * (b[1] + b[0]) % P
    y, z = 2 * a[3] * b[3] * D % P, 2 * a[2] * b[2] % P
    e, f, g, h = x - w, z - y, z + y, x + w
    return (e * f % P, g * h % P, f * g % P, e * h % P)


def times(n, point):
    result = IDENTITY
    while n:
        if n & 1:
            result = add(result, point)
        point, n = add(point, point), n >> 1
    return result


def minus(point):
    return (-point[0] % P, point[1], point[2], -point[3] % P)


def sqrt_ratio(u, v):
    """RFC 9496, section 4.2: whether u/v is a square, and the root of it, or of SQRT_M1 u/v, that is even."""
    r = u * pow(v, 3, P) * pow(u * pow(v, 7, P), (P - 5) // 8, P) % P
    check = v * r * r % P
    if check in (-u % P, -u * SQRT_M1 % P):
        r = r * SQRT_M1 % P
    return check in (u % P, -u % P), even(r)


def even(x):
    return -x % P if x & 1 else x


def point_of(data):
    """RFC 8032, section 5.1.3, but a y of P or more counts modulo P, and x = 0 has either sign."""
    number = int.from_bytes(data, "little")
    y, sign = (number & (1 << 255) - 1) % P, number >> 255
    is_square, x = sqrt_ratio((y * y - 1) % P, (D * y * y + 1) % P)
    if not is_square:
        return None
    x = -x % P if sign else x
    return (x, y, 1, x * y % P)


def bytes_of(point):
    inverse = pow(point[2], -1, P)
    x, y = point[0] * inverse % P, point[1] * inverse % P
    return (y | (x & 1) << 255).to_bytes(32, "little")


def is_small(point):
    x, y, z, _ = times(8, point)
    return x == 0 and y == z


BASE = point_of((4 * pow(5, -1, P) % P).to_bytes(32, "little"))


@functools.lru_cache(4096)
def signed(key, message, signature):
    """Ed25519, strictly: S below the order, neither key nor R of small order, R compared as bytes."""
    a, r, s = point_of(key), point_of(signature[:32]), int.from_bytes(signature[32:], "little")
    if a is None or r is None or s >= L or is_small(a) or is_small(r):
        return False
    k = int.from_bytes(hashlib.sha512(signature[:32] + key + message).digest(), "little") % L
    return bytes_of(add(times(s, BASE), times(k, minus(a)))) == signature[:32]


# ristretto255: RFC 9496, section 4.3.

A_MINUS_D_ROOT = sqrt_ratio(1, (-1 - D) % P)[1]
AD_MINUS_ONE_ROOT = 25063068953384623474111414158702152701244531502492656460079210482610430750235
ONE_MINUS_D_SQ, D_MINUS_ONE_SQ = (1 - D * D) % P, (D - 1) ** 2 % P


def element_of(data):
    s = int.from_bytes(data, "little")
    if s >= P or s & 1:
        return None
    u1, u2 = (1 - s * s) % P, (1 + s * s) % P
    v = (-D * u1 * u1 - u2 * u2) % P
    is_square, root = sqrt_ratio(1, v * u2 * u2 % P)
    x = even(2 * s * root * u2 % P)
    y = u1 * root * root * u2 * v % P
    t = x * y % P
    return (x, y, 1, t) if is_square and not t & 1 and y else None


def element_bytes(point):
    x, y, z, t = point
    u1, u2 = (z + y) * (z - y) % P, x * y % P
    _, root = sqrt_ratio(1, u1 * u2 * u2 % P)
    den1, den2 = root * u1 % P, root * u2 % P
    z_inverse = den1 * den2 * t % P
    if t * z_inverse % P & 1:
        x, y, den2 = y * SQRT_M1 % P, x * SQRT_M1 % P, den1 * A_MINUS_D_ROOT % P
    if x * z_inverse % P & 1:
        y = -y
    return even(den2 * (z - y) % P).to_bytes(32, "little")


def _map(data):
    t = (int.from_bytes(data, "little") & (1 << 255) - 1) % P
    r = SQRT_M1 * t * t % P
    u, v = (r + 1) * ONE_MINUS_D_SQ % P, (-1 - r * D) * (r + D) % P
    is_square, s = sqrt_ratio(u, v)
    s, c = (s, -1) if is_square else (-even(s * t % P) % P, r)
    n = (c * (r - 1) * D_MINUS_ONE_SQ - v) % P
    w0, w1, w2, w3 = 2 * s * v, n * AD_MINUS_ONE_ROOT, 1 - s * s, 1 + s * s
    return (w0 * w3 % P, w2 * w1 % P, w1 * w3 % P, w0 * w2 % P)


# ECVRF-RISTRETTO255-SHA512: https://c2sp.org/vrf-r255, the construction of RFC 9381.

SUITE = b"\xffc2sp.org/vrf-r255"


@functools.lru_cache(4096)
def proves(key, message, proof):
    """Whether the proof holds for this key and message; None if the key is no key."""
    y = element_of(key)
    if y is None or key == bytes(32):
        return None
    gamma, c, s = element_of(proof[:32]), int.from_bytes(proof[32:48], "little"), int.from_bytes(proof[48:], "little")
    if gamma is None or s >= L:
        return False
    uniform = hashlib.sha512(SUITE + b"\x82" + key + message).digest()
    h = add(_map(uniform[:32]), _map(uniform[32:]))
    u = add(times(s, BASE), minus(times(c, y)))
    v = add(times(s, h), minus(times(c, gamma)))
    points = b"".join(element_bytes(point) for point in (y, h, gamma, u, v))
    return hashlib.sha512(SUITE + b"\x02" + points + b"\x00").digest()[:16] == proof[32:48]


def vrf_output(proof):
    return hashlib.sha512(SUITE + b"\x03" + proof[:32] + b"\x00").digest()


# The logarithm of the draw: FreeBSD's e_log.c, every operation one rounded IEEE double.

LN2_HIGH, LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
LG = (
    6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01, 2.222219843214978396e-01,
    1.818357216161805012e-01, 1.531383769920937332e-01, 1.479819860511658591e-01,
)  # fmt: skip


def ln(x):
    """ln of a positive, normal x."""
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
    t1 = w * (LG[1] + w * (LG[3] + w * LG[5]))
    t2 = z * (LG[0] + w * (LG[2] + w * (LG[4] + w * LG[6])))
    return s * (hfsq + (t2 + t1)) + k * LN2_LOW - hfsq + f + k * LN2_HIGH
