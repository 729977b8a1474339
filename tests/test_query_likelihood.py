"""Query likelihood: a causal language model as it comes, as a scorer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_engines import ESCI, PRODUCTS, QUERIES
from tiny_training import SCALE, build_tiny_encoder, judged_groups, write
from tiny_writers import writer_folder
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from relevance_ray.engines.query_likelihood import QueryLikelihoodModel, build_query_likelihood_folder
from relevance_ray.engines.registry import load_pair_model
from relevance_ray.errors import UserError
from relevance_ray.model_folder import read_model_info
from relevance_ray.models import resolve_model
from relevance_ray.templates import Template
from relevance_ray.training.options import TeacherMemberOptions, TeacherOptions
from relevance_ray.training.teacher import train_teacher

TEMPLATE = Template(max_tokens=64)


@pytest.fixture(scope="module", params=["relative positions", "learned positions"])
def writer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("writer") / "w"
    writer_folder(out)
    if request.param == "learned positions":
        size = AutoConfig.from_pretrained(out).vocab_size
        config = GPT2Config(vocab_size=size, n_positions=64, n_embd=48, n_layer=2, n_head=4, initializer_range=0.3)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            GPT2LMHeadModel(config).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def folder(writer: Path) -> Path:
    return build_query_likelihood_folder("w", writer, ESCI, TEMPLATE, writer.with_name("model"))


def reference(folder: Path, query: str, product: dict) -> float:
    """One pair in float64, one text after the other, by the definition."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).double().eval()

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    ask, predicted = "A customer found this product with the search query:", ids(f" {query}\n")
    lead, after = ids("Product:"), ids(f"\n{ask}")
    room = TEMPLATE.max_tokens - len(lead) - len(after) - len(predicted)
    text = ids(f" {TEMPLATE.render_product(product)}")[:room]

    def log_p(before: list[int]) -> float:
        logits = model(torch.tensor([before + predicted])).logits[0, len(before) - 1 : -1].log_softmax(-1)
        return logits.gather(1, torch.tensor(predicted)[:, None]).sum().item()

    return (log_p([*lead, *text, *after]) - log_p(ids(ask))) / len(predicted)


def test_logits_are_the_information_of_a_product_about_each_token_of_the_query(folder: Path) -> None:
    """Lengths differ, and one product is cut: padding and batches change nothing."""
    found = QueryLikelihoodModel(folder).logits(QUERIES, PRODUCTS)
    expected = [reference(folder, query, product) for query, product in zip(QUERIES, PRODUCTS, strict=True)]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(
        QueryLikelihoodModel(folder, max_batch_tokens=1).logits(QUERIES, PRODUCTS), found, atol=2e-5
    )


def test_few_logits_at_once_give_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = QueryLikelihoodModel(folder).logits(QUERIES, PRODUCTS)
    monkeypatch.setattr("relevance_ray.engines.query_likelihood._MAX_LOGITS", 1)
    np.testing.assert_allclose(QueryLikelihoodModel(folder).logits(QUERIES, PRODUCTS), whole, atol=2e-5)


def test_what_cannot_be_scored_is_an_error_of_its_row(folder: Path) -> None:
    model = QueryLikelihoodModel(folder)
    labels = model.label_rows(["tent", "tent " * 80, "tent"], [{"title": "tent"}, {"title": "tent"}, {"price": 2.0}])
    assert labels.errors == [
        None,
        "the query leaves no room for a product (max_tokens 64)",
        "the product has no text in its fields title, brand, color",
    ]
    assert np.isnan(labels.class_logits[1:]).all()
    [whole] = model.encoder.encode(["tent"], [{"title": "tent"}]).lengths
    [bare] = model.encoder.encode_alone(["tent"]).lengths
    assert model.num_tokens == whole + bare
    alone = model.logits(["tent"], [{"title": "tent"}])
    np.testing.assert_allclose(labels.class_logits[0, 1], alone[0], atol=2e-5)


def test_text_that_looks_like_a_special_token_is_text(folder: Path) -> None:
    model = QueryLikelihoodModel(folder)
    end = model.encoder.tokenizer.eos_token
    encoded = model.encoder.encode([f"tent {end}"], [{"title": f"tent {end}"}])
    assert model.encoder.tokenizer.eos_token_id not in encoded.input_ids[0]


def test_a_real_model_tells_which_product_was_searched_for(tmp_path: Path) -> None:
    source = resolve_model("smollm2-135m")
    build_query_likelihood_folder("smollm2-135m", source, ESCI, TEMPLATE, tmp_path / "m")
    products = [
        {"title": "Norrvik 2-person camping tent"},
        {"title": "Norrvik tent pegs"},
        {"title": "USB-C cable 2 m"},
    ]
    logits = load_pair_model(tmp_path / "m").logits(["tent for two people"] * 3, products)
    assert logits[0] > logits[1] > logits[2]


def test_a_teacher_of_it_is_calibrated_alone_and_stacked(writer: Path, tmp_path: Path) -> None:
    judged = write(tmp_path / "judged.parquet", judged_groups(60))
    alone = TeacherOptions(kind="query_likelihood", model=str(writer), max_tokens=64, fields=["title"])
    train_teacher(alone, SCALE, judged, tuple, str(tmp_path / "alone"), str(tmp_path / "work"))
    info = read_model_info(tmp_path / "alone")
    assert info.kind == "query_likelihood"
    assert info.calibration is not None
    encoder = build_tiny_encoder(tmp_path / "encoder")
    members = [
        TeacherMemberOptions(kind="query_likelihood", model=str(writer), max_tokens=64, fields=["title"]),
        TeacherMemberOptions(kind="bi_encoder", model=str(encoder), max_tokens=32, fields=["title"]),
    ]
    stacked = TeacherOptions(kind="ensemble", members=members)
    train_teacher(stacked, SCALE, judged, tuple, str(tmp_path / "stacked"), str(tmp_path / "work"))
    model = load_pair_model(tmp_path / "stacked")
    assert np.isfinite(model.logits(["red shoe"] * 2, [{"title": "red shoe"}, {"title": "blue lamp"}])).all()


def test_a_model_that_writes_nothing_or_is_too_short_is_refused(writer: Path, tmp_path: Path) -> None:
    encoder = build_tiny_encoder(tmp_path / "encoder")
    with pytest.raises(UserError, match="model tiny writes no text; give a causal language model"):
        build_query_likelihood_folder("tiny", encoder, ESCI, TEMPLATE, tmp_path / "m")
    with pytest.raises(UserError, match="max_tokens is 1000, but model w reads (512|64) at most"):
        build_query_likelihood_folder("w", writer, ESCI, Template(max_tokens=1000), tmp_path / "m")
    assert not (tmp_path / "m").exists()
    with pytest.raises(ValueError, match="num_layers is not read by kind query_likelihood"):
        TeacherMemberOptions(kind="query_likelihood", num_layers=2)
