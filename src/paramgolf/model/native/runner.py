"""The GPT's layers and loss by the fused CPU kernels: the same model as block.py, fewer passes over memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paramgolf.model.documents import first_keys
from paramgolf.model.native import build
from paramgolf.model.native.functions import FusedAttention, Mix, NativeLoss, Squared, native_nll

if TYPE_CHECKING:
    from paramgolf.model.block import Block
    from paramgolf.model.gpt import GPT

SLOPES = {"relu2": 0.0, "leaky_relu2": 0.5}
Term = tuple[Tensor, Tensor | None]  # a stream and its factor a channel, None for 1
Terms = list[Term]
Branch = Callable[["Block", Tensor], Tensor]


def why_not(model: GPT, length: int) -> str:
    """Why `model` cannot run here on rows of `length` tokens; "" when it can."""
    s, vocab = model.section, model.vocab_size
    if model.tok_emb.weight.device.type != "cpu" or model.compute_dtype != torch.bfloat16:
        return "the kernels are for bfloat16 on a CPU"
    if model.head_dim % 16 or model.head_dim > 256 or s.dim % 16 or s.dim > 4096 or s.mlp_hidden % 16:
        return "widths must be multiples of 16, heads at most 256 and the model at most 4096 wide"
    if vocab % 16 or vocab > 8192 or not s.logit_softcap:
        return "the vocabulary must be a multiple of 16 up to 8192, and the logits softcapped"
    if length % 32:
        return "seq_len must be a multiple of 32"
    if s.activation not in SLOPES:
        return f"there is no kernel for the activation '{s.activation}'"
    return build.why_not()


class NativeRunner:
    """Runs `model` (checked by `why_not`). Weights, their gradients and fake quantisation are the model's own."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.eps = model.section.norm_eps
        self.slope = SLOPES[model.section.activation]

    def fits(self, x_BTD: Tensor) -> bool:
        """Whether this input can be run; the caller takes the plain way otherwise (an odd length, another type)."""
        return x_BTD.shape[1] % 32 == 0 and x_BTD.numel() > 0 and x_BTD.dtype == torch.bfloat16

    def layers(
        self, x0: Tensor, rope: tuple[Tensor, Tensor], extras: dict[str, Any], segments_BT: Tensor | None
    ) -> Tensor:
        """(B, T, D) final normalised stream from the embedding `x0` of the same shape; `extras` is what parts left for
        the layers, `segments_BT` numbers the documents to which attention is confined."""
        model, order, layers = self.model, self.model.order, self.model.layers
        first_BT = None if segments_BT is None else first_keys(segments_BT)

        def attention(block: Block, n: Tensor) -> Tensor:
            return self._attention(block, n, rope, extras, first_BT)

        stream: Terms = [(x0, None)]  # the sum of its terms
        second: Terms = []  # the other lane, once there are two
        stack: list[Tensor] = []
        for position, index in enumerate(order.layers):
            block, join = layers[index], position - order.encoder
            if model.lanes is not None and position == order.lanes_at(model.lanes.first):
                stream = [(self._sum(stream), None)]
                second = stream
            if join >= 0 and stack:
                stream = self._joined(stream, stack.pop(), join)
            if second:
                stream, second = self._two_lanes(index, stream, second, x0, attention)
            else:
                stream = self._block(block, stream, x0, attention)
            if position < order.encoder and model.skip_weights is not None:
                stack.append(self._sum(stream))
                stream = [(stack[-1], None)]
        return Mix.apply(self.eps, "n", *_flat(self._merged(stream, second) if second else stream))

    def _sum(self, terms: Terms) -> Tensor:
        return Mix.apply(self.eps, "x", *_flat(terms))

    def _joined(self, stream: Terms, skip: Tensor, join: int) -> Terms:
        """As GPT.join_skip."""
        model = self.model
        assert model.skip_weights is not None
        weight = model.skip_weights[join]
        if model.skip_gates is None:
            return [*stream, (skip, weight)]
        gate = torch.sigmoid(model.skip_gates[join])
        return [*_times(stream, gate), (skip, (1 - gate) * weight)]

    def _block(self, block: Block, stream: Terms, x0: Tensor, attention: Branch) -> Terms:
        """As Block.forward."""
        keep, fresh = block.resid_mix.unbind(0)
        if stream[0][0] is x0:
            mixed: Terms = [(x0, keep + fresh)]
        else:
            mixed = [*_times(stream, keep), (x0, fresh)]
        x, n = Mix.apply(self.eps, "xn", *_flat(mixed))
        attended: Term = (attention(block, n), block.attn_scale)
        if block.parallel:
            return [(x, None), attended, (self._mlp(block, n), block.mlp_scale)]
        x, n = Mix.apply(self.eps, "xn", x, None, *attended)
        return [(x, None), (self._mlp(block, n), block.mlp_scale)]

    def _two_lanes(
        self, index: int, stream: Terms, second: Terms, x0: Tensor, attention: Branch
    ) -> tuple[Terms, Terms]:
        """As Block.lanes."""
        lanes, block = self.model.lanes, self.model.layers[index]
        assert lanes is not None
        keep, fresh = block.resid_mix.unbind(0)
        resid, post, ones = lanes.resid[index], lanes.post[index], torch.ones_like(keep)
        a = self._sum(stream)
        b, n_b = Mix.apply(self.eps, "xn", *_flat(second))
        y = attention(block, Mix.apply(self.eps, "n", a, keep, x0, fresh))
        z = self._mlp(block, n_b)

        def after(i: int, lane: Tensor) -> Terms:
            return [(lane, resid[i] * ones), (y, post[i] * block.attn_scale), (z, post[2 + i] * block.mlp_scale)]

        return after(0, a), after(1, b)

    def _merged(self, stream: Terms, second: Terms) -> Terms:
        """As Lanes.merge."""
        lanes = self.model.lanes
        assert lanes is not None
        if lanes.merging != "mean":
            return stream if lanes.merging == "attn" else second
        half = torch.full((self.model.section.dim,), 0.5)
        return _times([*stream, *second], half)

    def _attention(
        self,
        block: Block,
        n: Tensor,
        rope: tuple[Tensor, Tensor],
        extras: dict[str, Any],
        first_BT: Tensor | None,
    ) -> Tensor:
        """As Attention.forward; `n` is not yet divided by the depth."""
        attn, n = block.attn, _shallower(block, n)
        weights = [linear.effective_weight() for linear in (attn.c_q, attn.c_k, attn.c_v)]
        qkv = F.linear(n, torch.cat(weights).to(n.dtype))
        if not attn.layer_parts:
            return attn.proj(FusedAttention.apply(qkv, *rope, attn.q_gain, first_BT, attn.num_kv_heads, self.eps))
        parts = [getattr(attn, name) for name in attn.layer_parts]
        q, k, v = qkv.unflatten(-1, (-1, attn.head_dim)).split(
            (attn.num_heads, attn.num_kv_heads, attn.num_kv_heads), 2
        )
        value = v
        for part in parts:
            value = part.value(value, n, extras)
        if value is not v:
            qkv = torch.cat((q, k, value), 2).flatten(2)
        y = FusedAttention.apply(qkv, *rope, attn.q_gain, first_BT, attn.num_kv_heads, self.eps)
        y = y.unflatten(-1, (-1, attn.head_dim))
        for part in parts:
            y = part.output(y, value, q, n, extras)
        return attn.proj(y.flatten(2))

    def _mlp(self, block: Block, n: Tensor) -> Tensor:
        return block.mlp.proj(Squared.apply(block.mlp.fc(_shallower(block, n)), self.slope))

    def total_loss(self, h_ND: Tensor, w_VD: Tensor, targets_N: Tensor) -> Tensor:
        return NativeLoss.apply(h_ND, w_VD.to(h_ND.dtype), targets_N.contiguous(), self.model.section.logit_softcap)

    def nll(self, h_ND: Tensor, w_VD: Tensor, targets_N: Tensor) -> Tensor:
        with torch.no_grad():
            return native_nll(h_ND, w_VD.to(h_ND.dtype), targets_N.contiguous(), self.model.section.logit_softcap)


def _flat(terms: Terms) -> list[Tensor | None]:
    return [part for term in terms for part in term]


def _times(terms: Terms, factor: Tensor) -> Terms:
    return [(t, factor if c is None else factor * c) for t, c in terms]


def _shallower(block: Block, n: Tensor) -> Tensor:
    return n if block.depth_scale is None else n * block.depth_scale
