"""BM25 of a given pair, from the statistics of a corpus: a baseline, and a member of an ensemble.

Ranking a whole catalog is another matter and wants an index. Here a pair is scored from its own two texts, so a model
folder needs only the document frequencies, and one pass over a catalog of any size makes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from relevance_ray.engines.base import SINGLE_LOGIT_GAINS, FolderModel
from relevance_ray.errors import UserError
from relevance_ray.model_folder import ModelInfo, read_model_info, staged_folder, write_model_info
from relevance_ray.schema import LabelScale
from relevance_ray.templates import Template
from relevance_ray.tokens import tokenize

K1 = 1.2
B = 0.75
_VOCABULARY = "vocabulary.parquet"


class BM25Model(FolderModel):
    """A model folder of kind bm25: class logits [0, score].

    The score is Lucene's (Kamphuis et al., 2020): over the words w of the query, repeated ones counted again,
    `log(1 + (N - df + .5) / (df + .5)) * tf / (tf + k1 * (1 - b + b * length / mean length))`.
    """

    gains = SINGLE_LOGIT_GAINS

    def __init__(self, folder: str | Path) -> None:
        self.info = read_model_info(folder)
        vocabulary = pq.read_table(Path(folder) / _VOCABULARY)
        frequency = vocabulary["document_frequency"].to_numpy()
        num_products = int(self.info.extra["num_products"])
        self._unseen_idf = float(_lucene_idf(np.zeros(1), num_products)[0])
        self._idf = dict(
            zip(vocabulary["word"].to_pylist(), _lucene_idf(frequency, num_products).tolist(), strict=True)
        )
        self._mean_length = float(self.info.extra["mean_length"])

    def _forward(
        self, queries: Sequence[str], products: Sequence[Mapping[str, Any]]
    ) -> tuple[np.ndarray, list[str | None]]:
        class_logits = np.zeros((len(queries), 2), dtype=np.float32)
        query_words = {query: tokenize(query) for query in dict.fromkeys(queries)}
        for row, (query, product) in enumerate(zip(queries, products, strict=True)):
            class_logits[row, 1] = self._score(query_words[query], tokenize(self.info.template.render_product(product)))
        return class_logits, [None] * len(queries)

    def _score(self, query: list[str], document: list[str]) -> float:
        counts = Counter(document)
        saturation = K1 * (1 - B + B * len(document) / self._mean_length)
        found = ((word, counts[word]) for word in query if word in counts)
        return sum(self._idf.get(word, self._unseen_idf) * tf / (tf + saturation) for word, tf in found)


def build_bm25_folder(products: Iterable[pa.Table], template: Template, scale: LabelScale, out: str | Path) -> Path:
    """Make a model folder of kind bm25 in one pass over a catalog; `out` appears whole.

    Args:
        products: blocks of the PRODUCT schema.
        template: which fields make the document.

    Raises:
        UserError: no product has a word in those fields.
    """
    frequency: Counter[str] = Counter()
    num_products = num_words = 0
    for block in products:
        names = [name for name in (*template.fields, "title") if name in block.column_names]
        for product in block.select(list(dict.fromkeys(names))).to_pylist():
            document = tokenize(template.render_product(product))
            frequency.update(set(document))
            num_products += 1
            num_words += len(document)
    if num_words == 0:
        fields = ", ".join(template.fields)
        raise UserError(f"none of {num_products} products has a word in {fields}; BM25 needs a catalog with text")
    extra = {"num_products": num_products, "mean_length": num_words / num_products}
    vocabulary = sorted(frequency.items())
    table = pa.table(
        {
            "word": pa.array([word for word, _ in vocabulary], pa.string()),
            "document_frequency": pa.array([count for _, count in vocabulary], pa.int64()),
        }
    )
    with staged_folder(out) as partial:
        pq.write_table(table, partial / _VOCABULARY)
        write_model_info(partial, ModelInfo("bm25", scale, template, extra=extra))
    return Path(out)


def _lucene_idf(document_frequency: np.ndarray, num_products: int) -> np.ndarray:
    return np.log1p((num_products - document_frequency + 0.5) / (document_frequency + 0.5))
