"""Binary decisions to bytes and back: range asymmetric numeral systems (rANS), in plain integers.

One state codes the decisions of all lanes in turn, so a lane costs nothing but its length. A decoder reads the stream's
16-bit words in the order in which the encoder, which runs backwards, left them. A decision with frequency 65536 costs
nothing and changes nothing: that is how a lane sits out a step.

Source: J. Duda, Asymmetric numeral systems (2013).
"""

from __future__ import annotations

import numpy as np

from paramgolf.errors import GolfError

SCALE_BITS = 16
ONE = 1 << SCALE_BITS  # the frequency that means certainty
STATE_BYTES = 5
_MASK = ONE - 1
# A state lives in [2^24, 2^40): 8 bits finer than the frequencies, so that rounding costs below 1e-5 bits a decision.
SEAL_BITS = 24
_LOW = 1 << 24
_EMIT = 24


class Writer:
    """Encodes in reverse: hand it the last decisions first."""

    def __init__(self, seal: int) -> None:
        """`seal`: a number below 2^24, which costs nothing (a state has to begin somewhere) and which the reader finds
        at the end: a checksum."""
        self._state = _LOW + seal
        self._words: list[int] = []

    def write(self, zero_freq: np.ndarray, bits: np.ndarray) -> None:
        """Decisions that come before all those already written.

        zero_freq: integers, 65536 times the probability of a 0, in 1..65536; bits: bool, of the same shape. They are
        read row by row. A bit that is 1 needs a frequency below 65536.
        """
        open_ = zero_freq != ONE
        zeros, ones = zero_freq[open_].astype(np.int64)[::-1], bits[open_][::-1]
        freqs, starts = np.where(ones, ONE - zeros, zeros), np.where(ones, zeros, 0)
        state, emit = self._state, self._words.append
        for freq, start in zip(freqs.tolist(), starts.tolist(), strict=True):
            if state >= freq << _EMIT:
                emit(state & _MASK)
                state >>= SCALE_BITS
            state = (state // freq << SCALE_BITS) + state % freq + start
        self._state = state

    def finish(self) -> bytes:
        """The state (5 bytes), then the words."""
        return self._state.to_bytes(STATE_BYTES, "little") + np.array(self._words[::-1], "<u2").tobytes()


class Reader:
    """The inverse of `Writer`, first decision first."""

    def __init__(self, data: bytes) -> None:
        """Raises GolfError if `data` cannot hold a state and words."""
        if len(data) < STATE_BYTES or (len(data) - STATE_BYTES) % 2:
            raise GolfError(f"the coded stream is cut short: {len(data)} bytes of it are left")
        self._state = int.from_bytes(data[:STATE_BYTES], "little")
        self._words = np.frombuffer(data[STATE_BYTES:], "<u2").tolist()
        self._next = 0

    def read(self, zero_freq: np.ndarray) -> np.ndarray:
        """The next bits, bool (n,), given 65536 times their probabilities of a 0, integers (n,) in 1..65536."""
        state, words, at, bits = self._state, self._words, self._next, []
        for zero in zero_freq.tolist():
            slot = state & _MASK
            bit = slot >= zero
            freq, start = (ONE - zero, zero) if bit else (zero, 0)
            state = freq * (state >> SCALE_BITS) + slot - start
            if state < _LOW:  # a stream gone wrong reads past its end: it gets zeros, and `seal` tells
                state = state << SCALE_BITS | (words[at] if at < len(words) else 0)
                at += 1
            bits.append(bit)
        self._state, self._next = state, at
        return np.array(bits, bool)

    @property
    def overrun(self) -> bool:
        """Whether more was read than the writer wrote: the stream is damaged or was read wrongly."""
        return self._next > len(self._words)

    def seal(self) -> int | None:
        """After the last decision: the writer's seal; None if words are left or missing."""
        return self._state - _LOW if self._next == len(self._words) else None
