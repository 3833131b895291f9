"""Choosing a shape, and grids that fill the cap, for a budget of bytes and seconds: a search over a grid of shapes.

Every shape of GRID is judged by a closed form of its size first; then, best first, by the forecast of its real file,
until no other can be better. So the choice is the best of the grid by the rule, and within the cap by the forecast.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from paramgolf.errors import GolfError
from paramgolf.lab.sizing import HEAD, Rates, Rule, Shape, Shapes, kv_heads
from paramgolf.pack.forecast import OVER_ENTROPY, gaussian_bits, plan_bytes
from paramgolf.quant.plan import Store, plan
from paramgolf.recipe.sections import GridSection, Recipe
from paramgolf.runner.plan import TOKENIZER_BYTES_A_PIECE
from paramgolf.runner.reserve import packing_seconds

VOCABULARIES = tuple(2**k for k in range(9, 15))
LAYERS = tuple(range(2, 13))
DIMS = tuple(range(HEAD, 1024 + 1, HEAD))
MLP_RATIOS = (1.5, 2.0, 2.5, 3.0, 4.0)
SEQ_LENS = (128, 256, 512, 1024)
BATCHES = tuple(2**k for k in range(11, 17))
# Steps of all grids over pocket's, from the finest to the coarsest that is tried.
COARSENESS = tuple(2.0 ** (k / 24) for k in range(-48, 25))
AIM = 0.975  # of the cap, for the forecast: it is good to within some percent
_SLACK = 1.03  # by which the closed form may be wrong
LEAST_STEPS = 20
_BYTES_A_PIECE = 64  # a text of fewer bytes for each piece of a vocabulary cannot teach it
_LEAST_K = 7.5  # row deviations at which codes end at the least
_MOST_BITS = 8
KNOBS = Shape._fields


@dataclass(frozen=True)
class Budget:
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Text:
    """The training text. `vocab` and `token_bytes`: of its tokenizer where it comes with one, else 0."""

    bytes: int
    vocab: int = 0
    token_bytes: float = 0.0


@dataclass(frozen=True)
class Candidate:
    """A shape with everything that is expected of it."""

    shape: Shape
    coarseness: float
    loss: float
    bytes: int
    weights: int
    steps: int
    tokens: int
    step_seconds: float

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"shape": self.shape._asdict()}


@dataclass(frozen=True)
class Choice:
    """The best candidate, with the parts of its loss, and the best ones with one knob set otherwise."""

    best: Candidate
    recipe: Recipe
    terms: dict[str, float]
    alternatives: list[tuple[str, Candidate]] = field(default_factory=list)
    considered: int = 0


# -- a shape as a recipe ---------------------------------------------------------------------------------------------


def coarser(grid: GridSection, times: float) -> GridSection:
    """`grid` with steps `times` as large, and enough bits for its codes to reach as far as they should."""
    step = times * grid.clip_value / (2 ** (grid.bits - 1) - 1)
    enough = (bits for bits in range(grid.bits, _MOST_BITS) if step * (2 ** (bits - 1) - 1) >= _LEAST_K)
    bits = next(enough, _MOST_BITS)
    return dataclasses.replace(grid, bits=bits, clip_value=float(f"{step * (2 ** (bits - 1) - 1):.4g}"))


def shaped(base: Recipe, shape: Shape, coarseness: float, steps: int) -> Recipe:
    """`base` in another shape and on other grids, with what depends on batch and number of steps (docs/fit.md)."""
    heads = shape.dim // HEAD
    # The noise of a batch's gradient falls with the root of its size, and the best rate rises with it.
    faster = math.sqrt(shape.batch / base.train.batch_tokens)
    matrix_lr, scalar_lr, embed_lr = (
        float(f"{faster * rate:.3g}") for rate in (base.optim.matrix_lr, base.optim.scalar_lr, base.optim.embed_lr)
    )
    window = max(5.0, steps / 16)  # steps that the average looks back on
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, vocab_size=shape.vocab),
        model=dataclasses.replace(
            base.model, dim=shape.dim, num_layers=shape.layers, num_heads=heads, num_kv_heads=kv_heads(heads),
            mlp_hidden=shape.hidden,
        ),
        optim=dataclasses.replace(base.optim, matrix_lr=matrix_lr, scalar_lr=scalar_lr, embed_lr=embed_lr),
        schedule=dataclasses.replace(base.schedule, momentum_warmup_steps=min(300, max(10, steps // 8))),
        train=dataclasses.replace(base.train, batch_tokens=shape.batch, seq_len=shape.seq_len),
        average=dataclasses.replace(base.average, decay=round(1.0 - 1.0 / window, 4)),
        quant=dataclasses.replace(
            base.quant,
            grids={name: coarser(grid, coarseness) for name, grid in base.quant.grids.items()},
            # What is small enough to stay in floating point must not hold the matrices of a narrow model.
            rules=tuple(
                dataclasses.replace(rule, max_size=min(rule.max_size, shape.dim**2 // 2)) for rule in base.quant.rules
            ),
        ),
    )  # fmt: skip


def file_bytes(recipe: Recipe) -> int:
    """Expected bytes of the file of a recipe whose tokenizer is trained on its text."""
    vocab = recipe.data.vocab_size
    return plan_bytes(recipe, vocab, tokenizer_bytes=round(TOKENIZER_BYTES_A_PIECE * vocab)).typical_bytes


# -- the search ------------------------------------------------------------------------------------------------------


class Search:
    """All shapes of the grid under one budget; `choose` is the door."""

    def __init__(self, base: Recipe, rule: Rule, rates: Rates, budget: Budget, text: Text) -> None:
        self.base = dataclasses.replace(
            base, budget=dataclasses.replace(base.budget, bytes=budget.bytes, seconds=budget.seconds)
        )
        self.rule, self.rates, self.budget, self.text = rule, rates, budget, text
        self.device = torch.device(rates.device)
        self.reserve = self._reserve()
        self._exact: dict[int, Candidate | None] = {}
        self.models = np.array(list(self._models()), dtype=np.int64)
        ways = [(seq, batch) for seq in SEQ_LENS for batch in BATCHES if batch == BATCHES[0] or batch <= self._half()]
        self.ways = np.array(ways, dtype=np.int64)
        columns = [*self.models.T[:, :, None], *self.ways.T[:, None, :]]  # (models, 1) and (1, ways)
        self.shapes = Shapes(*columns)
        self.coarseness = self._coarseness()
        self.loss = self._loss(self.shapes, self.coarseness[:, None])
        self.bound = self.loss.min(axis=1)

    def _models(self) -> Iterator[tuple[int, int, int, int]]:
        known = [self.text.vocab] if self.text.vocab else VOCABULARIES
        enough = [v for v in known if v * _BYTES_A_PIECE <= self.text.bytes] or [known[0]]
        for vocab in enough:
            for layers in LAYERS:
                for dim in DIMS:
                    for ratio in MLP_RATIOS:
                        yield vocab, layers, dim, round(ratio * dim)

    def _half(self) -> float:
        """Tokens of half of the text."""
        return self.text.bytes / 2 / float(np.min(self._token_bytes(np.array([VOCABULARIES[0]]))))

    def _token_bytes(self, vocab: np.ndarray) -> np.ndarray:
        return np.full(vocab.shape, self.text.token_bytes) if self.text.token_bytes else self.rule.token_bytes(vocab)

    def _coarseness(self) -> np.ndarray:
        """The finest grids with which each model may fit the cap, by the closed form; inf where none do."""
        sizes = model_bytes(self.base, self.models)  # (models, COARSENESS)
        fits = sizes <= AIM * _SLACK * self.budget.bytes
        found = np.array(COARSENESS)[np.argmax(fits, axis=1)]
        return np.where(fits.any(axis=1), found, np.inf)

    def _reserve(self) -> tuple[float, float]:
        """Seconds that packing takes, and more for each weight: a straight line through two sizes."""
        points = []
        for shape in (Shape(VOCABULARIES[0], 2, HEAD, HEAD, 128, 2048), Shape(4096, 4, 4 * HEAD, 8 * HEAD, 128, 2048)):
            recipe = shaped(self.base, shape, 1.0, LEAST_STEPS)
            weights = plan_bytes(recipe, shape.vocab).params
            points.append((weights, packing_seconds(recipe, shape.vocab, self.device)))
        (few, least), (many, most) = points
        slope = (most - least) / (many - few)
        return least - slope * few, slope

    def window(self, weights: np.ndarray) -> np.ndarray:
        """Seconds for steps of models with so many weights."""
        fixed, a_weight = self.reserve
        return self.budget.seconds - self.rates.before - fixed - a_weight * weights

    def _steps(self, shapes: Shapes) -> np.ndarray:
        """Whole steps in the time there is; one more, that warms up, comes before them."""
        seconds = self.rates.step_seconds(shapes)
        warmup = min(1, self.base.schedule.warmup_steps)
        window = self.window(shapes.block_weights + shapes.vocab_weights)
        return np.maximum(0, np.floor(window / seconds) - warmup)

    def _loss(self, shapes: Shapes, coarseness: np.ndarray | float) -> np.ndarray:
        steps = self._steps(shapes)
        text = steps * shapes.batch * self._token_bytes(np.asarray(shapes.vocab))
        with np.errstate(over="ignore"):
            loss = self.rule.loss(shapes, text, coarseness, unique_bytes=self.text.bytes)
        return np.where(steps >= LEAST_STEPS, loss, np.inf)

    def exact(self, model: int) -> Candidate | None:
        """The best way to train a model on the finest grids that its forecast has room for; None if there is none."""
        if model not in self._exact:
            self._exact[model] = self._find(model)
        return self._exact[model]

    def _find(self, model: int) -> Candidate | None:
        shape = self.shape(model)
        found = self._finest(shape)
        if found is None:
            return None
        coarseness, size = found
        ways = Shapes(*self.models[model][:, None], *self.ways.T)
        loss = self._loss(ways, coarseness)
        best = int(np.argmin(loss))
        if not np.isfinite(loss[best]):
            return None
        return self.candidate(
            shape._replace(seq_len=int(self.ways[best, 0]), batch=int(self.ways[best, 1])), coarseness, size
        )

    def shape(self, model: int) -> Shape:
        """A model in its shortest rows and smallest batch."""
        vocab, layers, dim, hidden = map(int, self.models[model])
        return Shape(vocab, layers, dim, hidden, SEQ_LENS[0], BATCHES[0])

    def _finest(self, shape: Shape) -> tuple[float, int] | None:
        """(coarseness, bytes) of the finest grids whose forecast lies within the aim."""
        room, low, high = AIM * self.budget.bytes, 0, len(COARSENESS) - 1
        sizes: dict[int, int] = {}

        def size(at: int) -> int:
            sizes[at] = file_bytes(shaped(self.base, shape, COARSENESS[at], LEAST_STEPS))
            return sizes[at]

        if size(high) > room:
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if size(middle) <= room else (middle + 1, high)
        return COARSENESS[high], sizes[high]

    def candidate(self, shape: Shape, coarseness: float, size: int) -> Candidate:
        """What is expected of a shape on these grids."""
        one = Shapes.of([shape])
        steps = int(self._steps(one)[0])
        return Candidate(
            shape, coarseness, float(self._loss(one, coarseness)[0]), size,
            int((one.block_weights + one.vocab_weights)[0]), steps, steps * shape.batch,
            float(self.rates.step_seconds(one)[0]),
        )  # fmt: skip

    def best_of(self, models: np.ndarray) -> Candidate | None:
        """The best candidate among these models (indices)."""
        best: Candidate | None = None
        for model in models[np.argsort(self.bound[models], kind="stable")]:
            if not np.isfinite(self.bound[model]) or (best is not None and self.bound[model] >= best.loss):
                break
            found = self.exact(int(model))
            if found is not None and (best is None or found.loss < best.loss):
                best = found
        return best

    def alternatives(self, best: Candidate) -> list[tuple[str, Candidate]]:
        """For every knob its next smaller and larger value, with the best of the others."""
        out = []
        for column, knob in enumerate(KNOBS):
            values = self.ways[:, column - 4] if column >= 4 else self.models[self._like(knob, best), column]
            values, own = np.unique(values), best.shape[column]
            for value in (*values[values < own][-1:], *values[values > own][:1]):
                found = self._with(knob, int(value), best)
                if found is not None:
                    out.append((knob, found))
        return out

    def _like(self, knob: str, best: Candidate) -> np.ndarray:
        """Which models a knob may lead to: any, but the MLP's only those like the chosen one in the rest."""
        same = np.all(self.models[:, :3] == np.array(best.shape[:3]), axis=1)
        return same if knob == "hidden" else np.ones(len(same), bool)

    def _with(self, knob: str, value: int, best: Candidate) -> Candidate | None:
        """The best with this value; the MLP's and how it is trained with the model as chosen."""
        if knob in ("seq_len", "batch"):
            shape = best.shape._replace(**{knob: value})
            found = self.candidate(shape, best.coarseness, best.bytes)
            return found if math.isfinite(found.loss) else None
        chosen = self._like(knob, best) & (self.models[:, KNOBS.index(knob)] == value)
        return self.best_of(np.flatnonzero(chosen))


