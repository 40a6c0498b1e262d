"""What is the FarmHash fingerprint of some bytes, where there is no TensorFlow?

    fingerprint64(b"user5") % 1024

`farmhashna::Hash64` of FarmHash 1.1 (https://github.com/google/farmhash, MIT license), which is Fingerprint64, as
tf.fingerprint, `tf.strings.to_hash_bucket_fast` and BigQuery's FARM_FINGERPRINT compute it. Some microseconds.

Needs: nothing else.
"""

from __future__ import annotations

MASK = 2**64 - 1
K0, K1, K2 = 0xC3A5C85C97CB3127, 0xB492B66FBE98F273, 0x9AE16A3B2F90404F


def fingerprint64(data: bytes) -> int:
    """0 to 2^64 - 1."""
    length = len(data)
    if length <= 16:
        return _up_to_16(data)
    if length <= 32:
        mul = K2 + length * 2
        a, b, c, d = _at(data, 0) * K1, _at(data, 8), _at(data, -8) * mul, _at(data, -16) * K2
        return _mixed(_rotate(a + b, 43) + _rotate(c, 30) + d, a + _rotate(b + K2, 18) + c, mul)
    if length <= 64:
        return _up_to_64(data)
    return _long(data)


def _at(data: bytes, place: int, size: int = 8) -> int:
    place += len(data) if place < 0 else 0
    return int.from_bytes(data[place : place + size], "little")


def _rotate(value: int, by: int) -> int:
    value &= MASK
    return (value >> by | value << 64 - by) & MASK


def _shift_mix(value: int) -> int:
    value &= MASK
    return value ^ value >> 47


def _mixed(u: int, v: int, mul: int) -> int:
    """HashLen16."""
    a = _shift_mix((u ^ v) * mul)
    return _shift_mix((v ^ a) * mul) * mul & MASK


def _up_to_16(data: bytes) -> int:
    length = len(data)
    mul = K2 + length * 2
    if length >= 8:
        a, b = _at(data, 0) + K2, _at(data, -8)
        return _mixed((_rotate(b, 37) * mul + a) & MASK, ((_rotate(a, 25) + b) * mul) & MASK, mul)
    if length >= 4:
        return _mixed(length + (_at(data, 0, 4) << 3), _at(data, -4, 4), mul)
    if length:
        y, z = data[0] + (data[length >> 1] << 8), length + (data[-1] << 2)
        return _shift_mix(y * K2 ^ z * K0) * K2 & MASK
    return K2


def _up_to_64(data: bytes) -> int:
    mul = K2 + len(data) * 2
    a, b, c, d = _at(data, 0) * K2, _at(data, 8), _at(data, -8) * mul, _at(data, -16) * K2
    y = (_rotate(a + b, 43) + _rotate(c, 30) + d) & MASK
    z = _mixed(y, (a + _rotate(b + K2, 18) + c) & MASK, mul)
    e, f = _at(data, 16) * mul, _at(data, 24)
    g, h = (y + _at(data, -32)) * mul, (z + _at(data, -24)) * mul
    return _mixed((_rotate(e + f, 43) + _rotate(g, 30) + h) & MASK, (e + _rotate(f + a, 18) + g) & MASK, mul)


def _weak(data: bytes, place: int, a: int, b: int) -> tuple[int, int]:
    """WeakHashLen32WithSeeds of the 32 bytes from a place on."""
    w, x, y, z = (_at(data, place + offset) for offset in (0, 8, 16, 24))
    a += w
    b = _rotate(b + a + z, 21)
    c = a
    a += x + y
    return (a + z) & MASK, (b + _rotate(a, 44) + c) & MASK


def _long(data: bytes) -> int:
    seed = 81
    x, y = seed, (seed * K1 + 113) & MASK
    z = _shift_mix(y * K2 + 113) * K2 & MASK
    v, w = (0, 0), (0, 0)
    x = (x * K2 + _at(data, 0)) & MASK

    def block(place: int, mul: int, times: int) -> None:
        nonlocal x, y, z, v, w
        x = _rotate(x + y + v[0] + _at(data, place + 8), 37) * mul & MASK
        y = _rotate(y + v[1] + _at(data, place + 48), 42) * mul & MASK
        x ^= w[1] * times & MASK
        y = (y + v[0] * times + _at(data, place + 40)) & MASK
        z = _rotate(z + w[0], 33) * mul & MASK
        v = _weak(data, place, v[1] * mul & MASK, (x + w[0]) & MASK)
        w = _weak(data, place + 32, (z + w[1]) & MASK, (y + _at(data, place + 16)) & MASK)
        z, x = x, z

    end = (len(data) - 1) // 64 * 64
    for place in range(0, end, 64):
        block(place, K1, 1)
    mul = (K1 + ((z & 0xFF) << 1)) & MASK
    w = (w[0] + ((len(data) - 1) & 63)) & MASK, w[1]
    v = (v[0] + w[0]) & MASK, v[1]
    w = (w[0] + v[0]) & MASK, w[1]
    block(len(data) - 64, mul, 9)
    return _mixed((_mixed(v[0], w[0], mul) + _shift_mix(y) * K0 + z) & MASK, (_mixed(v[1], w[1], mul) + x) & MASK, mul)
