"""What `legality.check` does to a scorer: texts that differ in chosen places, and what must not follow from that.

A target t of the stream that begins at s may depend on tokens s .. t - 1 alone, its charge on token t as well. So
between two texts that agree there the distribution may not change, whatever else was changed in them:

- everything from t on changed:      the distributions up to t stay              causal, score_first
- token t alone changed:             the distribution at t stays                 normalised
- another stream changed:            all distributions of this one stay          causal
- nothing changed, run once more:    everything stays                            score_first
"""

from __future__ import annotations

import numpy as np

from paramgolf.score.conditions import CONDITIONS, Finding, StepScorer, TokenScorer, Verdict

MASS_TOLERANCE = 1e-4  # of a sum of probabilities: what float32 cannot do better with 65536 of them
CHARGE_TOLERANCE = 1e-3  # nats between a charge and the distribution, which may come from two computations
PROBES = 3  # tokens at which a scorer without distributions is asked for the charge of other targets
PROBED_TARGETS = 1024  # at most so many of them each
OTHER_STREAMS = 4  # at most so many streams are changed to see whether the others notice


class Exam:
    """The evidence against one scorer on one stream (n,), collected run by run."""

    def __init__(
        self, scorer: object, stream: np.ndarray, bos_id: int, tolerance: float, random: np.random.Generator
    ) -> None:
        self.stream, self.bos_id, self.tolerance, self.random = stream, bos_id, tolerance, random
        self.texts = 0
        own = getattr(scorer, "starts", None)
        starts = None if own is None else own(stream)
        self.starts = np.array([0]) if starts is None else np.unique(np.asarray(starts, dtype=np.int64))
        # Where documents begin decides how the streams are cut, so a scorer that cuts keeps them.
        self._fixed = np.zeros(len(stream), bool) if starts is None else stream == bos_id
        self._worst: dict[str, tuple[float, Finding]] = {}
        self._passed: dict[str, str] = {}
        self._largest = 0.0  # change where there should have been none
        self._base: np.ndarray | None = None
        self._again: list[int] = []  # places whose token has followed the one before it already
        wrong = self.starts[1:][stream[self.starts[1:]] != bos_id]
        if self.starts[0] != 0 or len(wrong):
            at = int(self.starts[0] if self.starts[0] else wrong[0])
            self._violation("once", 1.0, f"a stream begins at token {at}, where no document begins", position=at)

    # -- texts -------------------------------------------------------------------------------------------------

    def places(self, count: int) -> np.ndarray:
        """Ascending token indices at which to change the text: after repeated contexts, where caches act, after
        document starts, and anywhere."""
        n, x = len(self.stream), self.stream
        free = np.flatnonzero(~self._fixed)
        free = free[free > 0]
        pairs: set[tuple[int, int]] = set()
        for t in range(1, n):
            pair = int(x[t - 1]), int(x[t])
            if pair in pairs:
                self._again.append(t)
            pairs.add(pair)
        heads = np.flatnonzero(x[:-1] == self.bos_id) + 1
        picked: set[int] = set()
        for pool, share in ((self._again, count // 3), (heads, -(-count // 6)), (free, count)):
            usable = np.array(sorted(set(np.asarray(pool, dtype=np.int64).tolist()) & set(free.tolist()) - picked))
            wanted = min(share, len(usable), count - len(picked))
            if wanted > 0:
                picked |= set(self.random.choice(usable, wanted, replace=False).tolist())
        return np.array(sorted(picked), dtype=np.int64)

    def _changed(self, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(the stream with other ids of its own at `where`, the indices that did change)."""
        where = where[~self._fixed[where]]
        pool = np.unique(self.stream if not self._fixed.any() else self.stream[~self._fixed])
        if len(pool) < 2:
            pool = np.append(pool, pool[0] - 1 if pool[0] else 1)
        step = self.random.integers(1, len(pool), len(where))
        out = self.stream.copy()
        out[where] = pool[(np.searchsorted(pool, self.stream[where]) + step) % len(pool)]
        return out, where

    def _untouched(self, where: np.ndarray, upto: int, own: bool) -> np.ndarray:
        """bool (upto,): whether the target may not notice that the ascending indices `where` changed; `own` tells
        whether the target itself counts."""
        t = np.arange(upto)
        begin = self.starts[np.maximum(np.searchsorted(self.starts, t, side="left") - 1, 0)]
        first = np.searchsorted(where, begin)
        seen = np.searchsorted(where, t, side="right" if own else "left")
        return (first == seen) & (t > 0)

    def _other_streams(self) -> list[np.ndarray]:
        """The tokens of some streams, each to be changed on its own."""
        if len(self.starts) == 1:
            return []
        ends = np.append(self.starts[1:], len(self.stream))
        some = self.random.choice(len(ends), min(OTHER_STREAMS, len(ends)), replace=False)
        return [np.arange(self.starts[i], ends[i]) for i in sorted(some)]

    # -- scorers that show distributions -----------------------------------------------------------------------

    def distributions(self, scorer: StepScorer, places: np.ndarray) -> None:
        """Everything that can be asked of them."""
        base = self._base = self._walk(scorer, self.stream, len(self.stream), judged=True)
        again = self._walk(scorer, self.stream, len(self.stream))
        self._compare(base, again, np.zeros(0, np.int64))
        if "score_first" in self._worst:
            self._unknown("causal", "two runs of one text differ, so changed texts tell nothing")
            return
        for t in places:
            for where in (np.arange(t, len(self.stream)), np.array([t])):
                stream, changed = self._changed(where)
                self._compare(base, self._walk(scorer, stream, int(t) + 1), changed)
        for where in self._other_streams():
            stream, changed = self._changed(where)
            self._compare(base, self._walk(scorer, stream, len(stream)), changed)
        rest = f"; the largest change was {self._largest:.1e} nats" if self._largest else ""
        self._passed["causal"] = f"unchanged over {self.texts} texts{rest}"
        self._passed["score_first"] = f"unchanged at {len(places)} places by what follows, and in a second run"

    def _walk(self, scorer: StepScorer, stream: np.ndarray, upto: int, *, judged: bool = False) -> np.ndarray:
        """(upto, V) float64: row t the distribution before token t, not a number where the token is given."""
        self.texts += 1
        out = np.full((upto, scorer.vocab_size), np.nan)
        scorer.reset(stream.copy())
        scorer.give(int(stream[0]))
        given, off = [], 0.0
        for t in range(1, upto):
            row = scorer.log_probs()
            if row is None:
                given.append(t)
            else:
                values = np.asarray(row, dtype=np.float64)
                if values.shape != (scorer.vocab_size,) or np.isnan(values).any():
                    what = "not numbers" if values.shape == (scorer.vocab_size,) else f"of shape {values.shape}"
                    message = f"the log-probabilities of token {t} are {what}, not those of {scorer.vocab_size} tokens"
                    self._violation("normalised", np.inf, message, position=t)
                else:
                    out[t] = values
                    off = max(off, self._mass(t, values, judged))
            if t + 1 < upto:
                scorer.give(int(stream[t]))
        if judged:
            self._passed["normalised"] = f"{upto - 1 - len(given)} distributions, their sums within {off:.1e} of one"
            self._scored_once(np.setdiff1d(np.arange(1, upto), given), "by this check")
        return out

    def _mass(self, t: int, values: np.ndarray, judged: bool) -> float:
        with np.errstate(over="ignore"):
            mass = float(np.exp(values).sum())
        if judged and not abs(mass - 1) <= MASS_TOLERANCE:
            message = f"the probabilities before token {t} sum to {mass:.6g}"
            self._violation("normalised", abs(mass - 1), message, position=t, sum=mass)
        return abs(mass - 1)

    def _compare(self, base: np.ndarray, other: np.ndarray, where: np.ndarray) -> None:
        """Find distributions that noticed a change at `where` although they may not."""
        upto = len(other)
        with np.errstate(invalid="ignore"):
            change = np.abs(other - base[:upto])
        change[other == base[:upto]] = 0.0  # equal infinities
        change = np.where(np.isnan(change), 0.0, change).max(axis=1)
        change[~self._untouched(where, upto, own=False)] = 0.0
        self._largest = max(self._largest, float(change.max()))
        if not len(where):
            self._left_over(change)
            return
        at = np.isin(np.arange(upto), where)
        alone = len(where) == 1
        for condition, chosen in (("causal", ~at), ("score_first", at), ("normalised", at & alone)):
            t = int(np.where(chosen, change, 0.0).argmax())
            if chosen[t] and change[t] > self.tolerance:
                self._violation(condition, change[t], self._how(condition, t, change[t], where), position=t)

    def _how(self, condition: str, t: int, change: float, where: np.ndarray) -> str:
        by = f"by {change:.3g} nats"
        if condition == "normalised":
            return f"the distribution of token {t} changes {by} when that token alone does: it was made knowing it"
        if condition == "score_first":
            return f"the distribution of token {t} changes {by} when tokens from it on do: it had learnt from them"
        later = int(where[np.searchsorted(where, t)]) if where[-1] > t else None
        source = f"token {later}, which comes later," if later is not None else "a stream that is scored apart"
        return f"the distribution of token {t} changes {by} when {source} does"

    def _left_over(self, change: np.ndarray) -> None:
        t = int(change.argmax())
        if change[t] > self.tolerance:
            message = f"token {t} is scored {change[t]:.3g} nats otherwise when the same text is run again"
            self._violation("score_first", change[t], message + ": something is kept or drawn", position=t)

    # -- scorers that give scores ------------------------------------------------------------------------------

    def charges(self, scorer: TokenScorer, places: np.ndarray, *, known: bool) -> None:
        """What each token is charged. `known`: the distributions were looked at."""
        before = self.texts
        targets, nats = self._score(scorer, self.stream)
        if targets is None:
            self._count(len(nats))
            labels = np.arange(1, len(nats) + 1)
        else:
            self._scored_once(targets, "by the scorer's own account")
            labels = targets
        if len(labels) != len(nats) or not np.isfinite(nats).all():
            self._violation("once", np.inf, f"{len(labels)} targets and {len(nats)} charges, or some are not numbers")
            return
        changes = [np.arange(t, len(self.stream)) for t in places] + self._other_streams()
        for where in [np.zeros(0, np.int64), *changes]:
            if len(where) and "score_first" in self._worst:
                self._unknown("causal", "two runs of one text differ, so changed texts tell nothing")
                return
            stream, changed = self._changed(where)
            self._compare_charges(scorer, stream, changed, targets, labels, nats)
        if known:
            self._against_distributions(labels, nats)
        else:
            self._passed["causal"] = f"no charge changed over {self.texts - before} texts"
            self._probe(scorer, places, labels, nats)

    def _score(self, scorer: TokenScorer, stream: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
        self.texts += 1
        targets, nats = scorer.score(stream.copy())
        nats = np.asarray(nats, dtype=np.float64).reshape(-1)
        return (None if targets is None else np.asarray(targets, dtype=np.int64).reshape(-1)), nats

    def _count(self, charges: int) -> None:
        """Without targets all that can be said is how many there are."""
        wanted = len(self.stream) - 1
        if charges != wanted and not wanted - len(self.starts) + 1 <= charges < wanted:
            message = f"{charges} charges for {wanted} tokens after the first"
            self._violation("once", abs(charges - wanted), message, scores=charges, tokens=wanted)
        else:
            self._unknown("once", f"{charges} charges for {wanted} tokens; which token each is for is not said")

    def _scored_once(self, targets: np.ndarray, by: str) -> None:
        n = len(self.stream)
        inside = targets[(targets >= 0) & (targets < n)]
        counts = np.bincount(inside, minlength=n)
        missing = np.setdiff1d(np.flatnonzero(counts == 0), self.starts)
        twice = np.flatnonzero(counts > 1)
        if len(twice) or len(missing) or counts[0] or len(inside) < len(targets):
            parts = [f"{len(twice)} tokens are scored more than once, the first is {twice[0]}"] if len(twice) else []
            parts += [f"{len(missing)} tokens are not scored, the first is {missing[0]}"] if len(missing) else []
            parts += ["a score has no token before it"] if counts[0] or len(inside) < len(targets) else []
            numbers = {"repeated": len(twice), "missing": len(missing)}
            self._violation("once", len(twice) + len(missing) + 1, f"{'; '.join(parts)} ({by})", **numbers)
        else:
            given = int((counts[self.starts] == 0).sum())
            self._passed["once"] = f"{len(targets)} tokens once each, {given} given at the start of a stream ({by})"

    def _compare_charges(
        self, scorer: TokenScorer, stream: np.ndarray, where: np.ndarray, targets: np.ndarray | None,
        labels: np.ndarray, nats: np.ndarray,
    ) -> None:  # fmt: skip
        got, other = self._score(scorer, stream)
        moved = targets is not None and (got is None or not np.array_equal(got, targets))
        if moved or len(other) != len(nats):
            self._violation("once", 1.0, "which tokens are scored depends on the text, not on its length")
            return
        inside = np.clip(labels, 0, len(stream) - 1)
        change = np.where(self._untouched(where, len(stream), own=True)[inside], np.abs(other - nats), 0.0)
        change = np.where(np.isnan(change), np.inf, change)
        worst = int(change.argmax())
        if not change[worst] > self.tolerance:
            return
        t = int(labels[worst])
        if not len(where):
            per_token = np.zeros(len(stream))
            per_token[t] = change[worst]
            self._left_over(per_token)
            return
        message = self._how("causal", t, change[worst], where).replace("the distribution", "the charge")
        self._violation("causal", change[worst], message, position=t)

    def _against_distributions(self, labels: np.ndarray, nats: np.ndarray) -> None:
        assert self._base is not None
        inside = (labels > 0) & (labels < len(self.stream))
        inside &= np.isin(labels, np.flatnonzero(np.bincount(np.clip(labels, 0, None)) == 1))  # else a fault already
        claimed = -self._base[labels[inside], self.stream[labels[inside]]]
        with np.errstate(invalid="ignore"):
            off = np.abs(nats[inside] - claimed)
        off = np.where(np.isnan(off), 0.0, off)
        if not len(off):
            return
        worst = int(off.argmax())
        if off[worst] > CHARGE_TOLERANCE:
            t = int(labels[inside][worst])
            message = f"token {t} is charged {nats[inside][worst]:.4f} nats, its distribution says {claimed[worst]:.4f}"
            self._violation("normalised", off[worst], message, position=t)
        elif "normalised" in self._passed:
            self._passed["normalised"] += f"; {len(off)} charges within {off[worst]:.1e} nats of them"

    def _probe(self, scorer: TokenScorer, places: np.ndarray, labels: np.ndarray, nats: np.ndarray) -> None:
        """Ask for the charge of other targets at the same place: their probabilities may not sum to more than one."""
        size = scorer.vocab_size
        whole = size <= PROBED_TARGETS
        sums = []
        usable = [t for t in places if (labels == t).sum() == 1]
        for t in sorted(usable, key=lambda t: (t in self._again, t))[-PROBES:]:
            others = np.arange(size) if whole else self.random.choice(size, PROBED_TARGETS, replace=False)
            own = int(self.stream[t])
            banned = self.bos_id if self._fixed.any() else -1  # would cut the streams elsewhere
            mass = float(np.exp(-nats[labels == t][0]))
            for token in others[(others != own) & (others != banned)]:
                stream = self.stream.copy()
                stream[t] = token
                got, charges = self._score(scorer, stream)
                here = charges[(labels if got is None else got) == t]
                mass += float(np.exp(-here[0])) if len(here) else 0.0
            sums.append(mass)
            if mass > 1 + MASS_TOLERANCE or (whole and banned < 0 and mass < 1 - MASS_TOLERANCE):
                message = f"the charges of {len(others)} possible tokens {t} stand for probabilities that sum to"
                self._violation("normalised", abs(mass - 1), f"{message} {mass:.6g}", position=int(t), sum=mass)
        told = ", ".join(f"{mass:.6g}" for mass in sums)
        every = "all" if whole else f"{PROBED_TARGETS} of {size}"
        seen = f"the charges of {every} possible targets at {len(sums)} places sum to {told}" if sums else "no place"
        if sums and whole and not self._fixed.any():
            self._passed["normalised"] = seen
        else:
            self._unknown("normalised", f"no distributions are shown; {seen}")
        self._unknown("score_first", "no distributions are shown")

    # -- what was found ----------------------------------------------------------------------------------------

    def _violation(self, condition: str, size: float, evidence: str, **numbers: float) -> None:
        """Keep the largest violation of each condition."""
        if condition not in self._worst or size > self._worst[condition][0]:
            finite = {"size": float(size)} if np.isfinite(size) else {}
            numbers = {key: float(value) if isinstance(value, float) else int(value) for key, value in numbers.items()}
            self._worst[condition] = float(size), Finding(Verdict.VIOLATION, evidence, finite | numbers)

    def _unknown(self, condition: str, evidence: str) -> None:
        if condition not in self._worst:
            self._worst[condition] = -1.0, Finding(Verdict.UNKNOWN, evidence)

    def findings(self) -> dict[str, Finding]:
        """One for each condition."""
        return {name: self._finding(name) for name in CONDITIONS}

    def _finding(self, name: str) -> Finding:
        if name in self._worst:
            return self._worst[name][1]
        passed = self._passed.get(name)
        return Finding(Verdict.PASS, passed) if passed else Finding(Verdict.UNKNOWN, "the scores were of no use")
