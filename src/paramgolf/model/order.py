"""In which order the layers run: once each, or some of them again with the same weights (depth recurrence).

Origin: #1285 to #1855. With loops the executed list is [0 .. first - 1], then [first .. last] 1 + extra times, then
[last + 1 .. L - 1]. Its first half, rounded down, are the encoder layers, whose outputs feed the skips. Skip weights
belong to positions of the list, not to pairs of layers: with fewer repetitions the first rows are used.
Cost: the time of the repeated layers, and one skip row more for two executions. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass

from paramgolf.errors import GolfError
from paramgolf.recipe.sections import ModelSection


@dataclass(frozen=True)
class Order:
    """`layers`: indices in executed order, the first `encoder` of them feed skips."""

    layers: tuple[int, ...]
    encoder: int

    @property
    def skips(self) -> int:
        """How many skips there are to add back."""
        return min(self.encoder, len(self.layers) - self.encoder)

    def lanes_at(self, first: int) -> int:
        """Where two lanes begin: the first execution of a layer >= `first` that feeds no skip; the end if none does."""
        begin = self.encoder if self.skips else 0
        return next((at for at in range(begin, len(self.layers)) if self.layers[at] >= first), len(self.layers))


def order_of(section: ModelSection, extra: int) -> Order:
    """The order with the looped layers run `extra` more times."""
    layers = list(range(section.num_layers))
    if section.loop_layers and extra:
        first, last = section.loop_layers
        layers = layers[:first] + (extra + 1) * layers[first : last + 1] + layers[last + 1 :]
    return Order(tuple(layers), len(layers) // 2 if section.skips == "unet" else len(layers))


def check_section(section: ModelSection) -> None:
    """GolfError for sizes that do not fit together."""
    s = section
    if s.dim % s.num_heads:
        raise GolfError(f"model.dim={s.dim} is not a multiple of model.num_heads={s.num_heads}; change one of them")
    if s.num_heads % s.num_kv_heads:
        raise GolfError(
            f"model.num_heads={s.num_heads} is no multiple of model.num_kv_heads={s.num_kv_heads}; change one of them"
        )
    if (s.dim // s.num_heads) % 2:
        raise GolfError(
            f"model.dim={s.dim} over model.num_heads={s.num_heads} gives heads of {s.dim // s.num_heads} channels; "
            "rotary embedding needs an even number"
        )
    if s.rope_dims % 2 or s.rope_dims > s.dim // s.num_heads:
        raise GolfError(
            f"model.rope_dims={s.rope_dims} must be even and at most the {s.dim // s.num_heads} channels of a head"
        )
    _check_loop(s)
    _check_residuals(s)


def _check_loop(s: ModelSection) -> None:
    if bool(s.loop_layers) != bool(s.loop_extra):
        raise GolfError(
            f"model.loop_layers={list(s.loop_layers)} and model.loop_extra={s.loop_extra} need each other; set both"
        )
    inside = len(s.loop_layers) == 2 and 0 <= s.loop_layers[0] <= s.loop_layers[1] < s.num_layers
    if s.loop_layers and not inside:
        raise GolfError(
            f"model.loop_layers={list(s.loop_layers)} is no range [first, last] of layers 0 to {s.num_layers - 1}; "
            "change it, or [] for no loop"
        )


def _check_residuals(s: ModelSection) -> None:
    if s.parallel_from >= s.num_layers:
        raise GolfError(
            f"model.parallel_from={s.parallel_from} is after the last layer {s.num_layers - 1}; lower it (-1 = none)"
        )
    if s.parallel_from >= 0 and s.lanes_from >= 0:
        raise GolfError("model.parallel_from and model.lanes_from are two kinds of one thing; set one of them to -1")
    if s.lanes_from >= s.num_layers:
        raise GolfError(
            f"model.lanes_from={s.lanes_from} is after the last layer {s.num_layers - 1}; lower it (-1 = no lanes)"
        )
    for order in (order_of(s, extra) for extra in range(s.loop_extra + 1)):
        if s.lanes_from > min(order.layers[order.lanes_at(s.lanes_from) :]):
            raise GolfError(
                f"model.lanes_from={s.lanes_from}: in the loop {list(s.loop_layers)} a layer before it, which has one "
                f"stream, would follow layers of two lanes; set {s.loop_layers[0]} or less, or -1 for no lanes"
            )
