"""Scores from elsewhere in the report: read, calibrated, and what they lack counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from judged_groups import ESCI, FAST, TitleReader, judged_table
from tiny_chain import values

from relevance_ray.config import build_config
from relevance_ray.errors import UserError
from relevance_ray.evaluation.ask import predict
from relevance_ray.evaluation.evaluate import evaluate_models
from relevance_ray.evaluation.given_scores import GivenScores
from relevance_ray.evaluation.judged import flatten
from relevance_ray.evaluation.options import EvaluateOptions
from relevance_ray.evaluation.report.markdown import render_markdown
from relevance_ray.metrics import ndcg
from relevance_ray.steps import Chain

DEV, TEST = judged_table(40, split="dev").slice(0, 20), judged_table(40).slice(20)


def scores_file(
    path: Path, *, rows: slice = slice(None), header: str = "query,product_id,logit", last: str = ""
) -> Path:
    """What an engine said of the pairs of both splits: noisy, in upper case, as a log might have it."""
    rng = np.random.default_rng(0)
    lines = [header]
    for judged in (DEV, TEST):
        pairs = flatten(judged, ESCI)
        found = pairs.classes + 0.5 * rng.normal(size=pairs.num_pairs)
        every = [f"{q.upper()},{p},{s:.4f}" for q, p, s in zip(pairs.queries, pairs.product_ids, found, strict=True)]
        lines += every[rows]
    path.write_text("\n".join([*lines, last]), encoding="utf-8")
    return path


def test_a_file_of_scores_is_one_more_model(tmp_path: Path) -> None:
    engine = GivenScores(scores_file(tmp_path / "engine.csv"), ESCI, DEV)
    results = evaluate_models(TEST, {"student": TitleReader(), "engine": engine}, ESCI, FAST)
    found = results["splits"]["test"]["models"]["engine"]
    assert found["num_failed"] == 0
    assert 0.8 < found["metrics"]["ndcg"]["value"] < 1.0
    assert found["metrics"]["macro_f1"]["value"] > 0.4
    assert found["metrics"]["calibration_error"]["value"] < 0.2


def test_pairs_that_the_file_lacks_are_ranked_last_counted_and_named(tmp_path: Path) -> None:
    engine = GivenScores(scores_file(tmp_path / "engine.csv", rows=slice(5, None)), ESCI, DEV)
    results = evaluate_models(TEST, {"student": TitleReader(), "engine": engine}, ESCI, FAST)
    assert results["splits"]["test"]["models"]["engine"]["num_failed"] == 5
    text = render_markdown(results, title="t", about={})
    assert "Pairs that could not be scored, ranked last: engine 5." in text
    assert "engine.csv holds no label of this query and product" in text


@pytest.mark.parametrize(("first", "step"), [(1_700_000_000, 1), (0.99999999, 1e-9), (170_000_000.5, 3)])
def test_any_number_keeps_its_rank(tmp_path: Path, first: float, step: float) -> None:
    pairs = flatten(TEST, ESCI)
    order = np.argsort(np.argsort(pairs.gains, kind="stable"))
    rows = [
        f"{q},{p},{float(first + i * step)!r}" for q, p, i in zip(pairs.queries, pairs.product_ids, order, strict=True)
    ]
    path = tmp_path / "engine.csv"
    path.write_text("\n".join(["query,product_id,logit", *rows]), encoding="utf-8")
    engine = GivenScores(path, ESCI, DEV.slice(0, 0))
    logits = predict(engine, pairs).logits
    assert (np.argsort(logits) == np.argsort(order)).all()
    assert len(set(logits)) == pairs.num_pairs


def test_grades_are_scores_too(tmp_path: Path) -> None:
    pairs = flatten(TEST, ESCI)
    rows = [f"{q},{p},{'ICSE'[c]}" for q, p, c in zip(pairs.queries, pairs.product_ids, pairs.classes, strict=True)]
    path = tmp_path / "llm.csv"
    path.write_text("\n".join(["query,product_id,grade", *rows]), encoding="utf-8")
    results = evaluate_models(TEST, {"llm": GivenScores(path, ESCI, DEV.slice(0, 0))}, ESCI, FAST)
    metrics = results["splits"]["test"]["models"]["llm"]["metrics"]
    assert metrics["ndcg"]["value"] == pytest.approx(1.0)
    assert "macro_f1" not in metrics
    assert ndcg(pairs.gains, pairs.gains, pairs.offsets)[0] == 1.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"header": "query,product_id,score"}, "lacks the column grade or logit"),
        ({"last": "query 0,0,nan"}, "logit nan is not a finite number; remove the row"),
        ({"last": "query 0,0,-99"}, "label the pair .* differently; keep one"),
        ({"last": "query 0,,1"}, "product_id is empty; fill it or remove the row"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_row(tmp_path: Path, change: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        GivenScores(scores_file(tmp_path / "engine.csv", **change), ESCI, DEV)


def test_names_are_taken_once_and_a_file_must_be_there(tmp_path: Path, encoder: Path) -> None:
    for wrong in (
        {"scores": {"bm25": "x.csv"}},
        {"scores": {"a b": "x.csv"}},
        {"models": {"x": "y"}, "scores": {"x": "z"}},
    ):
        with pytest.raises(ValueError, match="must be named otherwise"):
            EvaluateOptions(**wrong)
    config = build_config(values(tmp_path / "root", encoder), ["evaluate.scores={engine: nope.csv}"])
    with pytest.raises(UserError, match=r"evaluate\.scores\.engine nope.csv does not exist"):
        Chain(config).preflight()


def test_a_file_that_scores_nothing_that_is_judged_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    engine = GivenScores(scores_file(tmp_path / "engine.csv"), ESCI)
    engine.check([DEV, TEST], "evaluate.scores.engine engine.csv")
    path = tmp_path / "others.csv"
    path.write_text("query,product_id,logit\nno such query,0,1.5\n")
    with pytest.raises(
        UserError, match=r"evaluate.scores.engine others.csv scores none of the judged pairs; its query"
    ):
        GivenScores(path, ESCI).check([DEV, TEST], "evaluate.scores.engine others.csv")


def test_a_sentinel_for_what_a_filter_removed_leaves_the_order_of_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "engine.csv"
    scores = [*np.linspace(-3, 3, 400), -1e12, -1.7e308]
    rows = [f"query,{row},{float(score)!r}" for row, score in enumerate(scores)]
    path.write_text("\n".join(["query,product_id,logit", *rows]) + "\n")
    products = [{"product_id": str(row)} for row in range(402)]
    logits = GivenScores(path, ESCI).label_rows(["query"] * 402, products).class_logits[:, 1]
    assert np.argsort(logits).tolist() == [401, 400, *range(400)]
    assert len(np.unique(logits)) == 402
