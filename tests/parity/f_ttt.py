"""F_ttt: score-first test-time training: every document's losses, adapters and pauses, and the plain evaluator."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from paramgolf.model.documents import bounds, segment_numbers
from paramgolf.model.gpt import GPT
from paramgolf.recipe.sections import TttSection
from paramgolf.score.ttt.adapt import Adaptation, adapting
from paramgolf.score.ttt.adapters import Adapters
from paramgolf.score.ttt.documents import Document, documents_of, window_of
from paramgolf.score.ttt.group import Chunk
from paramgolf.score.ttt.sgd import SgdStep
from tests.parity.frontier_models import build, config_of, their_arrays
from tests.parity.harness import Check, exact, worst

BOS_ID = 1
NLL, NORMS, WEIGHTS = 1e-4, 1e-4, 1e-5


def settings(z: Any, variant: str) -> tuple[TttSection, int]:
    """(our section of a variant's settings, row length of the evaluation)."""
    h = json.loads(str(z[f"{variant}/hyper_json"]))
    switches = {"k": h["ttt_k_lora"], "mlp": h["ttt_mlp_lora"], "o": h["ttt_o_lora"]}
    section = TttSection(
        kind="phased" if h["phased_ttt_prefix_docs"] else "lora",
        adapt=("head", "q", "v", *(name for name, on in switches.items() if on)),  # type: ignore[arg-type]
        rank=h["ttt_lora_rank"],
        alpha=h["lora_alpha"],
        lr=h["ttt_lora_lr"],
        beta1=h["ttt_beta1"],
        beta2=h["ttt_beta2"],
        weight_decay=h["ttt_weight_decay"],
        grad_steps=h["ttt_grad_steps"],
        chunk=h["ttt_chunk_size"],
        context=h["ttt_eval_seq_len"],
        batch_docs=h["ttt_batch_size"],
        order="longest",
        keep_a=h["warm_start_A"],
        prefix_docs=h["phased_ttt_prefix_docs"],
        phases=h["phased_ttt_num_phases"],
        sgd_lr=h["global_ttt_lr"],
        sgd_momentum=h["global_ttt_momentum"],
        sgd_epochs=h["global_ttt_epochs"],
        sgd_chunk_tokens=h["global_ttt_chunk_tokens"],
        sgd_rows=h["global_ttt_batch_seqs"],
        sgd_clip=h["global_ttt_grad_clip"],
    )
    return section, h["eval_seq_len"]


def their_name(name: str) -> str:
    """Our adapter's name in the script."""
    kind, _, position = name.partition(".")
    return "lm_head_lora" if kind == "head" else f"{kind}_loras.{position}"


class Recorded:
    """A variant run through our components, with the script's random A, and what it did."""

    def __init__(self, z: Any, variant: str) -> None:
        self.z, self.at = z, variant
        self.section, self.seq_len = settings(z, variant)
        self.tokens = z["all_tokens"][: int(z["val_token_count"])]
        self.documents = documents_of(self.tokens, BOS_ID)
        self.nll = np.full(len(self.tokens), np.nan)
        self.norms: list[np.ndarray] = []
        self.grads: list[np.ndarray] = []
        self.checks: list[Check] = []
        self.sgd: list[list[SgdStep]] = [[]]
        self.ends: list[int] = []
        self.calls = 0
        self.before: dict[str, Tensor] = {}

    def run(self) -> list[Check]:
        model = build(self.z, packed=True)
        used = [int(i) for i in self.z[f"{self.at}/call_lora"]]
        draws = iter([i for k, i in enumerate(used) if k == 0 or i != used[k - 1]])
        recorded = self

        class Scripted(Adapters):
            def draw(self) -> dict[str, Tensor]:
                number = next(draws)
                return {
                    n: torch.from_numpy(recorded.z[f"{recorded.at}/lora_A/{number}/{their_name(n)}.A"]) for n in self.a
                }

            def hidden(self, ids_ST: Tensor, rows: Tensor) -> Tensor:
                recorded.calls += 1
                return super().hidden(ids_ST, rows)

            def step(self) -> None:
                recorded.grads.append(recorded.norms_of(self, [t.grad for t in self.tensors()]))
                super().step()
                recorded.norms.append(recorded.norms_of(self, self.tensors()))

        adaptation = Adaptation(
            model, self.section, self.tokens, self.documents, self.seq_len, make=Scripted, watch=self.watch
        )
        self.ends = list(adaptation.pauses)
        self.before = {name: value.clone() for name, value in model.state_dict().items()}
        with adapting(model, self.seq_len):
            for number in range(len(adaptation.batches)):
                adaptation.begin(number).run(self.observe)
                pauses = len(adaptation.pauses)
                adaptation.finish(number)
                if len(adaptation.pauses) < pauses:
                    self.paused(adaptation, model)
            if adaptation.pauses:  # the script trains once more when nothing is left to score
                adaptation.pause()
                self.paused(adaptation, model)
        queue = [[b.number, [d.number for d in b.documents]] for b in adaptation.batches]
        return [*self.checks, *self.results(queue)]

    def norms_of(self, adapters: Adapters, tensors: list[Tensor | None]) -> np.ndarray:
        """Norms of each parameter for each document, in the script's order of names."""
        names = [f"{their_name(n)}.{kind}" for n in adapters.sizes for kind in "AB"]
        found = {
            name: np.zeros(adapters.slots) if t is None else t.detach().flatten(1).norm(dim=1).numpy()
            for name, t in zip(names, tensors, strict=True)
        }
        return np.stack([found[str(name)] for name in self.z[f"{self.at}/param_names"]])

    def observe(self, chunk: Chunk, logits: Tensor) -> None:
        nll = F.cross_entropy(logits.flatten(0, 1), chunk.targets_SC.flatten(), reduction="none")
        for row, span in zip(nll.view(chunk.targets_SC.shape).numpy(), chunk.spans(), strict=True):
            self.nll[span] = row[: span.stop - span.start]
        if self.calls == 3:
            self.third_call(chunk, nll.view(chunk.targets_SC.shape).numpy())

    def third_call(self, chunk: Chunk, nll: np.ndarray) -> None:
        at, rows = f"{self.at}/call2", chunk.rows.numpy()
        self.checks += [
            exact(f"{at} x", chunk.ids_ST, self.z[f"{at}/x"][rows]),
            exact(f"{at} offset", [w.offset for w in chunk.windows], self.z[f"{at}/offset"][rows]),
            exact(f"{at} len", [w.count for w in chunk.windows], self.z[f"{at}/len"][rows]),
        ]
        for row, slot, window in zip(nll, rows, chunk.windows, strict=True):
            there = slice(window.offset, window.offset + window.count)
            self.checks.append(
                worst(f"{at} nll {slot}", row[: window.count], self.z[f"{at}/nll_all"][slot, there], NLL)
            )

    def watch(self, step: SgdStep) -> None:
        self.sgd[-1].append(step)

    def paused(self, adaptation: Adaptation, model: GPT) -> None:
        """Compare a pause: what it trained on, how, and the weights after it."""
        number = len(self.sgd) - 1
        at, z, steps = f"{self.at}/sgd{number}", self.z, self.sgd[-1]
        cuts = [[b for b in bounds(s.segments)] for s in steps if s.segments is not None]
        names = [str(name) for name in z[f"{at}/param_names"]]
        norms = z[f"{at}/grad_norm_before_clip"]
        after = their_arrays(model.state_dict(), names, config_of(z))
        first = their_arrays(self.before, names, config_of(z))
        deltas = [np.linalg.norm(np.asarray(after[n], np.float64) - first[n]) for n in names]
        self.checks += [
            exact(f"{at} tokens", adaptation.prefix(self.ends[number]), z[f"{at}/tokens"]),
            exact(f"{at} after", self.calls, z[f"{at}/after_call"]),
            Check(f"{at} x", float(self.rows_of(steps) != json.loads(str(z[f"{at}/x_per_step_json"]))), 0.0),
            Check(f"{at} cu", float(cuts != json.loads(str(z[f"{at}/cu_per_step_json"]))), 0.0),
            worst(f"{at} loss", [s.loss for s in steps], z[f"{at}/loss_per_step"], NLL),
            worst(f"{at} norm", [s.norm for s in steps][: len(norms)], norms, NORMS),  # none without a clip
            worst(f"{at} delta", deltas, z[f"{at}/delta_l2"], NORMS),
        ]
        for key in (k for k in z.files if k.startswith(f"{at}/after")):
            _, _, kind, *name = key.split("/")
            ours = after.get("/".join(name))
            if ours is not None:
                ours = ours[:, 1] if kind == "after_row1" else ours
                self.checks.append(worst(key, ours.reshape(z[key].shape), z[key], WEIGHTS))
        self.sgd.append([])
        self.before = {name: value.clone() for name, value in model.state_dict().items()}

    @staticmethod
    def rows_of(steps: list[SgdStep]) -> list[list[int]]:
        return [step.ids.flatten().tolist() for step in steps]

    def results(self, queue: list[Any]) -> list[Check]:
        at, z = self.at, self.z
        sizes = z["all_bytes"][1 : len(self.tokens)].astype(np.int64).sum()
        total = float(self.nll[1:].sum())
        checks = [
            Check(f"{at} queue", float(queue != json.loads(str(z[f"{at}/queue_json"]))), 0.0),
            worst(f"{at} val_loss", total / (len(self.tokens) - 1), z[f"{at}/val_loss"], NLL),
            worst(f"{at} val_bpb", total / math.log(2) / float(sizes), z[f"{at}/val_bpb"], NLL),
            *by_step(f"{at} adapter norms", self.norms, z[f"{at}/param_l2_after_step"]),
            exact(f"{at} calls", self.calls, len(z[f"{at}/call_lora"])),
        ]
        grads = np.array([np.linalg.norm(g.astype(np.float64), axis=-1) for g in self.grads])
        grads = grads.reshape(-1, len(z[f"{at}/param_names"]))
        checks.append(worst(f"{at} gradients", grads, z[f"{at}/grad_l2_at_step"], NORMS, relative=True))
        for d in self.documents:
            own = self.nll[d.start + 1 : d.start + d.length]
            checks.append(worst(f"{at} document {d.number}", own, z[f"{at}/doc_nll/{d.number}"], NLL))
        return checks


def by_step(name: str, ours: list[np.ndarray], theirs: np.ndarray) -> list[Check]:
    """Norms (parameters, documents) of every step. A batch may have fewer documents than the set has columns: what the
    set holds in the others is nan or zero."""
    checks = [exact(f"{name} steps", len(ours), len(theirs))]
    for step, (own, their) in enumerate(zip(ours, theirs, strict=False)):
        there = own.shape[1]
        checks.append(worst(f"{name} {step}", own, their[:, :there], NORMS))
        checks.append(exact(f"{name} {step} padding", np.count_nonzero(np.nan_to_num(their[:, there:])), 0))
    return checks


def plain_nll(model: GPT, x: Tensor, y: Tensor, cut: int) -> Tensor:
    """Losses of consecutive tokens as one packed row, cut at documents and every `cut` tokens."""
    segments = segment_numbers(x[None], cut)
    with torch.no_grad():
        return model(x[None], y[None], reduction="none", segments_BT=segments)[0]


def check_plain(z: Any, tokens: np.ndarray, documents: list[Document]) -> list[Check]:
    """Documents without adaptation, and the script's evaluator (which drops the last rows of every rank)."""
    model, checks = build(z, packed=True), []
    model.eval()
    stream = torch.from_numpy(tokens.astype(np.int64))
    for d in documents:
        own = stream[d.start : d.start + d.length]
        nll = plain_nll(model, own[:-1], own[1:], 0)
        checks.append(worst(f"no ttt {d.number}", nll, z[f"no_ttt_full_context/doc_nll/{d.number}"], NLL))
    seq_len = config_of(z)["eval_seq_len"]
    total = (len(tokens) - 1) // seq_len
    for key in (k for k in z.files if k.startswith("eval_val/") and k.endswith("/val_loss")):
        _, layout, rank_name, loop, _ = key.split("/")
        world, size = (int(part) for part in layout.removeprefix("world").split("_batchseqs"))
        rank, at = int(rank_name.removeprefix("rank")), key.removesuffix("/val_loss")
        model.set_loops(config_of(z)["num_loops"] if loop == "loop1" else 0)
        low, high = total * rank // world, total * (rank + 1) // world
        rows = range(low, low + (high - low) // size * size, size)
        checks.append(exact(f"{at} tokens", len(rows) * size * seq_len, z[f"{at}/tokens_scored"]))
        if not rows:  # fewer than a batch: there is no mean to compare
            continue
        spans = [stream[first * seq_len : (first + size) * seq_len + 1] for first in rows]
        nll = torch.cat([plain_nll(model, s[:-1], s[1:], seq_len) for s in spans]).double()
        sizes = z["all_bytes"][low * seq_len + 1 : low * seq_len + 1 + len(nll)].astype(np.int64).sum()
        checks += [
            exact(f"{at} first", np.stack([s[:4].numpy() for s in spans]), z[f"{at}/first_tokens"]),
            worst(f"{at} loss", nll.mean(), z[key], NLL),
            worst(f"{at} bpb", nll.sum() / math.log(2) / float(sizes), z[f"{at}/val_bpb"], NLL),
        ]
    return checks


def check(path: Path, z: Any) -> list[Check]:
    tokens = z["all_tokens"][: int(z["val_token_count"])]
    documents = documents_of(tokens, BOS_ID)
    variants = sorted({k.split("/")[0] for k in z.files if k.endswith("/hyper_json")})
    table = z["chunk_window_table"]
    size = int(table[:, -1].max())  # one chunk size for all rows; every whole chunk has it
    rows = [(int(t), int(c) * size, (int(c) + 1) * size, int(context)) for context, t, c, *_ in table]
    windows = [window_of(*row, to_end=True) for row in rows]
    checks = [
        exact("documents", [(d.start, d.length) for d in documents], z["doc_start_len"]),
        exact("windows", [(w.start, w.length, w.offset, w.count) for w in windows], table[:, 3:]),
    ]
    for variant in variants:
        checks += Recorded(z, variant).run()
    return checks + check_plain(z, tokens, documents)
