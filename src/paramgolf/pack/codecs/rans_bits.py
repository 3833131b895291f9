"""A small adaptive binary range coder in plain Python integers, for side data: headers, class indices, rare values.

Every context holds a 16-bit probability that starts fast and slows down as it sees bits. About 1 us a bit.
"""

from __future__ import annotations

from collections.abc import Hashable

_TOP = 48  # bits of `low` and `range`
_RENORM = 1 << (_TOP - 8)
_FULL = (1 << _TOP) - 1
_SLOWEST = 400  # adaptation never gets slower than 1 / this
_RATE = [(1 << 16) // (n + 2) for n in range(_SLOWEST)]
_HALF = [1 << 15, 0]


class BitWriter:
    """`bit(context, bit)` for each bit, then `finish()` -> bytes."""

    def __init__(self) -> None:
        self.low, self.range = 0, _FULL
        self.out = bytearray()
        self.models: dict[Hashable, list[int]] = {}

    def bit(self, context: Hashable, bit: int) -> int:
        """Code one bit with the adaptive probability of `context`; returns it."""
        model = self.models.get(context)
        if model is None:
            model = self.models[context] = _HALF.copy()
        zero, seen = model
        split = (self.range >> 16) * zero
        if bit:
            self.low += split
            self.range -= split
            model[0] = zero - (zero * _RATE[seen] >> 16) or 1
        else:
            self.range = split
            model[0] = zero + ((65535 - zero) * _RATE[seen] >> 16)
        if seen < _SLOWEST - 1:
            model[1] = seen + 1
        while self.range < _RENORM:
            self._shift()
        return bit

    def bits(self, value: int, width: int) -> int:
        """Code `width` equally likely bits, the highest first; returns `value`."""
        for k in range(width - 1, -1, -1):
            self.range >>= 1
            if value >> k & 1:
                self.low += self.range
            while self.range < _RENORM:
                self._shift()
        return value

    def _shift(self) -> None:
        self._carry()
        self.out.append(self.low >> (_TOP - 8))
        self.low = (self.low << 8) & _FULL
        self.range <<= 8

    def _carry(self) -> None:
        if self.low > _FULL:
            self.low &= _FULL
            at = len(self.out) - 1
            while self.out[at] == 255:
                self.out[at] = 0
                at -= 1
            self.out[at] += 1

    def finish(self) -> bytes:
        """The shortest bytes that decode to what was coded (a reader sees zeros after the end)."""
        for width in range(_TOP, -1, -8):
            value = (self.low + (1 << width) - 1) >> width << width
            if value < self.low + self.range:
                self.low = value
                break
        self._carry()
        self.out += self.low.to_bytes(_TOP // 8, "big")
        return bytes(self.out).rstrip(b"\0")


class BitReader:
    """The inverse of BitWriter: the same calls with the value argument ignored return the value."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, _TOP // 8
        self.code = int.from_bytes(data[: self.at].ljust(self.at, b"\0"), "big")
        self.range = _FULL
        self.models: dict[Hashable, list[int]] = {}

    def bit(self, context: Hashable, bit: int = 0) -> int:
        model = self.models.get(context)
        if model is None:
            model = self.models[context] = _HALF.copy()
        zero, seen = model
        split = (self.range >> 16) * zero
        if self.code >= split:
            bit = 1
            self.code -= split
            self.range -= split
            model[0] = zero - (zero * _RATE[seen] >> 16) or 1
        else:
            bit = 0
            self.range = split
            model[0] = zero + ((65535 - zero) * _RATE[seen] >> 16)
        if seen < _SLOWEST - 1:
            model[1] = seen + 1
        while self.range < _RENORM:
            self._shift()
        return bit

    def bits(self, value: int, width: int) -> int:
        value = 0
        for _ in range(width):
            self.range >>= 1
            value <<= 1
            if self.code >= self.range:
                self.code -= self.range
                value |= 1
            while self.range < _RENORM:
                self._shift()
        return value

    def _shift(self) -> None:
        following = self.data[self.at] if self.at < len(self.data) else 0
        self.at += 1
        self.code = (self.code << 8 | following) & ((1 << (_TOP + 8)) - 1)
        self.range <<= 8


Bits = BitWriter | BitReader


def unsigned(coder: Bits, context: Hashable, value: int = 0, direct: int = 6, limit: int = 36) -> int:
    """Code an integer >= 0: unary with adaptive bits up to `direct`, then Elias-gamma; ValueError above 2**limit."""
    for k in range(direct):
        if not coder.bit((context, k), value > k):
            return k
    rest = value - direct + 1
    width = 1
    while coder.bit((context, "w", width), rest >> width > 0):
        width += 1
        if width > limit:
            raise ValueError("a number in the side data of the weights is too large")
    tail = rest & ((1 << (width - 1)) - 1)
    return direct - 1 + ((1 << (width - 1)) | coder.bits(tail, width - 1))


def signed(coder: Bits, context: Hashable, value: int = 0, direct: int = 6) -> int:
    """Code an integer of either sign, small ones short."""
    if not coder.bit((context, "any"), value != 0):
        return 0
    negative = coder.bit((context, "sign"), value < 0)
    size = 1 + unsigned(coder, (context, "size"), abs(value) - 1, direct)
    return -size if negative else size