def model_bytes(base: Recipe, models: np.ndarray) -> np.ndarray:
    """Bytes of files, float64 (models, len(COARSENESS)), in closed form: about what the forecast says.

    Args:
        models: vocabulary, layers, dim, hidden (models, 4).
    """
    vocab, layers, dim, hidden = models.T.astype(np.float64)
    kv = HEAD * np.vectorize(kv_heads)(models[:, 2] // HEAD).astype(np.float64)
    parts = {
        "tok_emb.weight": vocab * dim,
        "blocks.0.attn.c_q.weight": layers * dim * dim,
        "blocks.0.attn.c_k.weight": layers * kv * dim,
        "blocks.0.attn.c_v.weight": layers * kv * dim,
        "blocks.0.attn.proj.weight": layers * dim * dim,
        "blocks.0.mlp.fc.weight": layers * dim * hidden,
        "blocks.0.mlp.proj.weight": layers * dim * hidden,
    }
    stores = plan(dict.fromkeys(parts, (1024, 1024)), base.quant, 1)
    over = OVER_ENTROPY.get(base.pack.codec, 1.0) / 8
    codes = np.zeros((len(models), len(COARSENESS)))
    for name, weights in parts.items():
        codes += weights[:, None] * np.array([_bits(stores[name], times) for times in COARSENESS]) * over
    rows = vocab + layers * (3 * dim + 2 * kv + hidden)
    controls = layers * (4.5 * dim + dim / HEAD)
    rest = 1.5 * rows + 1.7 * controls + TOKENIZER_BYTES_A_PIECE * vocab + 250
    return codes + rest[:, None]


def _bits(store: Store, times: float) -> float:
    """Bits a weight on the store's grid with steps so many times as large; Gaussian rows."""
    if store.grid is None:
        return 16.0
    return gaussian_bits(coarser(store.grid, times), 1024)


def choose(base: Recipe, rule: Rule, rates: Rates, budget: Budget, text: Text) -> Choice:
    """The best shape for a budget, by the rule; the same for the same arguments.

    Raises GolfError where nothing fits the bytes, or nothing can be trained in the seconds.
    """
    search = Search(base, rule, rates, budget, text)
    best = search.best_of(np.arange(len(search.models)))
    if best is None:
        raise GolfError(_why_nothing(search))
    recipe = dataclasses.replace(shaped(search.base, best.shape, best.coarseness, best.steps), extends=base.name)
    token_bytes = search._token_bytes(np.array([best.shape.vocab]))
    terms = rule.terms(Shapes.of([best.shape]), best.tokens * token_bytes, best.coarseness, unique_bytes=text.bytes)
    return Choice(
        best, recipe, {name: float(np.ravel(part)[0]) for name, part in terms.items()}, search.alternatives(best),
        search.loss.size,
    )  # fmt: skip


def _why_nothing(search: Search) -> str:
    """Which of the budgets is too small, and what would do."""
    budget = search.budget
    smallest = int(np.argmin(model_bytes(search.base, search.models)[:, -1]))
    shape = search.shape(smallest)
    least = file_bytes(shaped(search.base, shape, COARSENESS[-1], LEAST_STEPS))
    if least > AIM * budget.bytes:
        enough = math.ceil(least / AIM)
        return f"--bytes {budget.bytes}: the smallest model is expected to take {least:,} bytes; give at least {enough}"
    ways = Shapes(*search.models[smallest][:, None], *search.ways.T)
    steps = (LEAST_STEPS + 2) * float(search.rates.step_seconds(ways).min())
    beside = budget.seconds - float(search.window(np.array(shape.dim * shape.vocab)))
    return (
        f"--seconds {budget.seconds:g}: a run needs about {beside:.0f} s here beside its training; give at least "
        f"{math.ceil(beside + 2 * steps)}"
    )
