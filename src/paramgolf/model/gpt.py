"""The GPT: one readable decoder-only transformer, put together from what the recipe's `model` section names.

    embedding [+ parts] -> RMS norm [-> up map] [+ parts] = x0 -> blocks with U-Net skips, some of them repeated
    -> RMS norm [-> down map] -> head -> softcap

Suffixes: B batch, T time, D model width, E width of embedding and head (D unless model.embed_dim says otherwise),
H query heads, G key/value heads, K head width, V vocabulary, N = B x T.
Weights are float32 masters; matrix products run in `model.compute_dtype`, norms, rotation, logits, softcap and cross
entropy in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paramgolf.errors import GolfError
from paramgolf.model.attention import MASK, AttentionChoice, choose
from paramgolf.model.block import Block
from paramgolf.model.cache import KVCache
from paramgolf.model.documents import dense_mask, first_flags, room_for, segment_numbers
from paramgolf.model.init import init_matrices
from paramgolf.model.lanes import Lanes
from paramgolf.model.layers import Linear, rms_norm
from paramgolf.model.loss import FusedLoss, chunked_nll, nll_and_slope, softcap
from paramgolf.model.native.runner import NativeRunner
from paramgolf.model.native.runner import why_not as native_why_not
from paramgolf.model.order import Order, check_section, order_of
from paramgolf.model.parts.base import Flow, Part, read_config
from paramgolf.model.registry import ACTIVATIONS, PARTS
from paramgolf.model.rope import rope_tables, stretched_base
from paramgolf.quant.grid import Grid
from paramgolf.recipe.sections import ModelSection

Reduction = Literal["mean", "sum", "none"]
ROPE_TABLES_KEPT = 8


class GPT(nn.Module):
    """The model of a `ModelSection`. Matrices are zero until `init_weights` or a state dict fills them.

    Built under `torch.device("meta")` it costs nothing and still counts its parameters.
    """

    def __init__(self, section: ModelSection, vocab_size: int) -> None:
        super().__init__()
        check_section(section)
        self.section, self.vocab_size = section, vocab_size
        self.compute_dtype = torch.float32
        self.head_dim = section.dim // section.num_heads
        self.rope_dims = section.rope_dims or self.head_dim
        # Rotary tables are made for at least this many positions: it matters only where the base depends on the
        # length (rope_ref_len), to score a short window as the long ones that the model was trained on.
        self.context_len = 0
        self.segment_len = 0  # > 0: packed training rows, whose documents are cut after so many tokens
        self.segment_room = 0  # kernels for packed rows are made for so many segments a pass
        self._counted = False  # whether the next pass is known to fit in that
        width = section.embed_dim or section.dim
        self.tok_emb = nn.Embedding(vocab_size, width, _weight=torch.zeros(vocab_size, width))
        self.embed_proj = Linear(width, section.dim) if section.embed_dim else None
        self.head_proj = Linear(section.dim, width) if section.embed_dim else None
        activation = ACTIVATIONS[section.activation]
        self.blocks = nn.ModuleList(Block(section, activation, i) for i in range(section.num_layers))
        self.order: Order = order_of(section, section.loop_extra)
        skips = self.order.skips
        self.skip_weights = nn.Parameter(torch.ones(skips, section.dim)) if skips else None
        if section.skip_gates and not skips:
            raise GolfError("model.skip_gates=true needs skips to gate: set model.skips='unet' and at least 2 layers")
        self.skip_gates = nn.Parameter(torch.zeros(skips, section.dim)) if section.skip_gates else None
        self.lanes = Lanes(section) if section.lanes_from >= 0 else None
        self.lm_head = None if section.tie_embeddings else Linear(width, vocab_size)
        self.part_names = self._add_parts()
        self.attention: AttentionChoice | None = None
        self._attention_key: tuple[Any, ...] = ()
        self._rope: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
        self._compiled: dict[str, Callable[..., Any]] = {}  # what `compile_regions` has made
        self._native: NativeRunner | None = None

    def _add_parts(self) -> tuple[str, ...]:
        """Build the parts of the recipe and give each layer its share; their attribute names in order."""
        names = []
        for name, table in self.section.parts.items():
            kind = PARTS[name]
            for other in kind.excludes:
                if other in self.section.parts:
                    raise GolfError(f"model.parts.{name} and model.parts.{other} exclude each other; keep one of them")
            config = read_config(kind.Config, table, f"model.parts.{name}")
            part: Part = kind(config, self.section, self.vocab_size)
            self.add_module(kind.attribute, part)
            names.append(kind.attribute)
            for index, block in enumerate(self.layers):
                share = part.for_layer(index)
                if share is not None:
                    block.attn.add_module(kind.attribute, share)
                    block.attn.layer_parts += (kind.attribute,)
        return tuple(names)

    @property
    def layers(self) -> list[Block]:
        """The blocks in order."""
        return cast(list[Block], list(self.blocks))

    # -- set-up ------------------------------------------------------------------------------------------------

    def init_weights(self, seed: int) -> None:
        """Draw every matrix (see init.py); equal on every device and rank."""
        init_matrices(self, self.section, seed)

    def set_qat(self, grid: Grid | Mapping[str, Grid] | None) -> None:
        """Fake-quantise linear weights in training mode, or stop (None). Evaluation is never touched.

        One grid serves every linear weight; a mapping gives each weight (by its state name) its own, and those it does
        not name stay as they are. The switch is a guarded Python attribute: the compiled block has exactly two training
        graphs, with and without, each built at its first use, and switching back and forth later does not recompile.
        With a mapping there is one graph for each different set of grids that a layer uses.
        """
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                module.grid = grid.get(f"{name}.weight") if isinstance(grid, Mapping) else grid

    def set_loops(self, extra: int) -> None:
        """Run the looped layers `extra` more times from now on, at most `model.loop_extra`, which a new model does.

        Compiled blocks do not notice: the order of the layers is outside of their graphs.
        """
        self.order = order_of(self.section, min(extra, self.section.loop_extra))

    def use_attention(self, name: str = "auto", device: torch.device | str | None = None) -> AttentionChoice:
        """Choose the attention kernel for `device` (default: where the weights are) and the compute dtype.

        The choice is kept in `model.attention` with the reason for any fallback. Without a call it is "auto".
        """
        where = torch.device(device) if device is not None else self.tok_emb.weight.device
        self.attention = choose(name, where, self.compute_dtype, self.head_dim, self.section.document_mask)
        self._attention_key = (where.type, self.compute_dtype, name)
        for block in self.layers:
            block.attn.attend = self.attention.attend
        return self.attention

    def compile_regions(self, mode: str | None = None, backend: str = "inductor") -> None:
        """Compile the block and the loss chunk; the blocks share one graph, so the time does not grow with the layers.

        Shapes are static: each new (B, T), training or not, QAT or not, costs one more compilation. Use `eager()` for
        odd shapes. Decoding with a cache always runs eagerly. `mode` and `backend` are torch.compile's.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        how: dict[str, Any] = {"dynamic": False, "fullgraph": True, "mode": mode, "backend": backend}
        self._compiled = {"block": torch.compile(run_block, **how), "loss": torch.compile(nll_and_slope, **how)}
        if self.lanes is not None:
            self._compiled["lanes"] = torch.compile(run_lanes, **how)

    def use_native(self, seq_len: int) -> str:
        """Run layers and loss by the fused CPU kernels (see native/) on rows of a multiple of `seq_len` tokens.

        Returns "" or why that is not possible here.
        """
        reason = native_why_not(self, seq_len)
        self._native = None if reason else NativeRunner(self)
        return reason

    def use_plain(self) -> None:
        """Undo `use_native`."""
        self._native = None

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Inside, nothing compiled runs (for shapes that come once)."""
        kept, self._compiled = self._compiled, {}
        try:
            yield
        finally:
            self._compiled = kept

    # -- computation -------------------------------------------------------------------------------------------

    def forward(
        self,
        ids_BT: Tensor,
        targets_BT: Tensor | None = None,
        reduction: Reduction = "mean",
        segments_BT: Tensor | None = None,
    ) -> Tensor:
        """Cross entropy in nats, float32: the mean (or sum) over targets that are not -1, or with reduction "none"
        each position's (B, T), 0 where ignored. Without targets: the logits (B, T, V). `segments_BT` as in `hidden`."""
        if targets_BT is None:
            return self.logits(ids_BT)
        h_ND = self.hidden(ids_BT, segments_BT=segments_BT).flatten(0, 1)
        targets_N, w_VD, cap = targets_BT.reshape(-1), self.head_weight(), self.section.logit_softcap
        native = self._native if self._native is not None and h_ND.dtype == torch.bfloat16 else None
        if reduction == "none":
            if native is not None:
                return native.nll(h_ND, w_VD, targets_N).view(targets_BT.shape)
            return chunked_nll(h_ND, w_VD, targets_N, cap).view(targets_BT.shape)
        if torch.is_grad_enabled() and (h_ND.requires_grad or w_VD.requires_grad):
            if native is not None:
                total = native.total_loss(h_ND, w_VD, targets_N)
            else:
                chunk_fn = self._compiled.get("loss", nll_and_slope)
                total = FusedLoss.apply(h_ND, w_VD, targets_N, cap, chunk_fn)
        else:
            total = chunked_nll(h_ND, w_VD, targets_N, cap).sum()
        return total if reduction == "sum" else total / (targets_N >= 0).sum().clamp_min(1)

    def logits(self, ids_BT: Tensor, cache: KVCache | None = None, *, last_only: bool = False) -> Tensor:
        """(B, T, V) float32 logits after the softcap; `last_only` gives (B, 1, V) for the last position.

        With a cache, `ids_BT` continue what the cache has read, and no gradient is kept.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            h_BTD = self.hidden(ids_BT, cache)
            h_BTD = h_BTD[:, -1:] if last_only else h_BTD
            z_BTV = F.linear(h_BTD, self.head_weight().to(h_BTD.dtype))
            return softcap(z_BTV.float(), self.section.logit_softcap)

    def head_weight(self) -> Tensor:
        """(V, E) float32 weight of the output layer."""
        return self.tok_emb.weight if self.lm_head is None else self.lm_head.effective_weight()

    def hidden(self, ids_BT: Tensor, cache: KVCache | None = None, segments_BT: Tensor | None = None) -> Tensor:
        """(B, T, E) final normalised stream in the compute dtype: what the head reads.

        With `model.document_mask` attention stays inside segments. They are the documents that the ids show, unless
        `segments_BT` (B, T) int32 numbers them in another way (see documents.py); not with a cache.
        """
        self._ready_attention(ids_BT.device)
        flow = Flow(ids_BT, cache, documents=self.section.document_mask)
        start = 0
        if cache is not None:
            cache.room_for(ids_BT.shape[1])
            start = cache.length
        x = self.embed(flow)
        rope = self._rope_for(start, ids_BT, cache)
        if self._native is not None and cache is None and self._native.fits(x):
            segments_BT = self._segments(ids_BT, segments_BT) if flow.documents else None
            x = self._native.layers(x, rope, flow.extras, segments_BT)
        else:
            if flow.documents:
                flow.extras[MASK] = self._mask(ids_BT, cache, segments_BT)
            x = rms_norm(self._run_layers(x, flow, rope), self.section.norm_eps)
        if cache is not None:
            cache.length += ids_BT.shape[1]
        return x if self.head_proj is None else self.head_proj(x)

    def _segments(self, ids_BT: Tensor, segments_BT: Tensor | None) -> Tensor:
        return segment_numbers(ids_BT, self.segment_len) if segments_BT is None else segments_BT

    def _mask(self, ids_BT: Tensor, cache: KVCache | None, segments_BT: Tensor | None) -> Any:
        """The documents of this pass in the form that the attention kernel wants."""
        if cache is not None:
            return dense_mask(cache.extend_segments(ids_BT), ids_BT.shape[1])
        segments_BT = self._segments(ids_BT, segments_BT)
        assert self.attention is not None
        room = self.segment_room if self._counted else room_for(int(first_flags(segments_BT).sum()))
        self._counted = False
        return self.attention.mask(segments_BT, room, self.segment_len or ids_BT.shape[1])

    def expect_documents(self, ids_BT: Tensor) -> None:
        """Make room for the segments of these rows, just before the pass over them. Cheap while the ids are on the CPU;
        without it the pass must wait for the device to count. A larger room compiles the layers again."""
        if self.section.document_mask and self._native is None:
            count = int(first_flags(segment_numbers(ids_BT, self.segment_len)).sum())
            if count > self.segment_room:
                self.segment_room = room_for(2 * count)
            self._counted = True

    def embed(self, flow: Flow) -> Tensor:
        """(B, T, D) stream that enters the first layer; it is also the x0 of every residual mix."""
        parts: list[Part] = [getattr(self, name) for name in self.part_names]
        x = F.embedding(flow.ids_BT, self.tok_emb.weight).to(self.compute_dtype)
        for part in parts:
            x = part.on_embedding(x, flow)
        x = rms_norm(x, self.section.norm_eps)
        x = x if self.embed_proj is None else self.embed_proj(x)
        for part in parts:
            x = part.on_stream(x, flow)
        return x

    def _run_layers(self, x: Tensor, flow: Flow, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Encoder layers push their outputs, decoder layers add them back, last pushed first."""
        order, layers = self.order, self.layers
        x0 = x.view_as(x)  # another object: "the first two inputs are one" would be a second graph for the first block
        stack: list[Tensor] = []
        second: Tensor | None = None  # the other lane, once there are two
        for position, index in enumerate(order.layers):
            block, join = layers[index], position - order.encoder
            if self.lanes is not None and position == order.lanes_at(self.lanes.first):
                second = x.view_as(x)  # before the skip, which enters the first lane only
            if join >= 0 and stack:
                x = self.join_skip(x, stack.pop(), join)
            if self.lanes is not None and second is not None:
                x, second = self._two_lanes(position, index, (x, second), x0, rope, flow)
            elif flow.cache is None:
                x = self._compiled.get("block", run_block)(block, x, x0, rope, flow.extras)
            else:
                x = run_block(block, x, x0, rope, flow.extras, flow.cache.layer(position))
            if position < order.encoder and self.skip_weights is not None:
                stack.append(x)
        return x if self.lanes is None or second is None else self.lanes.merge(x, second)

    def _two_lanes(
        self,
        position: int,
        index: int,
        lanes: tuple[Tensor, Tensor],
        x0: Tensor,
        rope: tuple[Tensor, Tensor],
        flow: Flow,
    ) -> tuple[Tensor, Tensor]:
        assert self.lanes is not None
        block, weights = self.layers[index], (self.lanes.resid[index], self.lanes.post[index])
        if flow.cache is None:
            return self._compiled.get("lanes", run_lanes)(block, *lanes, x0, rope, flow.extras, *weights)
        return run_lanes(block, *lanes, x0, rope, flow.extras, *weights, flow.cache.layer(position))

    def join_skip(self, x_BTD: Tensor, skip_BTD: Tensor, join: int) -> Tensor:
        """x + w skip before decoder layer number `join`; with gates g x + (1 - g) w skip, g = sigmoid(gate)."""
        assert self.skip_weights is not None
        weighted = self.skip_weights[join].to(x_BTD.dtype) * skip_BTD
        if self.skip_gates is None:
            return x_BTD + weighted
        return torch.lerp(weighted, x_BTD, torch.sigmoid(self.skip_gates[join]).to(x_BTD.dtype))

    def _ready_attention(self, device: torch.device) -> None:
        """(Re)choose the kernel when there is none yet, or the device or compute dtype changed since."""
        name = self._attention_key[2] if self._attention_key else "auto"
        if self._attention_key != (device.type, self.compute_dtype, name):
            self.use_attention(name, device)

    def _rope_for(self, start: int, ids_BT: Tensor, cache: KVCache | None) -> tuple[Tensor, Tensor]:
        """(T, J) tables of positions start .. start + T - 1; with a cache, the base is that of its full length."""
        s, length = self.section, ids_BT.shape[1]
        made_for = length if cache is None else cache.max_len
        context = max(self.segment_len or made_for, self.context_len)
        base = stretched_base(s.rope_base, context, s.rope_ref_len, self.rope_dims)
        key = (made_for, base, ids_BT.device)
        if key not in self._rope:
            if len(self._rope) >= ROPE_TABLES_KEPT:
                self._rope.pop(next(iter(self._rope)))
            cos, sin = rope_tables(made_for, self.rope_dims, base)
            self._rope[key] = (cos.to(ids_BT.device), sin.to(ids_BT.device))
        if cache is None:
            return self._rope[key]
        cos, sin = self._rope[key]
        return cos[start : start + length], sin[start : start + length]


def run_block(block: Block, *inputs: Any) -> Tensor:
    """One block. A function of its own, so that compiling it gives one cache of graphs shared by all blocks."""
    return block(*inputs)


def run_lanes(block: Block, *inputs: Any) -> tuple[Tensor, Tensor]:
    """One block on two lanes; a function of its own as `run_block` is."""
    return block.lanes(*inputs)
