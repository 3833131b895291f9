"""Text to bits and back through a model whose two runs need not agree to the last digit.

A token is its path through a balanced binary tree over the ids, one decision for each bit, most significant first. The
log-odds of a decision are read off the model's logits, replaced by a cell of a grid that encoder and decoder find alike
(`grid`), and the bit is coded with the cell's probability (`rans`). The encoder may use the fast batched scorer and the
decoder the token-by-token path with a KV cache, another thread count or another machine: as long as their log-odds
differ by no more than the tolerance in the header, decoding is exact. Proof and costs: docs/coder.md.

Lanes are independent token streams; a step codes the next token of each, a lane's tokens come in order.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from paramgolf.errors import CheckFailed, GolfError
from paramgolf.score import rans
from paramgolf.score.grid import GUARD, Grid, reach, warp
from paramgolf.score.ngram import Mixture

FLOOR = 60.0  # logits further below the largest are raised to it, which keeps every log-odds finite
MAX_TOLERANCE = 0.05
MAX_SHIFTS = 128
_WIDTHS = tuple(round(4096 * 2.0**-k) for k in np.arange(6.0, -1.01, -0.25))  # cell widths to choose from, in 1/4096
# Decisions of a block that a grid at a random place would put on a boundary. With 2 expected, one place in seven has
# none, and naming the first such place costs 2.1 bits for each of them; a flag at each decision would cost about 13.
_HITS = 2.0
_BITS_A_HIT = 2.11
_HEADER = struct.Struct("<fBBB")  # tolerance, index of the cell width, places, stay; then varints
MAX_LENGTH = 2**40
_SEAL_MASK = (1 << rans.SEAL_BITS) - 1


def depth_of(vocab_size: int) -> int:
    """Decisions for one token."""
    return max(1, (vocab_size - 1).bit_length())


def masses(
    logits: torch.Tensor, mixture: Mixture | None = None, room: list[torch.Tensor] | None = None
) -> list[torch.Tensor]:
    """Probabilities of all tree nodes: level k is (n, 2^k) float64, level 0 the root, from logits (n, V), not
    normalised where no `mixture` is made of them. `room`: what an earlier call gave for as many rows, written over.

    Raises CheckFailed if a logit is not a number.
    """
    count, vocab_size = logits.shape
    if room is None:
        widths = (1 << level for level in range(depth_of(vocab_size) + 1))
        room = [torch.zeros(count, width, dtype=torch.float64, device=logits.device) for width in widths]
    leaves = room[-1][:, :vocab_size].copy_(logits)
    top = leaves.amax(dim=-1, keepdim=True)
    if not bool(torch.isfinite(top).all()):
        raise CheckFailed("the model gives logits that are not finite numbers: nothing can be coded with it")
    leaves.sub_(top).clamp_min_(-FLOOR).exp_()
    if mixture is not None:
        factor, rows, tokens, gains = (
            torch.from_numpy(part).to(leaves.device)
            for part in (mixture.factor, mixture.rows, mixture.tokens, mixture.gains)
        )
        leaves *= (factor / leaves.sum(dim=-1))[:, None]
        leaves.index_put_((rows, tokens), gains, accumulate=True)
    for level in range(len(room) - 2, -1, -1):
        torch.add(room[level + 1][:, ::2], room[level + 1][:, 1::2], out=room[level])
    return room


def path_log_odds(logits: torch.Tensor, tokens: torch.Tensor, mixture: Mixture | None = None) -> np.ndarray:
    """(n, depth) float64: the log-odds of a 1 at each decision on the way to `tokens` (n,), from logits (n, V).

    If two logits differ by at most d in every entry, their log-odds differ by at most 2 d; with a mixture by 4 d, as
    either side's mass changes by a factor of exp(2 d) at most, before and after something is added to it.
    """
    levels = masses(logits, mixture)
    depth = len(levels) - 1
    out = [
        torch.log(levels[k + 1].gather(1, left + 1)) - torch.log(levels[k + 1].gather(1, left))
        for k in range(depth)
        for left in [(tokens >> (depth - k) << 1)[:, None]]
    ]
    # A side without any id has no mass and a log-odds of minus infinity; its bit is not coded, so any number does.
    return torch.cat(out, dim=1).clamp(-4 * FLOOR, 4 * FLOOR).cpu().numpy()


def _bits(tokens: np.ndarray, depth: int) -> np.ndarray:
    """(n, depth) bool, most significant bit first."""
    return (tokens.astype(np.int64)[:, None] >> np.arange(depth - 1, -1, -1) & 1).astype(bool)


def _forced(prefix: np.ndarray, level: int, depth: int, vocab_size: int) -> np.ndarray:
    """Whether the decision after `prefix` (the first `level` bits) can only be 0: no id begins with prefix and 1."""
    return (2 * prefix.astype(np.int64) + 1) << (depth - level - 1) >= vocab_size


@dataclass(frozen=True)
class Settings:
    """What the decoder must know besides the data.

    tolerance: log-odds by which a decoder may differ; block: tokens of a lane that share one place of the grid; stay:
    256 times the probability that a place is taken rather than the next.
    """

    tolerance: float
    grid: Grid
    block: int
    stay: int
    vocab_size: int

    @property
    def stay_freq(self) -> int:
        return self.stay << rans.SCALE_BITS - 8

    @property
    def depth(self) -> int:
        return depth_of(self.vocab_size)


def fit(tolerance: float, log_odds: np.ndarray, tokens: np.ndarray, vocab_size: int) -> Settings:
    """The settings with the smallest expected size for text like the sample: `log_odds` (n, depth), `tokens` (n,).

    Raises GolfError for a tolerance or a vocabulary that the format does not allow.
    """
    if not 0 <= tolerance <= MAX_TOLERANCE:
        raise GolfError(f"coder tolerance {tolerance} is outside 0..{MAX_TOLERANCE} log-odds")
    if not 2 <= vocab_size <= 65536:
        raise GolfError(f"the coder takes vocabularies of 2 to 65536 tokens, not {vocab_size}")
    kept = np.float32(tolerance)  # as the header stores it, never less than asked for
    tolerance = float(kept if kept >= tolerance else np.nextafter(kept, np.float32(1)))
    bits = _bits(tokens, depth_of(vocab_size))
    low, high = reach(log_odds, tolerance)
    middle = warp(log_odds)
    best: tuple[float, Settings] | None = None
    for width in _WIDTHS:
        places = int(min(MAX_SHIFTS, width / 4096 / (2 * (tolerance + GUARD))))
        if places < 16 and width != _WIDTHS[-1]:
            continue  # too few places to find a free one
        grid = Grid(width, max(1, places))
        zero = grid.zero_freq[0][grid.cells(middle, 0)] / rans.ONE
        coded = -np.log2(np.where(bits, 1.0 - zero, zero)).mean()
        trial = range(0, grid.shifts, max(1, grid.shifts // 4))
        rate = float(np.mean([(grid.cells(low, s) != grid.cells(high, s)).mean() for s in trial]))
        rate = max(rate, 1.0 / bits.size)  # what a sample of this size cannot see
        cost = coded + rate * _BITS_A_HIT
        if best is None or cost < best[0]:
            block = int(max(1, _HITS / (rate * bits.shape[1])))
            free = np.exp(-rate * block * bits.shape[1])
            best = cost, Settings(tolerance, grid, block, int(np.clip(free * 256, 1, 255)), vocab_size)
    assert best is not None
    return best[1]


class Encoder:
    """Collects the lanes' tokens with their log-odds; `finish` gives the bytes."""

    def __init__(self, settings: Settings, lanes: int) -> None:
        self.settings = settings
        self._pending: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in range(lanes)]
        self._blocks: list[list[_Block]] = [[] for _ in range(lanes)]
        self._checks, self._lengths = [0] * lanes, [0] * lanes

    def add(self, lane: int, log_odds: np.ndarray, tokens: np.ndarray) -> None:
        """The next tokens (n,) of a lane with their `path_log_odds` (n, depth)."""
        self._checks[lane] = zlib.crc32(tokens.astype("<u2").tobytes(), self._checks[lane])
        done = 0
        while done < len(tokens):
            room = self.settings.block - self._lengths[lane] % self.settings.block
            piece = slice(done, done + room)
            self._pending[lane].append((log_odds[piece], tokens[piece]))
            count = len(tokens[piece])
            self._lengths[lane] += count
            done += count
            if count == room:
                self._close_block(lane)

    def _close_block(self, lane: int) -> None:
        pending = self._pending[lane]
        if pending:
            log_odds, tokens = (np.concatenate(column) for column in zip(*pending, strict=True))
            self._blocks[lane].append(_make_block(self.settings, log_odds, tokens))
            pending.clear()

    def finish(self) -> bytes:
        """The coded stream: header, lengths, state, words."""
        s, lanes = self.settings, len(self._blocks)
        for lane in range(lanes):
            self._close_block(lane)
        writer = rans.Writer(_seal(self._checks))
        for index in range(max(map(len, self._blocks)) - 1, -1, -1):
            now = [blocks[index] if index < len(blocks) else None for blocks in self._blocks]
            self._write_tokens(writer, now)
            self._write_places(writer, now)
        width = _WIDTHS.index(s.grid.width_4096)
        head = _HEADER.pack(s.tolerance, width, s.grid.shifts, s.stay)
        lengths = np.diff(self._lengths, prepend=0)
        signed = np.where(lengths < 0, -2 * lengths - 1, 2 * lengths)
        return head + b"".join(_varint(int(n)) for n in (s.block, s.vocab_size, lanes, *signed)) + writer.finish()

    def _write_tokens(self, writer: rans.Writer, now: list[_Block | None]) -> None:
        depth = self.settings.depth
        steps = max(len(block.tokens) for block in now if block is not None)
        zero = np.full((steps, depth, len(now)), rans.ONE, dtype=np.uint32)
        bits = np.zeros((steps, depth, len(now)), dtype=bool)
        for lane, block in enumerate(now):
            if block is not None:
                zero[: len(block.tokens), :, lane] = block.zero_freq
                bits[: len(block.tokens), :, lane] = _bits(block.tokens, depth)
        writer.write(zero, bits)

    def _write_places(self, writer: rans.Writer, now: list[_Block | None]) -> None:
        """A lane's place is a row of 1 ("the next") ended by a 0, which the last place does without."""
        places = np.array([-1 if block is None else block.place for block in now])
        row = np.arange(min(places.max() + 1, self.settings.grid.shifts))[:, None]
        writer.write(np.where(row <= places, self.settings.stay_freq, rans.ONE), row < places)


