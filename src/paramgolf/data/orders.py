"""In which order a loader visits the training tokens: one class for each `data.order`.

An order gives the rows of one global batch after the other as start positions in the shards put end to end (modulo
their total); it knows nothing of ranks, except how rows are dealt to them. Where it stands is a `Place`, plain numbers
from which any process goes on.

| `data.order` | origin | rows |
|---|---|---|
| `shuffled` | ours | windows of T of all shards in a random permutation, phase and permutation new in every epoch |
| `sequential` | baseline | the reference's endless stream in spans; no seed |
| `coprime` | #726 | in each shard every stride-th window, the stride coprime with their number; a batch mixes shards |
| `shuffled_shards` | #1394 | windows of each shard permuted; every row draws its shard by the windows it has left |
| `packed` | #1530 | long rows of whole documents in order, to be cut at documents by the model (model.document_mask) |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import numpy as np

from paramgolf.errors import GolfError

REFERENCE_SPANS = 8  # the reference splits every step into world * accumulation = 8 spans
BOS_ID = 1


@dataclass(frozen=True)
class Place:
    """Where the next batch begins. position: tokens consumed (sequential), rows (shuffled, shuffled_shards) or
    batches (coprime) of this epoch, tokens of this piece of the data (packed); part: the number of that piece (packed),
    rows of the first batch of this epoch if it had fewer than others (coprime)."""

    seq_len: int
    batch_tokens: int
    epoch: int = 0
    position: int = 0
    tokens: int = 0  # training tokens handed out so far, over all ranks
    part: int = 0


class Order(Protocol):
    """The rows of one shape; made anew when the shape changes."""

    row_tokens: int

    def take(self, place: Place) -> tuple[np.ndarray, Place]:
        """(start positions of the rows of the global batch, int64; the place after it)."""

    def moved(self, place: Place, before: Place) -> Place:
        """The place to go on from after a change of sizes; `place` has the new ones."""


class Windows:
    """What the orders of rows of T tokens share."""

    def __init__(self, sizes: Sequence[int], seq_len: int, batch_tokens: int, seed: int) -> None:
        self.sizes, self.row_tokens, self.rows, self.seed = list(sizes), seq_len, batch_tokens // seq_len, seed
        self.total = sum(sizes)
        self.offsets = np.cumsum([0, *sizes[:-1]])

    def moved(self, place: Place, before: Place) -> Place:
        """Windows of another length begin another epoch."""
        changed = place.position and place.seq_len != before.seq_len
        return replace(place, epoch=place.epoch + 1, position=0) if changed else place


class Shuffled(Windows):
    """The shards are one stream cut into windows of T with a random phase, visited in a random permutation; both are
    new in every epoch. A text shorter than a window wraps around."""

    def take(self, place: Place) -> tuple[np.ndarray, Place]:
        rows, taken = self.rows, []
        epoch, position = place.epoch, place.position
        while rows:
            phase, order = _epoch_order(self.total, self.row_tokens, self.seed, epoch)
            part = order[position : position + rows]
            taken.append(phase + part.astype(np.int64) * self.row_tokens)
            rows -= len(part)
            position += len(part)
            if position == len(order):
                epoch, position = epoch + 1, 0
        return np.concatenate(taken), replace(place, epoch=epoch, position=position)


@lru_cache(maxsize=2)
def _epoch_order(total: int, seq_len: int, seed: int, epoch: int) -> tuple[int, np.ndarray]:
    """(phase, permutation of the windows) of one epoch."""
    generator = np.random.default_rng([seed, epoch, 0x676F6C66])
    phase = int(generator.integers(min(seq_len, total)))
    windows = max((total - 1 - phase) // seq_len, 1)
    return phase, generator.permutation(np.arange(windows, dtype=np.int32))


class Sequential(Windows):
    """The reference's rule (openai/parameter-golf `DistributedTokenLoader`): spans of batch_tokens / 8 + 1 tokens, 8
    for a step. Where batch_tokens / 8 is not a multiple of T the step has gcd(8, rows) spans."""

    @property
    def spans(self) -> int:
        return math.gcd(REFERENCE_SPANS, self.rows)

    def take(self, place: Place) -> tuple[np.ndarray, Place]:
        each = self.rows // self.spans
        first = place.position + np.arange(self.spans, dtype=np.int64) * (each * self.row_tokens + 1)
        starts = (first[:, None] + np.arange(each, dtype=np.int64) * self.row_tokens).reshape(-1)
        used = self.rows * self.row_tokens + self.spans
        return starts, replace(place, position=(place.position + used) % self.total)

    def moved(self, place: Place, before: Place) -> Place:
        return place


def check_windows(sizes: Sequence[int], seq_len: int, order: str) -> None:
    """GolfError for an order by shards that has none large enough for one window."""
    if max(sizes) <= seq_len:
        raise GolfError(
            f"data.order={order} cuts every shard by itself, and the largest has {max(sizes)} tokens: fewer than "
            f"train.seq_len + 1 = {seq_len + 1}; use data.order=shuffled or shorter rows"
        )


class Coprime(Windows):
    """Each shard has a random phase, a random first window and a stride coprime with the number of its windows: the
    j-th window is (first + j stride) mod n. A batch takes its rows in turn from several shards, drawn without
    replacement in proportion to remaining^alpha; alpha falls from 0.9 to 0.5 and the number of shards rises from 8 to
    32 over the first 1,800 batches. An epoch ends when every window was used once, or the batch changes."""

    RAMP, ALPHA, SHARDS = 1800, (0.9, 0.5), (8, 32)

    def __init__(self, sizes: Sequence[int], seq_len: int, batch_tokens: int, seed: int) -> None:
        super().__init__(sizes, seq_len, batch_tokens, seed)
        check_windows(sizes, seq_len, "coprime")
        self._epoch = -1
        self._done = 0  # batches of the epoch that the state below stands after
        self._used = np.zeros(len(sizes), np.int64)

    def take(self, place: Place) -> tuple[np.ndarray, Place]:
        if (place.epoch, place.position) != (self._epoch, self._done):
            self.begin(place.epoch)
            while self._done < place.position:
                self._batch(place.part if place.part and not self._done else self.rows)
        starts, part = self._batch(self.rows), place.part
        while len(starts) < self.rows:  # the epoch was over; the next one fills the batch
            self.begin(self._epoch + 1)
            part = self.rows - len(starts)
            starts = np.concatenate((starts, self._batch(part)))
        return starts, replace(place, epoch=self._epoch, position=self._done, part=part)

    def moved(self, place: Place, before: Place) -> Place:
        """A place counts batches of one size: other batches begin another epoch."""
        return replace(place, epoch=place.epoch + 1, position=0, part=0) if place.position else place

    def begin(self, epoch: int) -> None:
        self._epoch, self._done = epoch, 0
        self._used[:] = 0
        generator = np.random.default_rng([self.seed, epoch, 0x636F7072])
        layout = [self._layout(size, generator) for size in self.sizes]
        self._phase, self._count, self._first, self._stride = np.array(layout, np.int64).T

    def _layout(self, size: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
        """(phase, windows, first window, stride) of a shard."""
        room = size - 1 - self.row_tokens
        if room < 0:
            return 0, 0, 0, 1
        phase = int(generator.integers(min(self.row_tokens, room + 1)))
        count = (size - 1 - phase) // self.row_tokens
        stride = int(generator.integers(1, count + 1))
        while math.gcd(stride, count) > 1:
            stride += 1
        return phase, count, int(generator.integers(count)), stride

    def _batch(self, rows: int) -> np.ndarray:
        """The next `rows` rows of this epoch, fewer at its end."""
        ramp = min(self._done / self.RAMP, 1.0)
        alpha = self.ALPHA[0] + ramp * (self.ALPHA[1] - self.ALPHA[0])
        most = round(self.SHARDS[0] + ramp * (self.SHARDS[1] - self.SHARDS[0]))
        generator = np.random.default_rng([self.seed, self._epoch, self._done, 0x636F7072])
        taken: list[int] = []
        while len(taken) < rows and (left := self._count - self._used).any():
            weights = np.where(left > 0, left.astype(np.float64) ** alpha, 0.0)
            size = min(most, int(np.count_nonzero(weights)), rows - len(taken))
            chosen = generator.choice(len(left), size=size, replace=False, p=weights / weights.sum())
            turns = min(-(-(rows - len(taken)) // size), int(left[chosen].min()))
            picks = np.tile(chosen, turns)[: rows - len(taken)]
            taken += [self._window(int(shard)) for shard in picks]
        self._done += 1
        return np.array(taken, np.int64)

    def _window(self, shard: int) -> int:
        index = (self._first[shard] + self._used[shard] * self._stride[shard]) % self._count[shard]
        self._used[shard] += 1
        return int(self.offsets[shard] + self._phase[shard] + index * self.row_tokens)


class ShuffledShards(Windows):
    """Each shard has a random phase and its windows in random order; every row comes from a shard drawn in proportion
    to the windows it has left. When all are used every shard is drawn again. One generator (PCG64 of the seed) makes
    all of it, as in the published loader, so a resumed run draws once more what was drawn before."""

    def __init__(self, sizes: Sequence[int], seq_len: int, batch_tokens: int, seed: int) -> None:
        super().__init__(sizes, seq_len, batch_tokens, seed)
        check_windows(sizes, seq_len, "shuffled_shards")
        self._epoch = self._drawn = -1

    def take(self, place: Place) -> tuple[np.ndarray, Place]:
        if (place.epoch, place.position) != (self._epoch, self._drawn):
            self.begin(place.epoch)
            while self._drawn < place.position:
                self._draw()
        starts = np.array([self._draw() for _ in range(self.rows)], np.int64)
        return starts, replace(place, position=self._drawn)

    def begin(self, epoch: int) -> None:
        self._epoch, self._drawn = epoch, 0
        self._generator = np.random.Generator(np.random.PCG64([self.seed, epoch] if epoch else self.seed))
        self.refill()

    def refill(self) -> None:
        """Draw every shard's windows again."""
        self.left = [self._shard(size) for size in self.sizes]
        self._remaining = np.array([len(starts) for starts in self.left], np.float64)

    def _shard(self, size: int) -> list[int]:
        """Starts of a shard's windows; they are used from the end."""
        most = min(self.row_tokens - 1, max(0, size - self.row_tokens - 1))
        phase = int(self._generator.integers(most + 1)) if most > 0 else 0
        order = self._generator.permutation(max((size - 1 - phase) // self.row_tokens, 0))
        return list((phase + order * self.row_tokens).tolist())

    def _draw(self) -> int:
        total = self._remaining.sum()
        if total <= 0:
            self.refill()
            total = self._remaining.sum()
        cumulative = (self._remaining / total).cumsum()
        shard = int((cumulative / cumulative[-1]).searchsorted(self._generator.random(), side="right"))
        self._remaining[shard] -= 1
        self._drawn += 1
        return int(self.offsets[shard]) + self.left[shard].pop()


@dataclass(frozen=True)
class Piece:
    """Tokens start .. end - 1 of the stream, read from front to back."""

    start: int
    end: int


class Packed:
    """Long rows that run over whole documents in their order.

    A shard is entered at a document; what is left at its end is dropped when it is less than `group` rows. The seed
    decides in every epoch the order of the shards and the document at which each is entered first.
    """

    def __init__(
        self, shards: Sequence[np.ndarray], row_tokens: int, rows: int, seed: int | None, group: int = 1
    ) -> None:
        """`rows` a batch. seed None: shards in order, each from its first document, as the published loader; `group`
        rows (one for each of its ranks) are taken at once."""
        self.rows, self.row_tokens = rows, row_tokens
        self._shards, self._seed, self._group = list(shards), seed, group
        self._offsets = np.cumsum([0, *map(len, shards)])[:-1]
        self._least = group * (self.row_tokens + 1)
        self._first = [_next_bos(shard, 0) for shard in shards]
        self._known: tuple[int, list[Piece]] | None = None
        if not any(len(s) - f >= self._least for s, f in zip(self._shards, self._first, strict=True)):
            raise GolfError(
                f"data.order=packed has rows of {self.row_tokens} tokens (an eighth of train.batch_tokens), and no "
                "shard holds one; use a smaller batch or data.order=shuffled"
            )

    def take(self, place: Place) -> tuple[np.ndarray, Place]:
        starts: list[int] = []
        epoch, part, position = place.epoch, place.part, place.position
        while len(starts) < self.rows:
            pieces = self._pieces(epoch)
            piece = pieces[part]
            if piece.start + position + self._least <= piece.end:
                starts += [piece.start + position + i * (self.row_tokens + 1) for i in range(self._group)]
                position += self._least
            else:
                position, part = 0, part + 1
                epoch, part = (epoch, part) if part < len(pieces) else (epoch + 1, 0)
        return np.array(starts, np.int64), replace(place, epoch=epoch, part=part, position=position)

    def moved(self, place: Place, before: Place) -> Place:
        """Where rows of another length leave an epoch fewer pieces than were read already, the next epoch begins."""
        left = place.part < len(self._pieces(place.epoch))
        return place if left else replace(place, epoch=place.epoch + 1, part=0, position=0)

    def _pieces(self, epoch: int) -> list[Piece]:
        """What an epoch reads, in order."""
        if self._known is None or self._known[0] != epoch:
            self._known = epoch, self._draw(epoch)
        return self._known[1]

    def _draw(self, epoch: int) -> list[Piece]:
        places = list(zip(self._offsets.tolist(), self._shards, self._first, strict=True))
        if self._seed is None:
            return [Piece(offset + first, offset + len(shard)) for offset, shard, first in places]
        generator = np.random.default_rng([self._seed, epoch, 0x7061636B])
        pieces = []
        for index in generator.permutation(len(places)):
            offset, shard, first = places[index]
            cut = _next_bos(shard, int(generator.integers(len(shard))))
            cut = first if cut >= len(shard) else cut
            pieces += [Piece(offset + cut, offset + len(shard)), Piece(offset + first, offset + cut)]
        whole = any(p.start + self._least <= p.end for p in pieces)
        # A cut in the middle of the only shard may leave no row on either side.
        return pieces if whole else [Piece(offset + first, offset + len(shard)) for offset, shard, first in places]


def _next_bos(shard: np.ndarray, at: int, chunk: int = 1 << 16) -> int:
    """Where the first document from `at` on begins; the shard's length if there is none."""
    for low in range(at, len(shard), chunk):
        found = np.flatnonzero(shard[low : low + chunk] == BOS_ID)
        if len(found):
            return low + int(found[0])
    return len(shard)


ORDERS = ("shuffled", "sequential", "coprime", "shuffled_shards", "packed")


def make_order(name: str, shards: Sequence[np.ndarray], seq_len: int, batch_tokens: int, seed: int) -> Order:
    """The order called `name`; GolfError if there is none or the data is too small for it."""
    windows: dict[str, Callable[..., Order]] = {
        "shuffled": Shuffled,
        "sequential": Sequential,
        "coprime": Coprime,
        "shuffled_shards": ShuffledShards,
    }
    if name == "packed":
        rows = math.gcd(REFERENCE_SPANS, batch_tokens // seq_len)
        return Packed(shards, batch_tokens // rows, rows, seed)
    if name not in windows:
        raise GolfError(f"unknown data.order '{name}'; known: {', '.join(ORDERS)}")
    return windows[name]([len(shard) for shard in shards], seq_len, batch_tokens, seed)


def dealt(order: Order, rows: int, rank: int, world: int) -> np.ndarray:
    """Which rows of a global batch a rank gets: in turn, of `sequential` span by span, int64."""
    spans = order.spans if isinstance(order, Sequential) else rows
    return np.arange(rows, dtype=np.int64).reshape(spans, -1)[rank::world].reshape(-1)
