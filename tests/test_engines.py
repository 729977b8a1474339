"""Engines on real, small models: parity with the references, rotten rows, and stacking."""

from __future__ import annotations

import importlib.util
import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_engines import ESCI, PRODUCTS, QUERIES, as_pairs
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from relevance_ray.calibration import logit_of_classes
from relevance_ray.engines import bm25
from relevance_ray.engines.base import Pair
from relevance_ray.engines.bi_encoder import TextEncoder, build_bi_encoder_folder
from relevance_ray.engines.encoding import PairEncoder, token_batches
from relevance_ray.engines.ensemble import build_ensemble_folder, fit_stack, stack_logits
from relevance_ray.engines.file import FileEngine
from relevance_ray.engines.options import EngineOptions, VllmOptions
from relevance_ray.engines.registry import load_pair_model, open_engine
from relevance_ray.errors import UserError
from relevance_ray.model_folder import ModelInfo, ModelKind, finish_folder
from relevance_ray.models import resolve_model
from relevance_ray.schema import PRODUCT
from relevance_ray.templates import Template


def save_classifier(folder: Path, num_labels: int, template: Template, kind: ModelKind = "cross_encoder") -> Path:
    torch.manual_seed(num_labels)
    source = resolve_model("minilm")
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=num_labels, num_hidden_layers=1)
    model.classifier.weight.data.normal_(0, 1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    finish_folder(folder, ModelInfo(kind, ESCI, template))
    return folder


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("cross_encoder"), 1, Template(max_tokens=48))


@pytest.fixture(scope="module")
def bi_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_bi_encoder_folder(resolve_model("minilm"), ESCI, tmp_path_factory.mktemp("bi") / "model")


@pytest.fixture(scope="module")
def bm25_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bm25.build_bm25_folder(catalog(), Template(), ESCI, tmp_path_factory.mktemp("bm25") / "model")


def catalog() -> list[pa.Table]:
    rows = [{"product_id": str(index), **product} for index, product in enumerate(PRODUCTS)]
    return [pa.Table.from_pylist(part, schema=PRODUCT) for part in (rows[:2], rows[2:])]


# Encoding


@pytest.mark.parametrize("max_tokens", [16, 48, 128])
def test_pair_ids_equal_the_tokenizers_own(max_tokens: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("minilm"))
    template = Template(max_tokens=max_tokens)
    encoded = PairEncoder(tokenizer, template).encode(QUERIES, PRODUCTS)
    assert encoded.errors == [None] * len(QUERIES)
    assert encoded.token_type_ids is not None
    for row, (query, product) in enumerate(zip(QUERIES, PRODUCTS, strict=True)):
        text = template.render_product(product)
        expected = tokenizer(query, text, truncation="only_second", max_length=max_tokens, return_token_type_ids=True)
        assert encoded.input_ids[row].tolist() == expected["input_ids"]
        assert encoded.token_type_ids[row].tolist() == expected["token_type_ids"]
        assert encoded.truncated[row] == (len(tokenizer(query, text)["input_ids"]) > max_tokens)


def test_query_is_never_cut() -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("minilm"))
    encoder = PairEncoder(tokenizer, Template(max_tokens=16))
    # 16 tokens less [CLS], two [SEP] and one of the product leave 12.
    encoded = encoder.encode([" ".join(["tent"] * 12), " ".join(["tent"] * 13)], [PRODUCTS[1]] * 2)
    assert encoded.lengths.tolist() == [16, 0]
    assert encoded.errors[0] is None
    assert encoded.errors[1] == "the query has more than the 12 tokens that fit beside a product (max_tokens 16)"


def test_prompt_keeps_query_and_question_whole() -> None:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("minilm"))
    template = Template(fields=("title",), max_tokens=24, prompt="query: {query} product: {product} relevant?")
    encoder = PairEncoder(tokenizer, template)
    encoded = encoder.encode(["red tent", "red [SEP] tent"], [PRODUCTS[1], {"title": "pegs"}])
    assert tokenizer.decode(encoded.input_ids[0]) == (
        "[CLS] query : red tent product : tent pegs, " + "steel " * 11 + "relevant?"
    )
    assert encoded.lengths[0] == 24
    # A special token that a shopper types is text.
    assert tokenizer.sep_token_id not in encoded.input_ids[1]


def test_padding_marks_what_is_real() -> None:
    encoder = PairEncoder(AutoTokenizer.from_pretrained(resolve_model("minilm")), Template())
    encoded = encoder.encode(QUERIES, PRODUCTS)
    batch = encoded.pad([4, 0])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, encoded.lengths[0])
    assert batch["attention_mask"].sum(axis=1).tolist() == encoded.lengths[[4, 0]].tolist()
    assert (batch["input_ids"][0, encoded.lengths[4] :] == encoder.pad_token_id).all()


