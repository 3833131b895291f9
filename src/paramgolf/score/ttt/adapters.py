"""Low-rank adapters of the model's maps, a set of its own for every document of a batch.

    y <- y + scale (x A^T) B^T        A (R, in) random, B (out, R) zero at the start: no change

They sit on the queries, keys and values (before their norm), beside attention and beside the MLP (from the normed
branch input to the branch output, before the branch scale) and on the head (from the final normalised stream). A layer
that runs several times has a set for every run. They reach the model through module hooks: its one forward pass runs.
Origin: the LoRA-TTT record of 2026-03-17, #1530, #1767.

Suffixes: S documents, T time, R rank, I inputs, O outputs, V vocabulary, E width of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paramgolf.model.gpt import GPT
from paramgolf.model.loss import softcap
from paramgolf.recipe.sections import TttSection

KINDS = ("head", "q", "v", "k", "mlp", "o")
Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


class Adapters:
    """`slots` sets. `a[name]` (S, R, I) and `b[name]` (S, O, R), float32; names are "head" and "<kind>.<position>",
    the position counting executed layers."""

    def __init__(self, model: GPT, section: TttSection, slots: int) -> None:
        self.section, self.slots, self._model = section, slots, model
        self._scale = (section.alpha or section.rank) / section.rank
        self.sizes = {name: size for kind in KINDS if kind in section.adapt for name, size in self._of_kind(kind)}
        device, rank = model.tok_emb.weight.device, section.rank
        self.a = {n: torch.zeros(slots, rank, i, device=device) for n, (i, _) in self.sizes.items()}
        self.b = {n: torch.zeros(slots, o, rank, device=device) for n, (_, o) in self.sizes.items()}
        for tensor in self.tensors():
            tensor.requires_grad_()

    def _of_kind(self, kind: str) -> list[tuple[str, tuple[int, int]]]:
        """(name, (inputs, outputs)) of every adapter of one kind."""
        if kind == "head":
            vocabulary, width = self._model.head_weight().shape
            return [("head", (width, vocabulary))]
        section = self._model.section
        keys = self._model.head_dim * section.num_kv_heads
        outputs = keys if kind in ("k", "v") else section.dim
        return [(f"{kind}.{at}", (section.dim, outputs)) for at in range(len(self._model.order.layers))]

    def tensors(self) -> list[Tensor]:
        """All parameters, A before B for each name."""
        return [t for name in self.sizes for t in (self.a[name], self.b[name])]

    def begin(self, *, fresh: bool) -> None:
        """Start on other documents: B zero, the optimizer new, A drawn again if `fresh`."""
        with torch.no_grad():
            for name, drawn in (self.draw() if fresh else {}).items():
                self.a[name].copy_(drawn)
            for tensor in self.b.values():
                tensor.zero_()
        s = self.section
        self._optimizer = torch.optim.AdamW(
            self.tensors(), lr=s.lr, betas=(s.beta1, s.beta2), eps=s.eps, weight_decay=s.weight_decay
        )

    def draw(self) -> dict[str, Tensor]:
        """A for every name: uniform in +-1/sqrt(inputs), from the seed alone, the same for every document, so that no
        document's score depends on the batch it is in."""
        generator = torch.Generator().manual_seed(self.section.seed)
        drawn = {}
        for name, (inputs, _) in self.sizes.items():
            unit = torch.rand(self.section.rank, inputs, generator=generator)
            drawn[name] = (2 * unit - 1) * inputs**-0.5
        return drawn

    def step(self) -> None:
        """One update from the gradients that `backward` left; from zero where it left none."""
        for tensor in self.tensors():
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def hidden(self, ids_ST: Tensor, rows: Tensor) -> Tensor:
        """(S, T, E): the model's final stream for the documents in slots `rows`, each under its own adapters."""
        with self.attached(rows):
            return self._model.hidden(ids_ST)

    def logits(self, hidden_STE: Tensor, rows: Tensor) -> Tensor:
        """(S, T, V) float32 after the softcap."""
        z_STV = F.linear(hidden_STE, self._model.head_weight().to(hidden_STE.dtype))
        if "head" in self.sizes:
            z_STV = z_STV + self._low_rank("head", hidden_STE, rows)
        return softcap(z_STV.float(), self._model.section.logit_softcap)

    def _low_rank(self, name: str, x_STI: Tensor, rows: Tensor) -> Tensor:
        a_SRI, b_SOR = (t[name].index_select(0, rows).to(x_STI.dtype) for t in (self.a, self.b))
        return self._scale * torch.bmm(torch.bmm(x_STI, a_SRI.transpose(1, 2)), b_SOR.transpose(1, 2))

    @contextmanager
    def attached(self, rows: Tensor) -> Iterator[None]:
        """Inside, whole forward passes of the model run with these adapters."""
        handles = []
        for index, block in enumerate(self._model.layers):
            runs = [at for at, layer in enumerate(self._model.order.layers) if layer == index]
            modules: dict[str, nn.Module] = {
                "q": block.attn.c_q, "k": block.attn.c_k, "v": block.attn.c_v, "o": block.attn, "mlp": block.mlp,
            }  # fmt: skip
            for kind, module in modules.items():
                if kind in self.section.adapt and runs:
                    handles.append(module.register_forward_hook(self._hook(kind, runs, rows)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, kind: str, runs: list[int], rows: Tensor) -> Hook:
        """What adds an adapter of this kind to a module's output; `runs` are the positions at which its layer runs."""
        count = 0

        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            nonlocal count
            name = f"{kind}.{runs[count % len(runs)]}"
            count += 1
            return output + self._low_rank(name, inputs[0], rows)

        return add
