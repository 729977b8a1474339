"""Where generated queries drift from the log, and candidates from the catalog, in figures and in sentences.

One rule for every check: a difference drifts where it is larger than the *noise* by more than a *margin*. The noise is what
random samples of the same size would show without any drift: of queries, the largest difference in `DRAWS` splits of the
log into two random parts; of categories, the largest in `DRAWS` draws of as many products as there are groups. The margin is
what it takes for a tenth of the queries to be of a kind that the log lacks: a tenth of a share, and about half of that in
bits of a Jensen-Shannon divergence (`counting.divergence`). Candidates follow what is searched for and not only what is on
the shelf, so categories may differ by twice as much.
The parts of a log are at most half of it, so the noise is rather too high than too low.

A log is compared as a list, as traffic, and between the two (`VIEWS`), and the nearest counts: a run may draw by any power
of the frequency.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from relevance_ray.generate.diversity.counting import KeySample, divergence
from relevance_ray.generate.diversity.query_figures import MAX_CHARS, MAX_WORDS, QueryStats
from relevance_ray.generate.diversity.query_text import TYPES, TypeRules, words
from relevance_ray.tokens import tokenize

DRAWS = 20
SHARE_MARGIN = 0.10
BITS_MARGIN = 0.05
CATEGORY_MARGIN = 2 * BITS_MARGIN
MIN_LOG = 50
"""Fewer different queries than these say nothing about a log."""

STARVED = 0.1
"""A category is starved where it has less than this part of the candidates that its share of the catalog would give it."""

MIN_CATEGORY = 0.01
"""Categories with a smaller share of the catalog are not warned of one by one."""


@dataclass(frozen=True)
class Check:
    """One comparison: `value` drifts where it is above `threshold` = noise + margin.

    Attributes:
        figure: what was compared.
        unit: "bits" of divergence or "share".
        sentence: said where it drifts, with its figures.
    """

    figure: str
    unit: str
    value: float
    noise: float
    threshold: float
    sentence: str

    @property
    def drifts(self) -> bool:
        return self.value > self.threshold

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"drifts": self.drifts}


class LogTexts:
    """The sampled texts of a log, read once for all comparisons."""

    def __init__(self, log: QueryStats, rules: TypeRules) -> None:
        texts = log.sample.in_random_order()
        self.num_words = np.array([min(len(words(text)), MAX_WORDS) for text in texts])
        self.num_chars = np.array([min(len(text), MAX_CHARS) for text in texts])
        found = [rules.types(text) for text in texts]
        self.types = {name: np.array([name in types for types in found]) for name in TYPES}
        self.tokens = [tokenize(text) for text in texts]


class LogNoise:
    """How far random parts of a log lie apart: the differences between two disjoint samples of `size` queries each."""

    def __init__(self, texts: LogTexts, size: int, seed: int) -> None:
        num_texts = len(texts.tokens)
        self.size = max(1, min(size, num_texts // 2))
        self._texts = texts
        rng = np.random.default_rng(seed)
        self._parts = [np.split(rng.permutation(num_texts)[: 2 * self.size], 2) for _ in range(DRAWS)]

    def lengths(self, chars: bool) -> float:
        """Bits between the histograms of lengths, the largest of all draws."""
        values = self._texts.num_chars if chars else self._texts.num_words
        return self._largest(
            lambda a, b: divergence(np.bincount(values[a], minlength=200), np.bincount(values[b], minlength=200))
        )

    def type_share(self, name: str) -> float:
        has = self._texts.types[name]
        return self._largest(lambda a, b: abs(has[a].mean() - has[b].mean()))

    def unknown_words(self, texts: Sequence[str]) -> tuple[float, float]:
        """Shares of word occurrences that a part of the log does not hold: of other texts (mean over the draws), and of
        the other part (the largest)."""
        own, other = [], []
        given = [tokenize(text) for text in texts]
        for a, b in self._parts:
            known = {token for index in a for token in self._texts.tokens[index]}
            own.append(_unknown([self._texts.tokens[index] for index in b], known))
            other.append(_unknown(given, known))
        return float(np.mean(other)), float(np.max(own))

    def _largest(self, difference: Callable[[np.ndarray, np.ndarray], float | None]) -> float:
        return float(max(difference(a, b) or 0.0 for a, b in self._parts))


def _unknown(texts: Sequence[list[str]], known: set[str]) -> float:
    total = sum(len(text) for text in texts)
    return sum(token not in known for text in texts for token in text) / total if total else 0.0


def query_checks(
    generated: QueryStats, log: QueryStats, texts: LogTexts, sources: Mapping[str, QueryStats], seed: int
) -> tuple[list[Check], str]:
    """Checks of the generated queries against the log, and why there are none where it is too small.

    Args:
        generated: all generated queries; `sources`: the same by query source, for the sentences.
        log: under all `VIEWS`; `texts` are its sampled ones.
    """
    if not log.sample.total:
        return [], "there is no query log, so drift from it could not be checked"
    if len(log.sample.counts) < MIN_LOG:
        few = len(log.sample.counts)
        return [], f"the log has {few} different queries, so drift from it could not be checked; it takes {MIN_LOG}"
    if not generated.sample.total:
        return [], "there are no generated queries to check"
    noise = LogNoise(texts, len(generated.sample.counts), seed)
    checks = [_length_check(generated, log, sources, noise, chars) for chars in (False, True)]
    checks += [_type_check(name, generated, log, sources, noise) for name in TYPES]
    unknown, own = noise.unknown_words(generated.sample.in_random_order()[: noise.size])
    by_source = {
        name: f"{noise.unknown_words(stats.sample.in_random_order()[: noise.size])[0]:.0%}"
        for name, stats in sources.items()
    }
    sentence = (
        f"{unknown:.0%} of the words of generated queries{_of_sources(by_source)} do not occur in a sample of "
        f"{noise.size:,} queries of the log; of the words of as many other log queries {own:.0%} do not."
    )
    checks.append(Check("vocabulary", "share", unknown, own, own + SHARE_MARGIN, sentence))
    return checks, ""


def _length_check(
    generated: QueryStats, log: QueryStats, sources: Mapping[str, QueryStats], noise: LogNoise, chars: bool
) -> Check:
    unit = "characters" if chars else "words"
    own = (generated.num_chars if chars else generated.num_words)[0]
    views = log.num_chars if chars else log.num_words
    bits = [divergence(own, view) or 0.0 for view in views]
    shares, of_log = own / own.sum(), views[int(np.argmin(bits))] / views[int(np.argmin(bits))].sum()
    far = int(np.argmax(np.abs(shares - of_log)))
    column = 1 if chars else 0
    log_means = log.mean_lengths()[:, column]
    by_source = {name: f"{stats.mean_lengths()[0, column]:.1f}" for name, stats in sources.items()}
    level = noise.lengths(chars)
    sentence = (
        f"Generated queries have {generated.mean_lengths()[0, column]:.1f} {unit} on average{_of_sources(by_source)}, those "
        f"of the log {_span(log_means, '.1f')}; {shares[far]:.0%} of them have {far}, of the log's {of_log[far]:.0%}. The "
        f"distributions are {min(bits):.3f} bits apart, random parts of the log {level:.3f}."
    )
    return Check(f"length in {unit}", "bits", min(bits), level, level + BITS_MARGIN, sentence)


def _type_check(
    name: str, generated: QueryStats, log: QueryStats, sources: Mapping[str, QueryStats], noise: LogNoise
) -> Check:
    own = float(generated.type_shares()[name][0])
    views = log.type_shares()[name]
    level = noise.type_share(name)
    by_source = {source: f"{stats.type_shares()[name][0]:.0%}" for source, stats in sources.items()}
    sentence = (
        f'{own:.0%} of the generated queries{_of_sources(by_source)} are of type "{name}", of the log '
        f"{_span(views, '.0%')}."
    )
    value = 0.0 if views.min() <= own <= views.max() else float(np.abs(own - views).min())
    return Check(f"type {name}", "share", value, level, level + SHARE_MARGIN, sentence)


def _of_sources(values: Mapping[str, str]) -> str:
    if len(values) < 2:
        return ""
    return f" ({', '.join(f'{name} {value}' for name, value in sorted(values.items()))})"


def _span(values: np.ndarray, form: str) -> str:
    """The log's figure over its views: one number, or the least and the most."""
    low, high = format(float(values.min()), form), format(float(values.max()), form)
    return low if low == high else f"{low} to {high} (each once, or as often as it was typed)"


