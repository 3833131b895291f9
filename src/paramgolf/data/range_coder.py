"""A small arithmetic coder with adaptive integer frequencies; plain Python, the same bits on every machine."""

from __future__ import annotations

from collections.abc import Sequence

_TOP = 1 << 64
_LOW = 1 << 32  # the range never falls below this, so totals up to 2**24 lose next to nothing


class Encoder:
    """Writes symbols given as (start, width) of `total`."""

    def __init__(self) -> None:
        self._out = bytearray()
        self._low, self._range = 0, _TOP - 1

    def encode(self, start: int, width: int, total: int) -> None:
        step = self._range // total
        self._low += step * start
        self._range = step * width
        if self._low >= _TOP:
            self._carry()
        while self._range < _LOW:
            self._out.append(self._low >> 56)
            self._low = self._low << 8 & (_TOP - 1)
            self._range <<= 8

    def _carry(self) -> None:
        self._low -= _TOP
        at = len(self._out) - 1
        while self._out[at] == 255:
            self._out[at] = 0
            at -= 1
        self._out[at] += 1

    def finish(self) -> bytes:
        """Everything written; the fewest bytes that name a number inside the last range."""
        for bits in range(56, -1, -8):
            value = (self._low + (1 << bits) - 1) >> bits << bits
            if value < self._low + self._range:
                self._low = value
                break
        if self._low >= _TOP:
            self._carry()
        return bytes(self._out + self._low.to_bytes(8, "big")).rstrip(b"\0")


class Decoder:
    """Reads what Encoder wrote; bytes past the end are zero. Never fails: wrong input gives wrong symbols."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 8
        self._code = int.from_bytes(data[:8].ljust(8, b"\0"), "big")
        self._range = _TOP - 1
        self._step = 1

    def peek(self, total: int) -> int:
        """A number below `total` that lies in the next symbol's (start, start + width); `take` must follow."""
        self._step = self._range // total
        return min(self._code // self._step, total - 1)

    def take(self, start: int, width: int) -> None:
        self._code -= self._step * start
        self._range = self._step * width
        while self._range < _LOW:
            byte = self._data[self._at] if self._at < len(self._data) else 0
            self._at += 1
            self._code = (self._code << 8 | byte) & (_TOP - 1)
            self._range <<= 8


class Bit:
    """An adaptive probability of a yes/no decision."""

    __slots__ = ("no", "yes")

    def __init__(self) -> None:
        self.no = self.yes = 1  # in half counts: the estimate of Krichevsky and Trofimov

    def _update(self, bit: bool) -> None:
        if bit:
            self.yes += 2
        else:
            self.no += 2

    def write(self, coder: Encoder, bit: bool) -> None:
        start, width = (self.no, self.yes) if bit else (0, self.no)
        coder.encode(start, width, self.no + self.yes)
        self._update(bit)

    def read(self, coder: Decoder) -> bool:
        bit = coder.peek(self.no + self.yes) >= self.no
        start, width = (self.no, self.yes) if bit else (0, self.no)
        coder.take(start, width)
        self._update(bit)
        return bit


class Number:
    """Adaptive coding of non-negative integers: the bit length in unary, then the bits below the first."""

    def __init__(self) -> None:
        self._length = [Bit() for _ in range(33)]
        self._bits = [[Bit() for _ in range(33)] for _ in range(33)]

    def write(self, coder: Encoder, value: int) -> None:
        length = (value + 1).bit_length()
        for i in range(1, length):
            self._length[i].write(coder, True)
        self._length[length].write(coder, False)
        for i in range(length - 2, -1, -1):
            self._bits[length][i].write(coder, bool((value + 1) >> i & 1))

    def read(self, coder: Decoder) -> int:
        length = 1
        while length < 32 and self._length[length].read(coder):
            length += 1
        value = 1
        for i in range(length - 2, -1, -1):
            value = value << 1 | self._bits[length][i].read(coder)
        return value - 1


class Frequencies:
    """Adaptive frequencies of symbols 0, 1, ... as a Fenwick tree; symbols can be added."""

    def __init__(self, capacity: int, weights: Sequence[int] = ()) -> None:
        self._tree = [0] * (capacity + 1)
        self._weights: list[int] = []
        self.total = 0
        self._top = 1 << max(capacity.bit_length() - 1, 0)
        for weight in weights:
            self.append(weight)

    def append(self, weight: int) -> None:
        self._weights.append(0)
        self.add(len(self._weights) - 1, weight)

    def add(self, symbol: int, weight: int) -> None:
        self._weights[symbol] += weight
        self.total += weight
        at = symbol + 1
        while at < len(self._tree):
            self._tree[at] += weight
            at += at & -at

    def _start(self, symbol: int) -> int:
        start = 0
        while symbol:
            start += self._tree[symbol]
            symbol -= symbol & -symbol
        return start

    def write(self, coder: Encoder, symbol: int) -> None:
        coder.encode(self._start(symbol), self._weights[symbol], self.total)

    def read(self, coder: Decoder) -> int:
        value, symbol, step, start = coder.peek(self.total), 0, self._top, 0
        while step:
            if symbol + step < len(self._tree) and start + self._tree[symbol + step] <= value:
                symbol += step
                start += self._tree[symbol]
            step >>= 1
        coder.take(start, self._weights[symbol])
        return symbol
