"""An independent slow script: failing memory in plain Python integers, one bit at a time, straight from the definition.

Shares no code with pyaccel. Run it to print the golden values that the tests hold.
"""

from __future__ import annotations

import zlib
from decimal import Decimal, getcontext

SEED, STREAM = 0x123456789ABCDEF0, 7
M32 = 0xFFFFFFFF


def philox(seed, index, stream, domain):
    c = [index & M32, index >> 32 & M32, stream, domain]
    k = [seed & M32, seed >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & M32, a >> 32 ^ c[3] ^ k[1], a & M32]
        k = [k[0] + 0x9E3779B9 & M32, k[1] + 0xBB67AE85 & M32]
    return c


def stream_byte(seed, i, stream, domain):
    word = philox(seed, i // 16, stream, domain)[i % 16 // 4]
    return word >> 8 * (i % 4) & 255


def uniform(seed, i, stream):
    low = philox(seed, i // 4, stream, 1)[i % 4] >> 8
    return stream_byte(seed, i, stream, 0) << 24 | low


def threshold(p):
    return min(round(p * 2**32), 2**32)


def dense_fails(seed, i, stream, t):
    return uniform(seed, i, stream) < t


def block_size(t):
    size = 64
    while size < 4096 and size < 2 * 2**32 / t:
        size *= 2
    return size


def table(t, block):
    getcontext().prec = 60
    p = Decimal(t) / 2**32
    term, total, entries = (1 - p) ** block, Decimal(0), []
    for c in range(block + 1):
        total += term
        entries.append(min(int(total * 2**32), M32))
        if entries[-1] == M32:
            break
        term *= (block - c) * p / ((c + 1) * (1 - p))
    return entries


def sparse_fails(seed, plane, t, words, stream):
    """The set of failing words among the first `words`."""
    block = block_size(t)
    cumulative, found = table(t, block), set()
    for k in range((words + block - 1) // block):
        def word(n, k=k):
            return philox(seed, k, stream, 0x02000000 | plane << 16 | n // 4)[n % 4]

        count = next((c for c, limit in enumerate(cumulative) if word(0) < limit), len(cumulative) - 1)
        inside = set()
        for s in range(count):
            j = block - count + s
            r = word(s + 1) * (j + 1) >> 32
            inside.add(j if r in inside else r)
        found |= {k * block + r for r in inside if k * block + r < words}
    return found


def failed_memory(memory: bytes, probabilities, mode, semantics, seed=SEED, stream=STREAM) -> bytes:
    """The memory as read back; `probabilities` of the W bits of a word, LSB first."""
    width, out = len(probabilities), bytearray(memory)
    limits = [threshold(p) for p in probabilities]
    words = len(memory) * 8 // width
    if mode == "sparse":
        planes = [sparse_fails(seed, b, t, words, stream) if t else set() for b, t in enumerate(limits)]
    for e in range(words):
        for b in range(width):
            i = e * width + b
            fails = e in planes[b] if mode == "sparse" else dense_fails(seed, i, stream, limits[b])
            if fails and (semantics == "flip" or (out[i // 8] >> i % 8 & 1) != stream_byte(seed, i, stream, 2) & 1):
                out[i // 8] ^= 1 << i % 8
    return bytes(out)


def probabilities(width, p):
    """Unequal on purpose, one bit safe where there are several: every bit has its own threshold."""
    return [p * (1 + b / width) for b in range(width - 1)] + ([0.0] if width > 1 else [p])


CASES = [
    (width, mode, semantics, p)
    for width in (1, 2, 4, 8, 16, 32)
    for mode, p in (("dense", 0.07), ("sparse", 0.013))
    for semantics in ("flip", "stuck")
]


def golden(width, mode, semantics, p) -> str:
    """CRC-32 of 2,048 bytes 0, 37, 74, ... (mod 256) after their failures."""
    memory = bytes(i * 37 % 256 for i in range(2048))
    return f"{zlib.crc32(failed_memory(memory, probabilities(width, p), mode, semantics)):08x}"


if __name__ == "__main__":
    for case in CASES:
        print(f"    {case}: {golden(*case)!r},")
