"""One accumulated forward and backward over all ranks, and what the ranks agree on while they exchange gradients.

Gradients of micro batches are weighted by their tokens, so uneven rows (on one rank or over ranks) give the gradient
of the mean over all tokens. With several ranks everything travels together (see exchange.py): the gradients, and a
tail of loss, tokens, "I failed" and "I was interrupted". So all ranks see the same numbers, stop at the same step, and
a failure of one is known to all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from paramgolf.dist import Dist
from paramgolf.errors import GolfError
from paramgolf.model.gpt import GPT
from paramgolf.optim.muon import Muon
from paramgolf.train.compiling import failure_reason
from paramgolf.train.exchange import Exchange

_MESSAGE_BYTES = 400


class TokenSource(Protocol):
    """What the loop needs of a loader (see data/loader.py)."""

    def next_batch(self) -> tuple[Tensor, Tensor]: ...

    def set_shape(self, seq_len: int, batch_tokens: int) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class StepReport:
    """What all ranks know after a step: mean loss in nats per token, tokens, whether any rank was interrupted."""

    loss: float
    tokens: int
    interrupted: bool


def micro_sizes(rows: int, most: int) -> list[int]:
    """`rows` in few parts of at most `most`: all of one size where that costs less than half as many parts again, else
    of two sizes, larger first (each size is a compiled shape of its own)."""
    if rows == 0:
        return []
    fewest = -(-rows // max(1, most))
    parts = next((n for n in range(fewest, fewest + fewest // 2 + 1) if rows % n == 0), fewest)
    base, extra = divmod(rows, parts)
    return [base + 1] * extra + [base] * (parts - extra)


class Stepper:
    """Forward, backward and the gradient exchange. `micro_tokens`: the most tokens of one forward on one rank (a row
    at least). `packed`: rows run over many documents, which the model cuts at the training length."""

    def __init__(self, model: nn.Module, dist: Dist, micro_tokens: int, packed: bool = False) -> None:
        self.model = model
        self.dist = dist
        self.micro_tokens = micro_tokens
        self.packed = packed
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._exchange = Exchange(self._parameters, dist)
        self._tail: Tensor | None = None
        self._error: BaseException | None = None

    def enter(self, seq_len: int) -> None:
        """The batches that follow train a context of `seq_len` tokens."""
        if self.packed and isinstance(self.model, GPT):
            self.model.segment_len = seq_len

    def scatter_to(self, matrix: Muon | None) -> None:
        """From now on the gradients of these weights go to their owners only; None = all go to all ranks again."""
        self._exchange = Exchange(self._parameters, self.dist, matrix)

    def sizes(self, rows: int, seq_len: int) -> list[int]:
        """Rows of each micro batch for `rows` rows of `seq_len` tokens on this rank."""
        return micro_sizes(rows, self.micro_tokens // seq_len)

    def backward(self, x: Tensor, y: Tensor, expected_tokens: int) -> Tensor:
        """Accumulate the gradients of this rank's rows, scaled so that ranks add up to the mean over all tokens.

        Args:
            x, y: (rows, T) int64 inputs and targets of this rank; may have no rows.
            expected_tokens: tokens of the step over all ranks.

        Returns:
            The summed loss of these rows in nats, fp32 scalar on the device.
        """
        total = torch.zeros((), device=self.dist.device)
        host = x
        # One copy a step: on CUDA each copy from ordinary memory first waits for everything that was launched.
        x, y = x.to(self.dist.device), y.to(self.dist.device)
        start = 0
        for size in self.sizes(x.shape[0], x.shape[1]):
            rows = slice(start, start + size)
            start += size
            if isinstance(self.model, GPT):
                self.model.expect_documents(host[rows])
            loss = self.model(x[rows], y[rows])
            tokens = size * x.shape[1]
            (loss if tokens == expected_tokens else loss * (tokens / expected_tokens)).backward()
            total += loss.detach().float() * tokens
        return total

    def accumulate(
        self, batch: Callable[[], tuple[Tensor, Tensor]], expected_tokens: int, interrupted: bool = False
    ) -> None:
        """Get this rank's rows, go forward and backward, and exchange. Follow with the optimizer step and `report`.

        A failure here is only remembered until `report`, so that every rank takes part in every collective.
        """
        total, tokens = torch.zeros((), device=self.dist.device), 0
        try:
            x, y = batch()
            tokens = x.numel()
            total = self.backward(x, y, expected_tokens)
        except Exception as error:
            if self.dist.world == 1:
                raise
            self._error = error
        own = [float(tokens), float(self._error is not None), float(interrupted)]
        tail = total.new_empty(1 + len(own))
        tail[0] = total
        for place, value in enumerate(own, start=1):
            tail[place].fill_(value)  # not torch.tensor(own): a copy to the GPU would wait for the backward pass
        self._tail = self._exchange(tail, expected_tokens) if self.dist.world > 1 else tail

    def report(self) -> StepReport:
        """What the ranks agreed on. Raises GolfError when any of them failed, with its message."""
        assert self._tail is not None, "accumulate comes first"
        total, tokens, failed, interrupted = self._tail.tolist()
        if failed:
            raise_together(self.dist, self._error)
        return StepReport(total / max(tokens, 1.0), int(tokens), interrupted > 0)


def raise_together(dist: Dist, error: BaseException | None) -> None:
    """A collective: if any rank has an error, every rank raises GolfError naming the rank and its message."""
    if dist.world == 1:
        if error is not None:
            raise error
        return
    slots = torch.zeros(dist.world, _MESSAGE_BYTES, dtype=torch.int32, device=dist.device)
    if error is not None:
        text = str(error) if isinstance(error, GolfError) else failure_reason(error)
        raw = text.encode()[:_MESSAGE_BYTES] or b"?"
        slots[dist.rank, : len(raw)] = torch.tensor(list(raw), dtype=torch.int32, device=dist.device)
    dist.all_reduce_sum(slots)
    for rank, row in enumerate(slots.tolist()):
        if row[0]:
            text = bytes(b for b in row if b).decode(errors="replace")
            failure = GolfError(f"rank {rank} failed: {text}")
            failure.shared = True
            if isinstance(error, GolfError):
                failure.exit_code = error.exit_code
            raise failure from error
