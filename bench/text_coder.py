"""What the text coder costs above the ideal code length, beside a flag at every decision: `python -m bench.text_coder`.

Synthetic tokens, so that the table of docs/coder.md needs no model: logits of a language-like spread, tokens drawn from
them. A flag says "near a boundary, use the shared probability" (docs/coder.md, What it costs); its price is the entropy
of the flags and what the cells cost, each scheme at its best width.
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch

from paramgolf.score import coder, rans
from paramgolf.score.grid import GUARD, Grid, reach, warp
from paramgolf.score.stream import SAMPLE_TOKENS

VOCAB, LANES = 1024, 4
TOLERANCES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
WIDTHS = 2.0 ** np.arange(-6.0, 1.01, 0.25)


def text_like(count: int, seed: int, vocab: int = VOCAB) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """(logits (n, V), tokens (n,) drawn from them, log-odds (n, depth)); a fifth of the tokens are nearly certain."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2.0 * torch.randn(count, vocab, generator=generator) - torch.log(torch.arange(1.0, vocab + 1))
    logits[::5, vocab // 3] += 14.0
    tokens = torch.multinomial(torch.softmax(logits, -1), 1, generator=generator)[:, 0]
    return logits, tokens.numpy(), coder.path_log_odds(logits, tokens)


def ideal_bits(logits: torch.Tensor, tokens: np.ndarray) -> float:
    """What a coder with the model's own probabilities would need."""
    picked = torch.log_softmax(logits.double(), -1).gather(1, torch.from_numpy(tokens)[:, None])
    return -picked.sum().item() / math.log(2)


def ours(tolerance: float, tokens: np.ndarray, log_odds: np.ndarray) -> tuple[coder.Settings, int]:
    """(settings, bits) of the coder; what does not grow with the text is a text of one token."""
    settings = coder.fit(tolerance, log_odds[:SAMPLE_TOKENS], tokens[:SAMPLE_TOKENS], VOCAB)
    return settings, 8 * (size(settings, tokens, log_odds) - size(settings, tokens[:LANES], log_odds[:LANES]))


def size(settings: coder.Settings, tokens: np.ndarray, log_odds: np.ndarray) -> int:
    encoder = coder.Encoder(settings, LANES)
    for lane, rows in enumerate(np.array_split(np.arange(len(tokens)), LANES)):
        encoder.add(lane, log_odds[rows], tokens[rows])
    return len(encoder.finish())


def flagged(tolerance: float, tokens: np.ndarray, log_odds: np.ndarray) -> float:
    """Bits with a flag at every decision, an ideal coder of the flags granted, at the best width."""
    bits = tokens[:, None] >> np.arange(coder.depth_of(VOCAB) - 1, -1, -1) & 1
    low, high = reach(log_odds, tolerance)
    best = np.inf
    for width in WIDTHS:
        grid = Grid(round(4096 * width), 1)
        cells = grid.cells(warp(log_odds), 0)
        near = grid.cells(low, 0) != grid.cells(high, 0)
        zero = grid.zero_freq[0][cells] / rans.ONE
        coded = -np.log2(np.where(bits, 1.0 - zero, zero)).sum()
        rate = max(float(near.mean()), 2 * (tolerance + GUARD) / width / 16, 1e-12)
        entropy = -(rate * np.log2(rate) + (1 - rate) * np.log2(1 - rate))
        best = min(best, float(coded + bits.size * entropy))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.text_coder", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=24_000)
    parser.add_argument("--seed", type=int, default=9)
    options = parser.parse_args()
    logits, tokens, log_odds = text_like(options.tokens, options.seed)
    ideal = ideal_bits(logits, tokens)

    def over(bits: float) -> str:
        return f"{round(bits / ideal - 1, 4) + 0.0:.2%}"  # + 0.0: no minus sign before nothing

    print(f"{len(tokens):,} tokens of {ideal / len(tokens):.2f} bits, V = {VOCAB}, {LANES} lanes; above the ideal\n")
    print("| tolerance | h | tokens a block | this coder | with flags |\n|---|---|---|---|---|")
    for tolerance in TOLERANCES:
        settings, bits = ours(tolerance, tokens, log_odds)
        print(
            f"| {tolerance:.0e} | {settings.grid.width:.3f} | {settings.block} | {over(bits)} |"
            f" {over(flagged(tolerance, tokens, log_odds))} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