def test_token_batches_hold_every_row_within_the_budget() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, size=500)
    lengths[7], lengths[9] = 0, 900
    batches = token_batches(lengths, 400)
    rows = np.concatenate(batches)
    assert sorted(rows) == [row for row in range(500) if row != 7]
    assert batches[0].tolist() == [9]
    assert all(lengths[batch].max() * len(batch) <= 400 for batch in batches[1:])
    assert len(batches) < 1.2 * lengths.sum() / 400
    assert token_batches([], 400) == []


# Sequence classification


def test_logits_equal_a_plain_forward_pass(cross_encoder: Path) -> None:
    model = load_pair_model(cross_encoder, max_batch_tokens=64)
    tokenizer = AutoTokenizer.from_pretrained(cross_encoder)
    plain = AutoModelForSequenceClassification.from_pretrained(cross_encoder).eval()
    expected = []
    for query, product in zip(QUERIES, PRODUCTS, strict=True):
        text = model.info.template.render_product(product)
        inputs = tokenizer(query, text, truncation="only_second", max_length=48, return_tensors="pt")
        with torch.no_grad():
            expected.append(plain(**inputs).logits.item())
    np.testing.assert_allclose(model.logits(QUERIES, PRODUCTS), expected, atol=1e-4)
    assert model.class_logits(QUERIES, PRODUCTS)[:, 0].tolist() == [0.0] * len(QUERIES)
    assert model.gains == (0.0, 1.0)


def test_sentence_transformers_predicts_the_same_logits(cross_encoder: Path) -> None:
    from sentence_transformers import CrossEncoder

    model = load_pair_model(cross_encoder)
    texts = [model.info.template.render_product(product) for product in PRODUCTS]
    predicted = CrossEncoder(str(cross_encoder), device="cpu").predict(list(zip(QUERIES, texts, strict=True)))
    np.testing.assert_allclose(predicted, model.logits(QUERIES, PRODUCTS), atol=1e-4)


def test_k_classes_come_out_with_the_gains_of_the_scale(tmp_path: Path) -> None:
    model = load_pair_model(save_classifier(tmp_path, 4, Template(max_tokens=48), "classifier"))
    class_logits = model.class_logits(QUERIES, PRODUCTS)
    assert class_logits.shape == (5, 4)
    assert model.gains == ESCI.gains
    np.testing.assert_array_equal(model.logits(QUERIES, PRODUCTS), logit_of_classes(class_logits, ESCI.gains))