def category_checks(catalog: KeySample, generated: KeySample, num_groups: int, seed: int) -> list[Check]:
    """Checks of the candidates' top-level categories against the catalog's: their divergence, and each large category that
    the candidates all but leave out."""
    names, supply, found = catalog.shared(generated)
    if len(names) < 2 or not found.sum():
        return []
    expected, shares = supply / supply.sum(), found / found.sum()
    draws = np.random.default_rng(seed).multinomial(num_groups, expected, size=DRAWS)
    noise = max(divergence(draw, expected) or 0.0 for draw in draws)
    bits = divergence(found, supply) or 0.0
    far = int(np.argmax(np.abs(shares - expected)))
    sentence = (
        f"Candidates are spread over categories otherwise than the catalog: {bits:.3f} bits apart, random "
        f'draws {noise:.3f}; "{names[far]}" holds {shares[far]:.1%} of the candidates and {expected[far]:.1%} of the '
        "catalog."
    )
    checks = [Check("categories", "bits", bits, noise, noise + CATEGORY_MARGIN, sentence)]
    for index in np.flatnonzero(expected >= MIN_CATEGORY):
        wanted = expected[index] * num_groups
        if wanted < 10 or shares[index] >= STARVED * expected[index]:  # 0 of 10 expected is chance once in 20,000
            continue
        missing = 1 - shares[index] / expected[index]
        sentence = (
            f'Category "{names[index]}" holds {expected[index]:.1%} of the catalog and {shares[index]:.1%} of the '
            "candidates."
        )
        checks.append(Check(f"category {names[index]}", "share", missing, 0.0, 1 - STARVED, sentence))
    return checks
