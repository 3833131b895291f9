"""Binary decisions to bytes and back: range asymmetric numeral systems (rANS) over many lanes in lockstep, numpy only.

Every step codes one bit in each lane with its own probability, so the cost of a step is a dozen numpy calls however
many lanes there are. The lanes share one stream of 16-bit words; a decoder reads them in the order in which the
encoder, which runs backwards, left them. A bit with frequency 65536 costs nothing and changes nothing: that is how a
lane sits out a step.

Source: J. Duda, Asymmetric numeral systems (2013); interleaving after F. Giesen (2014).
"""

from __future__ import annotations

import numpy as np

from paramgolf.errors import GolfError

SCALE_BITS = 16
ONE = 1 << SCALE_BITS  # the frequency that means certainty
STATE_BYTES = 5
_WORD = np.uint64(16)
_MASK = np.uint64(ONE - 1)
# A state lives in [2^24, 2^40): 8 bits finer than the frequencies, so that rounding costs below 1e-5 bits a decision.
SEAL_BITS = 24
_LOW = np.uint64(1 << 24)
_EMIT = np.uint64(24)


class Writer:
    """Encodes in reverse: hand it the last steps first."""

    def __init__(self, seals: np.ndarray) -> None:
        """`seals` (lanes,): a number below 2^24 for each lane, which costs nothing (a state has to begin somewhere) and
        which the reader finds at the end: a checksum."""
        self._state = _LOW + seals.astype(np.uint64)
        self._words: list[np.ndarray] = []

    def write(self, zero_freq: np.ndarray, bits: np.ndarray) -> None:
        """Steps that come before all those already written.

        zero_freq: (steps, lanes) integers, 65536 times the probability of a 0, in 1..65536; bits: (steps, lanes) bool.
        A bit that is 1 needs a frequency below 65536.
        """
        zeros = zero_freq.astype(np.uint64)
        freqs = np.where(bits, np.uint64(ONE) - zeros, zeros)
        starts = np.where(bits, zeros, np.uint64(0))
        limits = freqs << _EMIT
        state = self._state
        for step in range(len(bits) - 1, -1, -1):
            full = state >= limits[step]
            if full.any():
                self._words.append((state[full] & _MASK)[::-1])
                state[full] >>= _WORD
            quotient, rest = np.divmod(state, freqs[step])
            state = (quotient << _WORD) + rest + starts[step]
        self._state = state

    def finish(self) -> bytes:
        """The lanes' states (5 bytes each), then the words."""
        tail = np.concatenate(self._words)[::-1] if self._words else np.zeros(0, np.uint64)
        heads = self._state.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :STATE_BYTES]
        return heads.tobytes() + tail.astype("<u2").tobytes()


class Reader:
    """The inverse of `Writer`, one step at a time, first step first."""

    def __init__(self, data: bytes, lanes: int) -> None:
        """Raises GolfError if `data` cannot hold the states of so many lanes."""
        head = lanes * STATE_BYTES
        if len(data) < head or (len(data) - head) % 2:
            raise GolfError(f"the coded stream is cut short: {len(data)} bytes for {lanes} lanes")
        states = np.zeros((lanes, 8), np.uint8)
        states[:, :STATE_BYTES] = np.frombuffer(data[:head], np.uint8).reshape(lanes, STATE_BYTES)
        self._state = states.view("<u8").reshape(lanes).astype(np.uint64)
        # A stream gone wrong reads past its end: it gets zeros, and `seals` tells.
        self._words = np.frombuffer(data[head:], "<u2").astype(np.uint64)
        self._next = 0

    def read(self, zero_freq: np.ndarray) -> np.ndarray:
        """The next bit of every lane, bool (lanes,), given 65536 times the probability of a 0, integers in 1..65536."""
        zero = zero_freq.astype(np.uint64)
        slot = self._state & _MASK
        bit = slot >= zero
        freq = np.where(bit, np.uint64(ONE) - zero, zero)
        self._state = freq * (self._state >> _WORD) + slot - np.where(bit, zero, np.uint64(0))
        hungry = self._state < _LOW
        count = int(np.count_nonzero(hungry))
        if count:
            words = self._words[self._next : self._next + count]
            self._next += count
            fill = np.zeros(count, np.uint64)
            fill[: len(words)] = words
            self._state[hungry] = (self._state[hungry] << _WORD) | fill
        return bit

    @property
    def overrun(self) -> bool:
        """Whether more was read than the writer wrote: the stream is damaged or was read wrongly."""
        return self._next > len(self._words)

    def seals(self) -> np.ndarray | None:
        """After the last step: the writer's seals, int64 (lanes,); None if words are left or missing."""
        return (self._state - _LOW).astype(np.int64) if self._next == len(self._words) else None
