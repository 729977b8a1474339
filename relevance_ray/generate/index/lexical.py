"""BM25 over a catalog in shards, with the word counts of the whole: what one index over all of it would give.

A shard holds its postings, the lexicon how many products of the whole catalog have each word, so scores, and which words
of a query choose its products, hang on no shard. A query costs the same in a catalog of ten thousand products and of ten
million: its rarest words choose the products, up to `POSTINGS_BUDGET` hits, and all its words score those exactly (the
"continue" strategy of Moffat and Zobel, 1996). The trade-off: in a catalog with more hits than that, products that match
only a query's commonest words are not ranked. Words are known by their 64-bit hashes, so nothing but memory-mapped
arrays is needed to look one up.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import bm25s.stopwords
import numpy as np

from relevance_ray.errors import UserError
from relevance_ray.generate.index.arrays import mapped
from relevance_ray.generate.index.tops import Top, best
from relevance_ray.generate.options import STOPWORDS
from relevance_ray.tokens import tokenize

K1 = 1.2
B = 0.75
POSTINGS_BUDGET = 20_000


def word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def write_postings(texts: Iterable[Sequence[str]], folder: Path, languages: Sequence[str]) -> None:
    """Write the postings of one shard into a new folder.

    Args:
        texts: blocks of the shard's search texts, in the order of its products.
        folder: gets `words.npy` uint64 [w] (hashes, rising), `starts.npy` int64 [w + 1], `rows.npy` uint32 (of the
            shard, rising within a word), `counts.npy` uint16 (how often the word stands there), `lengths.npy` uint32
            [products].
        languages: whose stopwords are left out, of `STOPWORDS`.
    """
    listed = (word for name in languages for word in getattr(bm25s.stopwords, f"STOPWORDS_{STOPWORDS[name]}"))
    stopped = {parts[0] for word in listed if len(parts := tokenize(word)) == 1}
    numbers: dict[str, int] = {}
    tokens, lengths = array("I"), array("I")
    for block in texts:
        for text in block:
            found = [numbers.setdefault(word, len(numbers)) for word in tokenize(text) if word not in stopped]
            tokens.extend(found)
            lengths.append(len(found))
    hashes = np.asarray([word_hash(word) for word in numbers], dtype=np.uint64)
    by_hash = np.argsort(hashes)
    rank = np.empty(len(hashes), dtype=np.uint64)
    rank[by_hash] = np.arange(len(hashes), dtype=np.uint64)
    product = np.repeat(np.arange(len(lengths), dtype=np.uint64), np.asarray(lengths))
    postings, counts = np.unique((rank[np.asarray(tokens)] << np.uint64(32)) | product, return_counts=True)
    folder.mkdir(parents=True)
    np.save(folder / "words.npy", hashes[by_hash])
    np.save(folder / "starts.npy", np.searchsorted(postings >> np.uint64(32), np.arange(len(hashes) + 1)))
    np.save(folder / "rows.npy", postings.astype(np.uint32))
    np.save(folder / "counts.npy", np.minimum(counts, 2**16 - 1).astype(np.uint16))
    np.save(folder / "lengths.npy", np.asarray(lengths, dtype=np.uint32))


def build_lexicon(shards: Iterable[Path], folder: Path) -> None:
    """Add up the word counts of all shards into a new folder: `words.npy` uint64 [w], `frequencies.npy` int64 [w].

    Raises:
        UserError: no product has a word.
    """
    known, frequencies = np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.int64)
    num_products = num_words = 0
    for shard in shards:
        lengths = np.load(shard / "lengths.npy")
        num_products, num_words = num_products + len(lengths), num_words + int(lengths.sum())
        both = np.concatenate([known, np.load(shard / "words.npy")])
        known, where = np.unique(both, return_inverse=True)
        counted = np.concatenate([frequencies, np.diff(np.load(shard / "starts.npy"))])
        frequencies = np.bincount(where, weights=counted, minlength=len(known)).astype(np.int64)
    if not num_words:
        raise UserError("no product of the catalog has a word in its title; check the title column of the products")
    folder.mkdir(parents=True)
    np.save(folder / "words.npy", known)
    np.save(folder / "frequencies.npy", frequencies)
    (folder / "lexicon.json").write_text(
        json.dumps({"num_products": num_products, "mean_length": num_words / num_products}) + "\n"
    )


@dataclass(frozen=True)
class LexicalQuery:
    """A query as every shard takes it.

    Attributes:
        words: hashes of its known words, the rarest first.
        weights: their inverse document frequencies.
        num_open: how many of them choose products.
        stride: of the hits of a single word that is everywhere, one in so many stands for all.
    """

    words: tuple[int, ...]
    weights: tuple[float, ...]
    num_open: int
    stride: int


class Lexicon:
    """How many products of the whole catalog have each word, and how long they are."""

    def __init__(self, folder: Path) -> None:
        about = json.loads((folder / "lexicon.json").read_text())
        self.num_products, self.mean_length = int(about["num_products"]), float(about["mean_length"])
        self._words = mapped(folder / "words.npy")
        self._frequencies = mapped(folder / "frequencies.npy")

    def frequencies(self, hashes: Sequence[int]) -> list[int]:
        """In how many products the words of these hashes stand."""
        wanted = np.asarray(hashes, dtype=np.uint64)
        at = np.minimum(np.searchsorted(self._words, wanted), len(self._words) - 1)
        return np.where(self._words[at] == wanted, self._frequencies[at], 0).tolist()

    def query(self, text: str, budget: int = POSTINGS_BUDGET) -> LexicalQuery:
        """What a query asks of each shard. Stopwords are unknown words: no product was indexed by one."""
        hashes = [word_hash(word) for word in dict.fromkeys(tokenize(text))]
        known = sorted((df, word) for df, word in zip(self.frequencies(hashes), hashes, strict=True) if df)
        num_open, total = min(1, len(known)), known[0][0] if known else 0
        while num_open < len(known) and total + known[num_open][0] <= budget:
            total += known[num_open][0]
            num_open += 1
        stride = -(-total // budget) if num_open == 1 else 1
        # Lucene's form (Kamphuis et al., 2020), which is never negative.
        weights = [float(np.log1p((self.num_products - df + 0.5) / (df + 0.5))) for df, _ in known]
        return LexicalQuery(tuple(word for _, word in known), tuple(weights), num_open, stride)


class Postings:
    """One shard of the index.

    Args:
        folder: what `index_words` wrote.
        first_row: the catalog row of the shard's first product.
        keys: uint64, what the shard's products are drawn by.
        mean_length: words of a product of the whole catalog, on average.
    """

    def __init__(self, folder: Path, first_row: int, keys: np.ndarray, mean_length: float) -> None:
        self._words = mapped(folder / "words.npy")
        self._starts = mapped(folder / "starts.npy")
        self._rows = mapped(folder / "rows.npy")
        self._counts = mapped(folder / "counts.npy")
        self._first_row, self._keys = first_row, keys
        lengths = np.load(folder / "lengths.npy")
        self._norms = (K1 * (1 - B + B * lengths / mean_length)).astype(np.float32)
        self._scores: np.ndarray = np.zeros(len(lengths))

    def top(self, query: LexicalQuery, depth: int) -> Top:
        """The best products of this shard; those without one of the query's words are left out."""
        found, scores = self._opened(query)
        rest = list(zip(query.words, query.weights, strict=True))[query.num_open :]
        if rest and len(found) > depth:
            # What the other words can add, each less than its weight, does not lift a product above `depth` better ones.
            reachable = np.partition(scores, -depth)[-depth] - sum(weight for _, weight in rest)
            kept = scores >= reachable
            found, scores = found[kept], scores[kept]
        for word, weight in rest:
            span = self._span(word)
            rows = self._rows[span]
            if len(rows) and len(found):
                at = np.minimum(np.searchsorted(rows, found), len(rows) - 1)
                hit = rows[at] == found
                scores[hit] += self._added(weight, found[hit], self._counts[span][at[hit]])
        top = best(found, scores, depth)
        return Top(top.rows + self._first_row, top.scores)

    def _opened(self, query: LexicalQuery) -> tuple[np.ndarray, np.ndarray]:
        """The products that have one of the words that choose, uint32 [n], and what these words give them, float64 [n]."""
        lists = []
        for word, weight in zip(query.words[: query.num_open], query.weights, strict=False):
            span = self._span(word)
            rows, counts = self._rows[span], self._counts[span]
            if query.stride > 1:
                # Even the rarest word is everywhere: an even share of its products stands for all.
                kept = self._keys[rows] % np.uint64(query.stride) == 0
                rows, counts = rows[kept], counts[kept]
            if len(rows):
                lists.append((rows, self._added(weight, rows, counts)))
        if len(lists) < 2:
            return lists[0] if lists else (np.empty(0, dtype=np.uint32), np.empty(0))
        touched = []
        for rows, added in lists:
            before = self._scores[rows]
            self._scores[rows] = before + added
            touched.append(rows[before == 0.0])
        found = np.concatenate(touched)
        scores = self._scores[found]
        self._scores[found] = 0.0
        return found, scores

    def _added(self, weight: float, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """What a word adds to the scores of products that have it so often, float64 [n]."""
        times = counts.astype(np.float32)
        return weight * (times / (times + self._norms[rows])).astype(np.float64)

    def _span(self, word: int) -> slice:
        """Where the postings of a word lie; nowhere, if no product of this shard has it."""
        at = int(np.searchsorted(self._words, np.uint64(word)))
        if at == len(self._words) or int(self._words[at]) != word:
            return slice(0, 0)
        return slice(int(self._starts[at]), int(self._starts[at + 1]))
