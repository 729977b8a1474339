"""Vectors of a catalog by a two-tower: exported, and found again by an index."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
from small_catalog import make_prepared, make_products
from tiny_training import SCALE, build_tiny_encoder

from relevance_ray.cluster.workers import Workers
from relevance_ray.config import build_config
from relevance_ray.engines.bi_encoder import BiEncoderModel
from relevance_ray.errors import UserError
from relevance_ray.steps import Chain
from relevance_ray.storage import CommitLog
from relevance_ray.student.cross_encoder import build_cross_encoder
from relevance_ray.student.two_tower import build_two_tower
from relevance_ray.student.vectors import read_vectors
from relevance_ray.student.vectors_pipeline import export_vectors
from relevance_ray.training.options import StudentOptions


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models")
    options = StudentOptions(kind="two_tower", model=str(build_tiny_encoder(folder / "encoder")), max_tokens=32)
    build_two_tower(options, SCALE, folder / "student", 0)
    return str(folder / "student")


def test_a_catalog_gets_its_vectors_and_an_index_finds_them(tmp_path: Path, model: str, ray_cluster: None) -> None:
    products = make_products(2)
    products[3] |= {"title": "", "brand": None, "color": None}
    prepared = make_prepared(tmp_path / "prepare", products, [], [])
    for path in (prepared / "products").glob("*.parquet"):
        pq.write_table(pq.read_table(path), path, row_group_size=100)
    out = str(tmp_path / "vectors")
    done = export_vectors(model, str(prepared), out, "key", Workers(2))
    assert done == {"products": 479, "shards": 6, "skipped": 0}
    log = CommitLog(out)
    files = log.files()
    log.drop(next(iter(log.committed())))
    assert export_vectors(model, str(prepared), out, "key", Workers(2)) == done | {"skipped": 5}
    assert set(files[1:]) <= set(CommitLog(out).files())

    ids, vectors = [], []
    for names, found in read_vectors(out):
        ids += names
        vectors.append(found)
    together = np.concatenate(vectors)
    assert ids == [p["product_id"] for place, p in enumerate(products) if place != 3]
    loaded = BiEncoderModel(model)
    some = [products[place] for place in (0, 7, 300)]
    texts = [loaded.info.template.render_product(product) for product in some]
    rows = [ids.index(product["product_id"]) for product in some]
    np.testing.assert_allclose(together[rows], loaded.encoder.embed(texts), atol=1e-5)

    index = faiss.IndexFlatIP(together.shape[1])
    index.add(together)
    query = loaded.encoder.embed(["red lamp"])
    scores, found_rows = index.search(query, 10)
    by_id = {product["product_id"]: product for product in products}
    logits = loaded.logits(["red lamp"] * 10, [by_id[ids[row]] for row in found_rows[0]])
    np.testing.assert_allclose(logits, loaded.logit_scale * (scores[0] - loaded.bias), atol=1e-3)


def test_a_model_without_vectors_is_refused_before_anything_is_done(tmp_path: Path, ray_cluster: None) -> None:
    options = StudentOptions(model=str(build_tiny_encoder(tmp_path / "encoder")), max_tokens=32)
    build_cross_encoder(options, SCALE, tmp_path / "student", 0)
    with pytest.raises(
        UserError, match=r"is a cross_encoder, which has no vectors; train with student\.kind=two_tower"
    ):
        export_vectors(str(tmp_path / "student"), "nowhere", str(tmp_path / "out"), "key", Workers(1))
    chain = Chain(build_config({"storage": {"root": str(tmp_path / "root")}}))
    with pytest.raises(UserError, match=r"set student\.kind=two_tower"):
        chain.run("embed")
    assert not (tmp_path / "root").exists()
