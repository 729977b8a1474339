"""Splits by query, and the guard that keeps held-out queries out of training.

A query is held out together with its near-duplicates, accents aside: equal after normalisation, the same words in another
order, or a Jaccard similarity of at least .8 between their sets of character 3-grams. Similar pairs are found with a
prefix filter (Chaudhuri, Ganti and Kaushik 2006; Bayardo, Ma and Srikant 2007) rather than MinHash: it is exact, so a leak
is never missed by chance, and at the few thousand queries of judged sets it is as fast.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from relevance_ray.errors import UserError
from relevance_ray.schema import normalize_query
from relevance_ray.tokens import without_accents

SIMILARITY = 0.8
"""Jaccard similarity of character 3-grams from which two queries are near-duplicates."""

SPLITS = ("train", "dev", "test")
_OFFICIAL = {"train": "train", "training": "train", "test": "test"} | dict.fromkeys(
    ("dev", "val", "valid", "validation"), "dev"
)
_WORD = re.compile(r"\w+")


def query_hash(query: str) -> int:
    """A stable non-negative int64 hash of the normalised query: BLAKE2b-64, the same on every machine."""
    digest = hashlib.blake2b(normalize_query(query).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def words_key(query: str) -> str:
    """Equal for queries of the same words in another order, with other punctuation, or without their accents."""
    plain = _plain(query)
    return " ".join(sorted(_WORD.findall(plain))) or plain


def _plain(query: str) -> str:
    return without_accents(normalize_query(query))


def _grams(query: str) -> frozenset[str]:
    padded = f" {_plain(query)} "
    return frozenset(padded[i : i + 3] for i in range(max(len(padded) - 2, 1)))


class LeakGuard:
    """Tells whether a query is one of the protected ones or a near-duplicate of one.

    Args:
        protected_queries: the held-out queries, as written.

    Near-duplicates are exact, not probabilistic: two sets with Jaccard similarity t or more share at least one of the
    `|x| - ceil(t |x|) + 1` rarest grams of each, so only queries that share such a gram are compared.
    """

    def __init__(self, protected_queries: Iterable[str]) -> None:
        self._normals = sorted({normalize_query(query) for query in protected_queries})
        self._grams = [_grams(normal) for normal in self._normals]
        self._counts: Counter[str] = Counter(gram for grams in self._grams for gram in grams)
        self._by_word_key: dict[str, list[int]] = defaultdict(list)
        self._by_gram: dict[str, list[int]] = defaultdict(list)
        for index, (normal, grams) in enumerate(zip(self._normals, self._grams, strict=True)):
            self._by_word_key[words_key(normal)].append(index)
            for gram in self._prefix(grams):
                self._by_gram[gram].append(index)

    def __len__(self) -> int:
        return len(self._normals)

    def is_leak(self, query: str) -> bool:
        """Whether `query` equals a protected query or is a near-duplicate of one."""
        return next(self._near(normalize_query(query)), None) is not None

    def near_duplicates(self, query: str) -> list[str]:
        """The protected queries, normalised and sorted, that `query` equals or nearly duplicates."""
        return [self._normals[index] for index in sorted(set(self._near(normalize_query(query))))]

    def _prefix(self, grams: frozenset[str]) -> list[str]:
        rarest_first = sorted(grams, key=lambda gram: (self._counts[gram], gram))
        return rarest_first[: len(grams) - math.ceil(SIMILARITY * len(grams)) + 1]

    def _near(self, normal: str) -> Iterator[int]:
        yield from self._by_word_key.get(words_key(normal), ())
        grams = _grams(normal)
        seen: set[int] = set()
        for gram in self._prefix(grams):
            for index in self._by_gram.get(gram, ()):
                other = len(self._grams[index])
                if index not in seen and SIMILARITY * len(grams) <= other <= len(grams) / SIMILARITY:
                    seen.add(index)
                    shared = len(grams & self._grams[index])
                    if shared >= SIMILARITY * (len(grams) + other - shared):
                        yield index


def near_duplicate_clusters(queries: Iterable[str]) -> dict[str, str]:
    """Maps each normalised query to the first (in sorted order) of its cluster; near-duplicates of near-duplicates are
    in one cluster."""
    normals = sorted({normalize_query(query) for query in queries})
    guard = LeakGuard(normals)
    parent = {normal: normal for normal in normals}

    def root(normal: str) -> str:
        while parent[normal] != normal:
            parent[normal] = parent[parent[normal]]
            normal = parent[normal]
        return normal

    for normal in normals:
        for other in guard.near_duplicates(normal):
            first, second = sorted((root(normal), root(other)))
            parent[second] = first
    return {normal: root(normal) for normal in normals}


def assign_splits(
    judgments: pa.Table, test_percent: int = 15, dev_percent: int = 15, folds: int = 0, fold: int = 0
) -> tuple[pa.Table, int]:
    """Gives every judgment its split, by query.

    Args:
        judgments: a table with columns `query` and `split` (official names, or null where there is none).
        test_percent: without an official test split, queries whose hash modulo 100 is below this are test.
        dev_percent: without an official dev split, this percentage next to it is dev, taken from train.
        folds: if positive, official splits are set aside and test is the queries of fold `fold` of `folds`.
        fold: which fold is test.

    Returns:
        The table with `split` train, dev or test, and the number of judgments dropped: those of train (or dev) queries
        that nearly duplicate a query of the official test (or dev) split.

    Near-duplicate queries share one hash, that of the first of their cluster, so they land in the same split.

    Raises:
        UserError: an unknown split name.
    """
    queries = [normalize_query(query) for query in judgments["query"].to_pylist()]
    cluster_of = near_duplicate_clusters(queries)
    official = [None] * len(queries) if folds else _official_splits(judgments)
    official_names = set(official)
    held_out: dict[str, str] = {}  # cluster -> its most protected official split
    for normal, name in zip(queries, official, strict=True):
        if name == "test" or (name == "dev" and held_out.get(cluster_of[normal]) != "test"):
            held_out[cluster_of[normal]] = name
    splits: list[str] = []
    keep = np.ones(len(queries), dtype=bool)
    hashes = {cluster: query_hash(cluster) for cluster in set(cluster_of.values())}
    for row, (normal, name) in enumerate(zip(queries, official, strict=True)):
        cluster = cluster_of[normal]
        bucket = hashes[cluster] % 100
        if cluster in held_out:
            keep[row] = name == held_out[cluster]
            splits.append(held_out[cluster])
        elif (
            hashes[cluster] // 100 % folds == fold if folds else "test" not in official_names and bucket < test_percent
        ):
            splits.append("test")
        elif "dev" not in official_names and test_percent <= bucket < test_percent + dev_percent:
            splits.append("dev")
        else:
            splits.append("train")
    index = judgments.schema.get_field_index("split")
    out = judgments.set_column(index, pa.field("split", pa.string(), nullable=False), pa.array(splits, pa.string()))
    return out.filter(pa.array(keep)), int((~keep).sum())


def _official_splits(judgments: pa.Table) -> list[str | None]:
    out: list[str | None] = []
    for row, name in enumerate(judgments["split"].to_pylist()):
        if name is not None and name.strip().lower() not in _OFFICIAL:
            number = judgments["row"][row].as_py() if "row" in judgments.column_names else row + 1
            raise UserError(
                f"judgments, row {number}: split {name!r} is none of train, dev, test; mend or drop the column"
            )
        out.append(None if name is None else _OFFICIAL[name.strip().lower()])
    return out


def check_no_leak(judgments: pa.Table) -> None:
    """Stops where a query of dev or test, or a near-duplicate of one, is in a split that is trained on before it.

    Args:
        judgments: a table with columns `query` and `split` (train, dev or test).

    Raises:
        UserError: names the first such pair of queries.
    """
    by_split: dict[str, set[str]] = {name: set() for name in SPLITS}
    for query, split in zip(judgments["query"].to_pylist(), judgments["split"].to_pylist(), strict=True):
        by_split[split].add(query)
    for held_out, others in (("test", ("train", "dev")), ("dev", ("train",))):
        guard = LeakGuard(by_split[held_out])
        for other in others:
            for query in sorted(by_split[other]):
                if found := guard.near_duplicates(query):
                    raise UserError(
                        f"the {other} query {query!r} leaks from {held_out}: it nearly duplicates {found[0]!r}; "
                        f"put both in one split"
                    )
