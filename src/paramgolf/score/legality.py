"""The four conditions of a legal score, as a test of any scorer: it is run on texts that differ in chosen places.

A scorer that shows its distributions has three methods, called in this order:

    reset(stream)   begin anew; `stream` (n,) int64 is the text that will follow, for a scorer that works in batches.
                    An honest one takes nothing from it that it could not have taken token by token.
    log_probs()     (V,) natural logarithms of the probabilities of the next token; None for a token that is given and
                    not scored (the first of a stream of its own, see `starts`)
    give(token)     the next token itself. The first token of all is given before any `log_probs`.

A scorer that only gives scores has one:

    score(stream)   (targets, nats): the token indices that were scored, int (m,), or None if it does not say, and what
                    each was charged, float (m,)

Both may be there: then the charges are compared with the distributions. Every scorer has `vocab_size`, and may have
`starts(stream)`, the ascending indices at which streams of their own begin (lanes, documents scored apart; the first is
0; None = one stream): a token may then depend on the tokens before it in its own stream and on nothing else. What each
condition means and what this test cannot see: docs/legality.md.

>>> from paramgolf.score import legality                                        # doctest: +SKIP
>>> print(legality.check(scorer).text())                                        # doctest: +SKIP
"""

from __future__ import annotations

import numpy as np

from paramgolf.errors import GolfError
from paramgolf.score.conditions import CONDITIONS, Finding, Legality, StepScorer, TokenScorer, Verdict
from paramgolf.score.exam import Exam

__all__ = ["CONDITIONS", "Finding", "Legality", "StepScorer", "TokenScorer", "Verdict", "check"]

CHECK_TOKENS = 257  # of the built-in stream
MIN_TOKENS = 8


def check(
    scorer: StepScorer | TokenScorer,
    tokens: np.ndarray | None = None,
    *,
    bos_id: int = 1,
    cuts: int = 12,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Legality:
    """Run `scorer` on `tokens` (1-D ids; None = a stream of phrases that repeat) and on changed copies of them.

    `cuts`: places at which everything that follows is changed; a scorer runs about 2 x cuts + 2 times. `tolerance`:
    nats by which two runs of an honest scorer may differ. Raises GolfError for a scorer without the interface or a text
    that is too short; what the scorer itself raises is not caught.
    """
    stepping, charging = isinstance(scorer, StepScorer), isinstance(scorer, TokenScorer)
    if not (stepping or charging):
        raise GolfError("cannot check this scorer: it needs vocab_size and reset, log_probs and give, or score")
    random = np.random.default_rng(seed)
    stream = np.asarray(_phrases(scorer.vocab_size, bos_id, random) if tokens is None else tokens).astype(np.int64)
    if stream.ndim != 1 or len(stream) < MIN_TOKENS:
        raise GolfError(f"a check needs a stream of at least {MIN_TOKENS} token ids, this has shape {stream.shape}")
    if stream.min() < 0 or stream.max() >= scorer.vocab_size:
        raise GolfError(f"token id {int(stream.max())} is outside the scorer's vocabulary of {scorer.vocab_size}")
    exam = Exam(scorer, stream, bos_id, tolerance, random)
    places = exam.places(cuts)
    if not len(places):
        raise GolfError("a check changes tokens, and in this text there is none but document starts")
    if isinstance(scorer, StepScorer):
        exam.distributions(scorer, places)
    if isinstance(scorer, TokenScorer):
        exam.charges(scorer, places, known=stepping)
    return Legality(exam.findings(), len(stream), exam.texts)


def _phrases(vocab_size: int, bos_id: int, random: np.random.Generator) -> np.ndarray:
    """Documents of phrases that come again, so that whatever remembers text has something to remember."""
    ids = np.array([i for i in range(vocab_size) if i != bos_id])
    if len(ids) < 3:
        raise GolfError(f"a check needs a vocabulary of at least 4 tokens, this has {vocab_size}")
    phrases = [random.choice(ids, int(random.integers(3, 9))) for _ in range(12)]
    stream: list[int] = []
    while len(stream) < CHECK_TOKENS:
        picked = random.integers(0, len(phrases), int(random.integers(3, 8)))
        stream += [bos_id] * (bos_id < vocab_size) + [int(i) for p in picked for i in phrases[p]]
    return np.array(stream[:CHECK_TOKENS])