@dataclass(frozen=True)
class _Block:
    """tokens (n,), the place of the grid, zero_freq (n, depth) uint32."""

    tokens: np.ndarray
    place: int
    zero_freq: np.ndarray


def _make_block(settings: Settings, log_odds: np.ndarray, tokens: np.ndarray) -> _Block:
    """The first place at which no decision of the block is near a boundary; the last place has no boundaries at all."""
    if not np.isfinite(log_odds).all():
        raise CheckFailed("the model gives log-odds that are not finite numbers: nothing can be coded with it")
    grid, depth = settings.grid, settings.depth
    low, high = reach(log_odds, settings.tolerance)
    place = 0
    while place < grid.shifts and not np.array_equal(grid.cells(low, place), grid.cells(high, place)):
        place += 1
    zero = grid.zero_freq[place][grid.cells(warp(log_odds), place)]
    for level in range(depth):
        prefix = tokens.astype(np.int64) >> (depth - level)
        zero[_forced(prefix, level, depth, settings.vocab_size), level] = rans.ONE
    return _Block(tokens.astype(np.uint16), place, zero)


class Decoder:
    """The lanes' tokens back, one step of all lanes at a time.

    decoder = Decoder(data)
    while not decoder.done:
        tokens = decoder.step(logits)   # of the next token of every lane
    decoder.finish()
    """

    def __init__(self, data: bytes) -> None:
        """Raises GolfError if `data` is not a coded stream."""
        if len(data) < _HEADER.size:
            raise GolfError(f"not a coded stream: {len(data)} bytes are less than its header")
        tolerance, width, shifts, stay = _HEADER.unpack_from(data)
        (block, vocab_size, lanes), at = _read_varints(data, _HEADER.size, 3)
        sane = 0 <= tolerance <= 1 and width < len(_WIDTHS) and 1 <= shifts <= MAX_SHIFTS and stay and block
        if not sane or not 2 <= vocab_size <= 65536 or not 1 <= lanes <= len(data):
            raise GolfError("the header of the coded stream is damaged")
        self.settings = Settings(tolerance, Grid(_WIDTHS[width], shifts), int(block), stay, int(vocab_size))
        signed, at = _read_varints(data, at, int(lanes))
        self.lengths = np.cumsum(np.where(signed % 2, -(signed + 1) // 2, signed // 2))  # tokens of each lane, int64
        if self.lengths.min() < 0 or self.lengths.max() > MAX_LENGTH:
            raise GolfError("the header of the coded stream is damaged: a lane has an impossible length")
        self._reader = rans.Reader(data[at:])
        self._place = np.zeros(len(self.lengths), np.int64)
        self._checks = [0] * len(self.lengths)
        self._room: list[torch.Tensor] | None = None
        self.position = 0  # tokens decoded of every lane

    @property
    def done(self) -> bool:
        return self.position >= int(self.lengths.max())

    def step(self, logits: torch.Tensor, mixture: Mixture | None = None) -> np.ndarray:
        """The next token of every lane, int64 (lanes,), -1 where the lane has ended; `logits`: (lanes, V), those of
        ended lanes are not used but must be finite. Raises CheckFailed where the stream has been read to its end."""
        self._room = masses(logits, mixture, self._room)  # the same memory for every token
        levels = [level.cpu().numpy() for level in self._room]
        lane = np.arange(len(self.lengths))

        def log_odds(prefix: np.ndarray, level: int) -> np.ndarray:
            with np.errstate(divide="ignore"):
                pair = np.log(levels[level + 1][lane[:, None], 2 * prefix[:, None] + np.arange(2)])
            return pair[:, 1] - pair[:, 0]

        return self.step_by(log_odds)

    def step_by(self, log_odds: Callable[[np.ndarray, int], np.ndarray]) -> np.ndarray:
        """As `step`, from a function of (prefix (lanes,) int64, level) that gives every lane's log-odds there
        (float64)."""
        s = self.settings
        ended = self.position >= self.lengths
        if self.position % s.block == 0:
            self._read_places(ended)
        prefix = np.zeros(len(ended), np.int64)
        for level in range(s.depth):
            idle = ended | _forced(prefix, level, s.depth, s.vocab_size)
            cells = s.grid.cells(warp(np.where(idle, 0.0, log_odds(prefix, level))), self._place)
            bit = self._reader.read(np.where(idle, rans.ONE, s.grid.zero_freq[self._place, cells]))
            prefix = 2 * prefix + bit
        for index in np.flatnonzero(~ended):
            self._checks[index] = zlib.crc32(int(prefix[index]).to_bytes(2, "little"), self._checks[index])
        self.position += 1
        if self._reader.overrun:  # at once: a hostile header may promise more tokens than time to decode them
            raise self._wrong()
        return np.where(ended, -1, prefix)

    def _read_places(self, ended: np.ndarray) -> None:
        looking = ~ended
        self._place[:] = 0
        for _ in range(self.settings.grid.shifts):
            if not looking.any():
                break
            looking = self._reader.read(np.where(looking, self.settings.stay_freq, rans.ONE))
            self._place += looking

    def finish(self) -> None:
        """Raises CheckFailed unless every token came back as it went in."""
        if not self.done or self._reader.seal() != _seal(self._checks):
            raise self._wrong()

    def _wrong(self) -> CheckFailed:
        return CheckFailed(
            "the decoded tokens do not match their checksum: the stream or the model is not the one it was coded "
            f"with, or this machine's log-odds differ by more than the tolerance of {self.settings.tolerance:g}"
        )


def _seal(checks: list[int]) -> int:
    """Of the lanes' checksums."""
    return zlib.crc32(np.array(checks, "<u4").tobytes()) & _SEAL_MASK


def _varint(value: int) -> bytes:
    """Little-endian groups of 7 bits, the high bit set on all but the last."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _read_varints(data: bytes, at: int, count: int) -> tuple[np.ndarray, int]:
    """`count` numbers from byte `at` on and the byte after them; GolfError where they end early or grow beyond 2^42."""
    values = np.zeros(count, np.int64)
    for index in range(count):
        for group in range(7):
            if at >= len(data) or group == 6:
                raise GolfError("the header of the coded stream is damaged: a lane's length is cut short")
            byte = data[at]
            at += 1
            values[index] += (byte & 127) << (7 * group)
            if byte < 128:
                break
    return values, at
