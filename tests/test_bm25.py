"""BM25 of a pair, from the word counts of a catalog."""

from __future__ import annotations

from pathlib import Path

import bm25s
import numpy as np
import pytest
from tiny_engines import ESCI, PRODUCTS, bm25_folder

from relevance_ray.engines.bm25 import build_bm25_folder
from relevance_ray.engines.registry import load_pair_model
from relevance_ray.errors import UserError
from relevance_ray.templates import Template
from relevance_ray.tokens import tokenize


def test_bm25_equals_bm25s_on_every_pair(tmp_path: Path) -> None:
    model = load_pair_model(bm25_folder(tmp_path / "model"))
    documents = [tokenize(model.info.template.render_product(product)) for product in PRODUCTS]
    index = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    index.index(documents, show_progress=False)
    for query in ("red tent", "norrvik tent steel", "gas"):
        expected = index.get_scores(tokenize(query))
        np.testing.assert_allclose(model.logits([query] * 5, PRODUCTS), expected, rtol=1e-5, atol=1e-6)
    assert model.logits(["nothing matches"], PRODUCTS[:1]) == [0.0]


def test_bm25_of_an_empty_catalog_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of 0 products"):
        build_bm25_folder([], Template(), ESCI, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
