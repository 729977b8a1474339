"""What every engine does, whoever runs the model: a new one is one line of `CASES`."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_endpoint import ChatEndpoint
from tiny_engines import ESCI, PRODUCTS, QUERIES, as_pairs, bm25_folder, cross_encoder_folder, ensemble_folder
from tiny_writers import writer_folder

from relevance_ray.data.market_truth import MARKET_SCALE
from relevance_ray.engines.base import Engine, Pair
from relevance_ray.engines.bi_encoder import build_bi_encoder_folder
from relevance_ray.engines.options import EngineOptions, OpenAIOptions
from relevance_ray.engines.query_likelihood import build_query_likelihood_folder
from relevance_ray.engines.registry import open_engine
from relevance_ray.models import resolve_model
from relevance_ray.templates import Template

EngineFactory = Callable[[], Engine]

ROTTEN: list[tuple[Any, Any]] = [
    ("", PRODUCTS[0]),
    (None, PRODUCTS[0]),
    ("te\x00nt", PRODUCTS[0]),
    ("tent \ud800", PRODUCTS[0]),
    ("tent " * 200_000, PRODUCTS[0]),
    ("tent", {"title": 5}),
    ("tent", {"title": "x" * 1_000_000}),
    ("tent", None),
]


def labels_file(out: Path) -> Path:
    """Grades of the healthy pairs."""
    rows = [f"{query},{row},{grade}" for row, (query, grade) in enumerate(zip(QUERIES, "EICSE", strict=True))]
    out.write_text("\n".join(["query,product_id,grade", *rows, ""]))
    return out


def model(options: EngineOptions, folder: Path) -> EngineFactory:
    return partial(open_engine, options, folder, ESCI)


def endpoint_options() -> EngineOptions:
    """Of an endpoint that serves until the tests end, in a thread that ends with them."""
    endpoint = ChatEndpoint().__enter__()
    return EngineOptions(engine="openai", openai=OpenAIOptions(model="judge", base_url=endpoint.url))


TRANSFORMERS = EngineOptions()
CASES: dict[str, Callable[[Path], EngineFactory]] = {
    "transformers": lambda path: model(TRANSFORMERS, cross_encoder_folder(path / "m", num_labels=4)),
    "ensemble": lambda path: model(TRANSFORMERS, ensemble_folder(path / "m")),
    "bi_encoder": lambda path: model(TRANSFORMERS, build_bi_encoder_folder(resolve_model("minilm"), ESCI, path / "m")),
    "query_likelihood": lambda path: model(
        TRANSFORMERS,
        build_query_likelihood_folder("w", writer_folder(path / "w"), ESCI, Template(max_tokens=128), path / "m"),
    ),
    "bm25": lambda path: model(TRANSFORMERS, bm25_folder(path / "m")),
    "oracle": lambda path: partial(open_engine, EngineOptions(engine="oracle"), None, MARKET_SCALE),
    "file": lambda path: partial(
        open_engine, EngineOptions(engine="file", path=str(labels_file(path / "labels.csv"))), None, ESCI
    ),
    "openai": lambda path: partial(open_engine, endpoint_options(), None, ESCI),
    "vllm": lambda path: model(EngineOptions(engine="vllm"), cross_encoder_folder(path / "m", num_labels=4)),
}
NEEDS = {"vllm": "vllm", "openai": "openai"}
"""The module without which an engine's case is skipped."""


@pytest.fixture(scope="module", params=CASES)
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine opened as an actor opens it: by a factory that was pickled."""
    module = NEEDS.get(request.param)
    if module is not None and importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed in this environment")
    factory = CASES[request.param](tmp_path_factory.mktemp("engine"))
    engine = pickle.loads(pickle.dumps(factory))()
    yield engine
    if (close := getattr(engine, "close", None)) is not None:
        close()


def healthy() -> list[Pair]:
    return as_pairs(QUERIES, PRODUCTS)


def test_each_pair_has_a_label_in_its_place(engine: Engine) -> None:
    pairs = healthy()
    labels = engine.label(pairs)
    assert labels.class_logits.dtype == np.float32
    assert labels.class_logits.shape == (len(pairs), len(engine.gains))
    assert np.isfinite(labels.class_logits).all()
    assert labels.errors == [None] * len(pairs)
    assert len(labels.rationales) == len(pairs)
    assert np.ptp(labels.class_logits[:, -1]) > 1e-3
    backwards = engine.label(pairs[::-1]).class_logits
    np.testing.assert_allclose(backwards, labels.class_logits[::-1], atol=1e-4)


def test_tokens_are_counted_where_there_are_any(engine: Engine, request: pytest.FixtureRequest) -> None:
    before = engine.num_tokens
    engine.label(healthy())
    counts_none = any(name in request.node.name for name in ("bm25", "oracle", "file"))
    assert (engine.num_tokens > before) is not counts_none


def test_the_gains_reach_from_0_to_1(engine: Engine) -> None:
    assert {min(engine.gains), max(engine.gains)} == {0.0, 1.0}


def test_a_rotten_row_is_an_error_and_disturbs_no_other(engine: Engine) -> None:
    expected = engine.label(healthy()).class_logits
    rotten = [Pair(100 + index, query, f"rotten {index}", product) for index, (query, product) in enumerate(ROTTEN)]
    pairs = healthy()
    pairs[2:2] = rotten
    labels = engine.label(pairs)
    bad = list(range(2, 2 + len(rotten)))
    np.testing.assert_allclose(np.delete(labels.class_logits, bad, axis=0), expected, atol=1e-4)
    for row in bad:
        assert labels.errors[row], ROTTEN[row - 2]
        assert np.isnan(labels.class_logits[row]).all()
    only = engine.label(rotten)
    assert all(only.errors)
    assert np.isnan(only.class_logits).all()


def test_no_pairs_have_no_labels(engine: Engine) -> None:
    labels = engine.label([])
    assert labels.class_logits.shape == (0, len(engine.gains))
    assert labels.errors == labels.rationales == []


def test_the_same_pairs_have_the_same_labels(engine: Engine) -> None:
    first, second = engine.label(healthy()), engine.label(healthy())
    np.testing.assert_allclose(first.class_logits, second.class_logits, atol=1e-5)
