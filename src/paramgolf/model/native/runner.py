"""The GPT's layers and loss by the fused CPU kernels: the same model as block.py, fewer passes over memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from paramgolf.model.native import build
from paramgolf.model.native.functions import FusedAttention, Mix, NativeLoss, Squared, native_nll

if TYPE_CHECKING:
    from paramgolf.model.block import Block
    from paramgolf.model.gpt import GPT

SLOPES = {"relu2": 0.0, "leaky_relu2": 0.5}
Term = tuple[Tensor, Tensor | None]


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
    layers = model.rope_dims != model.head_dim or s.ln_scale or s.skip_gates or s.lanes_from >= 0
    if layers or s.parallel_from >= 0 or s.document_mask or s.embed_dim:
        return "there is no kernel for a switch of the layers"
    if any(block.attn.layer_parts for block in model.layers):
        return "a model part changes the layers"
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

    def layers(self, x0: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """(B, T, D) final normalised stream from the embedding `x0` of the same shape."""
        model = self.model
        terms: list[Term] = []  # their sum is the stream
        stack: list[Tensor] = []
        layers = model.layers
        for position, index in enumerate(model.order.layers):
            join = position - model.order.encoder
            if join >= 0 and stack:
                assert model.skip_weights is not None
                terms.append((stack.pop(), model.skip_weights[join]))
            terms = self._block(layers[index], terms, x0, rope)
            if position < model.order.encoder and model.skip_weights is not None:
                stack.append(Mix.apply(self.eps, "x", *_flat(terms)))
                terms = [(stack[-1], None)]
        return Mix.apply(self.eps, "n", *_flat(terms))

    def _block(self, block: Block, terms: list[Term], x0: Tensor, rope: tuple[Tensor, Tensor]) -> list[Term]:
        attn, (keep, fresh) = block.attn, block.resid_mix.unbind(0)
        if terms:
            mixed: list[Term] = [(t, keep if c is None else keep * c) for t, c in terms]
            mixed.append((x0, fresh))
        else:
            mixed = [(x0, keep + fresh)]
        x, n = Mix.apply(self.eps, "xn", *_flat(mixed))
        weights = [linear.effective_weight() for linear in (attn.c_q, attn.c_k, attn.c_v)]
        qkv = F.linear(n, torch.cat(weights).to(n.dtype))
        y = attn.proj(FusedAttention.apply(qkv, *rope, attn.q_gain, attn.num_kv_heads, self.eps))
        x, n = Mix.apply(self.eps, "xn", x, None, y, block.attn_scale)
        y = block.mlp.proj(Squared.apply(block.mlp.fc(n), self.slope))
        return [(x, None), (y, block.mlp_scale)]

    def total_loss(self, h_ND: Tensor, w_VD: Tensor, targets_N: Tensor) -> Tensor:
        return NativeLoss.apply(h_ND, w_VD.to(h_ND.dtype), targets_N.contiguous(), self.model.section.logit_softcap)

    def nll(self, h_ND: Tensor, w_VD: Tensor, targets_N: Tensor) -> Tensor:
        with torch.no_grad():
            return native_nll(h_ND, w_VD.to(h_ND.dtype), targets_N.contiguous(), self.model.section.logit_softcap)


def _flat(terms: list[Term]) -> list[Tensor | None]:
    return [part for term in terms for part in term]
