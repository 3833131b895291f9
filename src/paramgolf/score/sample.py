"""Text from a model: temperature, top-k, nucleus, stop strings, streaming, and a context that slides past its
length."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from paramgolf.data.tokenizer import Tokenizer
from paramgolf.errors import CheckFailed, GolfError
from paramgolf.model.cache import KVCache
from paramgolf.model.gpt import GPT


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    context: int,
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 0.95,
    top_k: int = 0,
    stop: Sequence[str] = (),
    seed: int = 0,
) -> Iterator[str]:
    """Continue `prompt` piece by piece; every piece is whole characters, and all pieces together are the text.

    `context` is the number of tokens that the model reads at most: beyond it the older half is forgotten.
    `temperature` 0 takes the likeliest token; `top_p` keeps the smallest set of tokens with that probability, `top_k`
    so many (0 = all). Ends after `max_tokens`, before the first of the `stop` strings, or where the model begins
    another document. The same seed gives the same text on the same machine. Raises GolfError for settings out of
    range, before anything is yielded.
    """
    if not temperature >= 0 or not 0 < top_p <= 1 or top_k < 0 or max_tokens < 0 or seed < 0 or context < 1:
        raise GolfError(
            f"cannot sample with temperature={temperature}, top_p={top_p}, top_k={top_k}, max_tokens={max_tokens}, "
            f"seed={seed}: choose temperature >= 0, 0 < top_p <= 1, and the others >= 0"
        )
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise GolfError(f"the prompt is no text at character {error.start}; give it in UTF-8") from None
    if any(not text for text in stop):
        raise GolfError("an empty stop string would end every text at once; leave it out")
    ids = [tokenizer.bos_id, *tokenizer.encode(prompt).tolist()]
    tokens = _tokens(model, ids, context, max_tokens, temperature, top_p, top_k, seed)
    return _text(tokens, tokenizer, ids[1:], list(stop))


def _tokens(
    model: GPT, ids: list[int], context: int, count: int, temperature: float, top_p: float, top_k: int, seed: int
) -> Iterator[int]:
    """`count` token ids that follow `ids`."""
    device = model.tok_emb.weight.device
    random = np.random.default_rng(seed)
    cache = KVCache(context)
    unread = ids[-context:]
    ids = list(unread)
    model.eval()
    for _ in range(count):
        if cache.length + len(unread) > context:
            cache.reset()
            unread = ids = ids[-max(1, context // 2) :]
        with torch.no_grad():
            logits = model.logits(torch.tensor([unread], device=device), cache, last_only=True)[0, -1]
        token = pick(logits.double().cpu().numpy(), temperature, top_p, top_k, random)
        yield token
        unread = [token]
        ids.append(token)


def pick(logits: np.ndarray, temperature: float, top_p: float, top_k: int, random: np.random.Generator) -> int:
    """One token id drawn from logits (V,) float64. Raises CheckFailed if they are not finite."""
    if not np.isfinite(logits).all():
        raise CheckFailed("the model gives logits that are not finite numbers: nothing can be sampled from it")
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")
    order = order[:top_k] if top_k else order
    weights = np.exp((logits[order] - logits[order[0]]) / temperature)
    total = np.cumsum(weights)
    # The smallest set that reaches top_p: everything up to and including the first token to pass it.
    kept = 1 + int(np.searchsorted(total, top_p * total[-1])) if top_p < 1 else len(order)
    kept = min(kept, len(order))
    at = int(np.searchsorted(total[:kept], random.random() * total[kept - 1], side="right"))
    return int(order[min(at, kept - 1)])


def _text(tokens: Iterator[int], tokenizer: Tokenizer, prompt: list[int], stop: list[str]) -> Iterator[str]:
    """Tokens as characters, those of the prompt left out; holds back the beginning of a character and of what may
    become a stop string."""
    characters = codecs.getincrementaldecoder("utf-8")("replace")
    held, first = "", not prompt and not tokenizer.reversible
    bytes_of = tokenizer.decoder()
    for token in prompt:  # capitals that it leaves open go on
        bytes_of(token)
    for token in tokens:
        if token == tokenizer.bos_id:
            break
        raw = bytes_of(token)
        if first and raw:
            # Tokenizers that put a blank before a text take it away again.
            raw, first = raw.removeprefix(b" "), False
        held += characters.decode(raw)
        ends = [at for text in stop if (at := held.find(text)) >= 0]
        if ends:
            yield held[: min(ends)]
            return
        safe = len(held) - _may_begin(held, stop)
        if safe:
            yield held[:safe]
            held = held[safe:]
    held += characters.decode(b"", final=True)
    if held:
        yield held


def _may_begin(held: str, stop: list[str]) -> int:
    """Length of the longest end of `held` with which a stop string begins."""
    longest = max((len(text) - 1 for text in stop), default=0)
    sizes = range(min(longest, len(held)), 0, -1)
    return next((n for n in sizes if any(text.startswith(held[-n:]) for text in stop)), 0)