def test_causal_classifier_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("minilm"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_labels=4, pad_token_id=None,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    template = Template(max_tokens=48, prompt="query: {query} product: {product} grade:")
    finish_folder(tmp_path, ModelInfo("classifier", ESCI, template))
    together = load_pair_model(tmp_path).class_logits(QUERIES, PRODUCTS)
    alone = load_pair_model(tmp_path, max_batch_tokens=1).class_logits(QUERIES, PRODUCTS)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert np.ptp(together[:, 0]) > 1e-4


ROTTEN: list[tuple[Any, Any, str]] = [
    ("  ", PRODUCTS[0], "the query is empty"),
    ("", PRODUCTS[0], "the query is empty"),
    (None, PRODUCTS[0], "NoneType, not text"),
    ("te\x00nt", PRODUCTS[0], "NUL"),
    ("tent \ud800", PRODUCTS[0], "surrogate"),
    ("tent", {"title": "ten\udfff"}, "title holds a lone surrogate"),
    ("tent", {"title": 5}, "title is a int, not text"),
    ("tent", None, "not a mapping"),
    ("tent", {"title": None, "brand": " "}, "no text in its fields"),
    ("tent", {"title": "t", "price": "9.99"}, "price is a str"),
    ("tent", {"title": "t", "attributes": "red"}, "attributes are a str"),
    ("tent", {"title": "t", "attributes": [("k", 3)]}, "attributes is a int"),
    ("tent", {"title": "x" * 1_000_000}, "1000000 characters"),
    ("tent " * 200, PRODUCTS[0], "more than the 44 tokens"),
]


def test_rotten_rows_become_errors_and_the_others_come_out(cross_encoder: Path) -> None:
    engine = open_engine(EngineOptions(), cross_encoder, ESCI)
    queries, products = [*QUERIES], [*PRODUCTS]
    for query, product, _ in ROTTEN:
        queries.insert(2, query)
        products.insert(2, product)
    labels = engine.label(as_pairs(queries, products))
    healthy = [0, 1, *range(2 + len(ROTTEN), len(queries))]
    expected = engine.label(as_pairs(QUERIES, PRODUCTS)).class_logits
    np.testing.assert_allclose(labels.class_logits[healthy], expected, atol=1e-5)
    for (_, _, sentence), row in zip(reversed(ROTTEN), range(2, 2 + len(ROTTEN)), strict=True):
        error = labels.errors[row]
        assert error is not None
        assert sentence in error
        assert np.isnan(labels.class_logits[row]).all()
    assert engine.label([]).class_logits.shape == (0, 2)


def test_a_model_names_the_row_that_it_cannot_score(cross_encoder: Path) -> None:
    with pytest.raises(ValueError, match="row 1: the query is empty"):
        load_pair_model(cross_encoder).logits(["tent", ""], PRODUCTS[:2])


# Bi-encoder


def test_embeddings_equal_sentence_transformers() -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["red tent", "a", "red tent", "usb cable " * 20]
    expected = SentenceTransformer(str(resolve_model("minilm")), device="cpu").encode(texts)
    vectors = TextEncoder(resolve_model("minilm"), max_batch_tokens=50).embed(texts)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    assert TextEncoder(resolve_model("minilm")).embed([]).shape == (0, 384)


def test_bi_encoder_logit_is_the_scaled_cosine(bi_encoder: Path) -> None:
    model = load_pair_model(bi_encoder)
    texts = [model.info.template.render_product(product) for product in PRODUCTS]
    queries, products = (TextEncoder(resolve_model("minilm")).embed(part) for part in (QUERIES, texts))
    np.testing.assert_allclose(model.logits(QUERIES, PRODUCTS), 20 * (queries * products).sum(axis=1), atol=1e-4)
    assert model.label_rows(["tent"], [{"title": ""}]).errors == [
        "the product has no text in its fields title, brand, color"
    ]


# Ensemble


def test_ensemble_folder_stacks_its_members(
    tmp_path: Path, cross_encoder: Path, bi_encoder: Path, bm25_folder: Path
) -> None:
    members = [cross_encoder, bi_encoder, bm25_folder]
    features = np.stack([load_pair_model(member).logits(QUERIES, PRODUCTS) for member in members], axis=1)
    stack = fit_stack(features, np.stack([ESCI.distribution(grade) for grade in "EICSE"]), np.zeros(5))
    folder = build_ensemble_folder(members, stack, ESCI, tmp_path / "ensemble")
    model = load_pair_model(folder)
    np.testing.assert_allclose(model.class_logits(QUERIES, PRODUCTS), stack_logits(features, stack), atol=1e-4)
    assert model.gains == ESCI.gains

    # The cross-encoder's template has 48 tokens: what one member cannot score, the ensemble cannot.
    labels = model.label_rows(["tent", "tent " * 100], PRODUCTS[:2])
    assert labels.errors[0] is None
    assert "more than the 44 tokens" in str(labels.errors[1])


# File and registry


def write_labels(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [",".join(rows[0]), *(",".join(str(value) for value in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_grades_of_a_file_become_labels(tmp_path: Path, suffix: str) -> None:
    rows = [
        {"query": "Red  Tent", "product_id": "007", "grade": "E"},
        {"query": "red tent", "product_id": "8", "grade": "I"},
        {"query": "red tent", "product_id": "8", "grade": "I"},
    ]
    engine = open_engine(
        EngineOptions(engine="file", path=str(write_labels(tmp_path / f"labels.{suffix}", rows))), None, ESCI
    )
    pairs = [
        Pair(0, "red tent", "007", {}),
        Pair(1, "red tent", "8", {}),
        Pair(2, "red tent", "9", {}),
        Pair(3, "", "8", {}),
    ]
    labels = engine.label(pairs)
    assert labels.errors[:2] == [None, None]
    assert labels.errors[2] == f"labels.{suffix} holds no label of this query and product"
    assert labels.errors[3] == "the query is empty"
    assert labels.class_logits.argmax(axis=1)[:2].tolist() == [3, 0]
    logits = logit_of_classes(labels.class_logits, engine.gains)
    assert logits[0] > 0 > logits[1]
    assert np.isnan(logits[2:]).all()


def test_logits_of_a_file_pass_through(tmp_path: Path) -> None:
    rows = [{"query": "a", "product_id": "1", "logit": 2.5}, {"query": "b", "product_id": "1", "logit": -0.75}]
    engine = FileEngine(write_labels(tmp_path / "labels.csv", rows), ESCI)
    labels = engine.label([Pair(0, "b", "1", {}), Pair(1, "A", "1", {})])
    np.testing.assert_array_equal(logit_of_classes(labels.class_logits, engine.gains), [-0.75, 2.5])


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"query": "a", "grade": "E"}], "lacks the column product_id; it has query, grade"),
        ([{"query": "a", "product_id": "1"}], "lacks the column grade or logit"),
        (
            [{"query": "a", "product_id": "1", "grade": "E"}, {"query": "a", "product_id": "2", "grade": "X"}],
            "row 2: grade 'X'",
        ),
        ([{"query": " ", "product_id": "1", "grade": "E"}], "row 1: query is empty"),
        (
            [{"query": "a", "product_id": "1", "logit": 1.0}, {"query": "a", "product_id": "1", "logit": 2.0}],
            "rows 1 and 2",
        ),
        ([{"query": "a", "product_id": "1", "logit": float("nan")}], "row 1: logit nan"),
        (
            [{"query": "a", "product_id": "1", "logit": "1"}, {"query": "a", "product_id": "2", "logit": "high"}],
            "row 2: logit 'high' is no number",
        ),
        ([{"query": "a", "product_id": "1", "logit": True}], "column logit holds bool values, no numbers"),
        ([{"query": "a", "product_id": "1", "logit": date(2024, 1, 1)}], r"column logit holds date32\[day\] values"),
    ],
)
def test_bad_label_files_are_named(tmp_path: Path, rows: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        FileEngine(write_labels(tmp_path / "labels.parquet", rows), ESCI)
    assert "labels.parquet" in str(caught.value)


def test_a_file_that_is_not_what_it_says_is_named(tmp_path: Path) -> None:
    (tmp_path / "labels.parquet").write_text("query,product_id\n")
    (tmp_path / "labels.txt").write_text("")
    for name, sentence in [
        ("labels.parquet", "cannot be read"),
        ("labels.txt", "ends in .txt"),
        ("x.csv", "does not exist"),
    ]:
        with pytest.raises(UserError, match=sentence):
            FileEngine(tmp_path / name, ESCI)


def test_transformers_without_a_teacher_says_so() -> None:
    for engine in ("transformers", "vllm"):
        with pytest.raises(UserError, match=f"the {engine} engine needs a teacher; run train-teacher"):
            open_engine(EngineOptions(engine=engine), None, ESCI)  # type: ignore[arg-type]


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed in this environment")
def test_without_vllm_its_engine_says_how_to_install_it(cross_encoder: Path) -> None:
    with pytest.raises(UserError, match=r"install relevance-ray\[vllm\] in an environment of its own"):
        open_engine(EngineOptions(engine="vllm"), cross_encoder, ESCI)


def test_vllm_refuses_a_teacher_that_it_would_not_run(bi_encoder: Path) -> None:
    with pytest.raises(UserError, match="runs classifiers and cross-encoders, and the teacher .* holds none"):
        open_engine(EngineOptions(engine="vllm"), bi_encoder, ESCI)


def test_wrong_engine_options_are_refused() -> None:
    for wrong in (
        {"max_batch_tokens": 0},
        {"num_threads": -1},
        {"noise": 1.0},
        {"engine": "file"},
        {"path": "x.csv"},
        {"noise": 0.1},
        {"vllm": VllmOptions({"max_num_seqs": 8})},
    ):
        with pytest.raises(ValueError):  # noqa: PT011 - one sentence for each option
            EngineOptions(**wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_logits(cross_encoder: Path) -> None:
    plain, compiled = load_pair_model(cross_encoder), load_pair_model(cross_encoder, compiled=True)
    np.testing.assert_allclose(
        compiled.class_logits(QUERIES * 9, PRODUCTS * 9), plain.class_logits(QUERIES * 9, PRODUCTS * 9), atol=1e-4
    )


def test_windows_of_rows_come_out_in_order(cross_encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_pair_model(cross_encoder)
    whole = model.label_rows([*QUERIES, "", *QUERIES], [*PRODUCTS, {"title": "x"}, *PRODUCTS])
    read = model.num_tokens
    monkeypatch.setattr("relevance_ray.engines.encoding.WINDOW_ROWS", 3)
    parted = model.label_rows([*QUERIES, "", *QUERIES], [*PRODUCTS, {"title": "x"}, *PRODUCTS])
    np.testing.assert_allclose(parted.class_logits, whole.class_logits, atol=1e-5)
    assert parted.errors == whole.errors
    assert model.num_tokens == 2 * read > 0
