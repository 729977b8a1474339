"""Comparison of models on judged groups: figures, failures, baselines."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from judged_groups import ESCI, FAST, TitleReader, judged_table
from sklearn.metrics import ndcg_score, roc_auc_score

from relevance_ray.data.prepare import iter_products, prepare, read_judged, read_scale
from relevance_ray.data.source import DataOptions
from relevance_ray.engines.registry import load_pair_model
from relevance_ray.errors import UserError
from relevance_ray.evaluation.ask import predict
from relevance_ray.evaluation.baselines import build_baselines
from relevance_ray.evaluation.compare import compare_predictions, difference
from relevance_ray.evaluation.evaluate import evaluate_models
from relevance_ray.evaluation.judged import Judgments, flatten, of_split
from relevance_ray.evaluation.measure import Predictions, measure
from relevance_ray.evaluation.options import EvaluateOptions
from relevance_ray.evaluation.report.markdown import render_markdown
from relevance_ray.evaluation.report.write import write_report
from relevance_ray.metrics import group_offsets
from relevance_ray.schema import JUDGED_GROUP, PRODUCT, SCALES, pair_id, product_fields
from relevance_ray.templates import Template


def test_judged_groups_flatten_with_gains_classes_and_relevance():
    pairs = flatten(judged_table(), ESCI)
    letters = [product["title"][-1] for product in pairs.products]
    assert pairs.gains.tolist() == [{"I": 0.0, "C": 0.01, "S": 0.1, "E": 1.0}[letter] for letter in letters]
    assert pairs.classes.tolist() == ["ICSE".index(letter) for letter in letters]
    assert pairs.relevant.tolist() == [letter == "E" for letter in letters]
    assert pairs.num_queries == 12
    assert all(len(set(pairs.queries[a:b])) == 1 for a, b in itertools.pairwise(pairs.offsets))


def test_an_unknown_grade_names_query_and_product():
    with pytest.raises(UserError, match=r"query 'query 0' and product '0'.*grade"):
        flatten(judged_table(grades="X"), ESCI)


def test_figures_equal_scikit_learn_on_the_same_judgments():
    judged, model = judged_table(), TitleReader(noise=1.0)
    results = evaluate_models(judged, {"student": model}, ESCI, FAST)
    pairs = flatten(judged, ESCI)
    scores = predict(TitleReader(noise=1.0), pairs).logits
    metrics = results["splits"]["test"]["models"]["student"]["metrics"]
    spans = [slice(a, b) for a, b in itertools.pairwise(pairs.offsets)]
    per_query = [ndcg_score([pairs.gains[s]], [scores[s]], k=10) for s in spans if pairs.gains[s].any()]
    assert metrics["ndcg@10"]["value"] == pytest.approx(np.mean(per_query))
    assert metrics["roc_auc"]["value"] == pytest.approx(roc_auc_score(pairs.relevant, scores))
    assert metrics["ndcg@10"]["low"] < metrics["ndcg@10"]["value"] < metrics["ndcg@10"]["high"]
    assert "macro_f1" not in metrics  # no calibration, no grades
    assert "brier" not in metrics


def test_perfect_grades_have_an_f1_of_one():
    pairs = flatten(judged_table(), ESCI)
    perfect = Predictions(pairs.classes.astype(float), pairs.classes, pairs.relevant.astype(float))
    metrics = compare_predictions(pairs, {"m": perfect}, ESCI, FAST)["models"]["m"]["metrics"]
    assert {name: found["value"] for name, found in metrics.items()} == {
        name: 0.0 if "calibration_error" in name or "brier" in name else pytest.approx(1.0) for name in metrics
    }
    assert len(metrics) == 17


def test_a_pair_that_a_model_refuses_is_ranked_last_and_counted():
    judged = judged_table()
    results = evaluate_models(judged, {"all": TitleReader(), "refusing": TitleReader(refuses="E")}, ESCI, FAST)
    models = results["splits"]["test"]["models"]
    assert models["all"]["num_failed"] == 0
    assert models["refusing"]["num_failed"] == flatten(judged, ESCI).relevant.sum()
    assert models["refusing"]["metrics"]["roc_auc"]["value"] == 0.0
    assert len(models["refusing"]["errors"]) == 3
    markdown = render_markdown(results, title="t", about={})
    assert "Pairs that could not be scored, ranked last: refusing" in markdown
    assert f"The first: refusing: {models['refusing']['errors'][0]}" in markdown
    assert "too good to be true" in markdown


def test_models_are_asked_in_blocks_of_whole_queries_and_each_pair_once(monkeypatch):
    monkeypatch.setattr("relevance_ray.evaluation.ask.PAIRS_PER_CALL", 15)
    pairs = flatten(judged_table(), ESCI)
    model, seen = TitleReader(), []
    predict(model, pairs, seen.append)
    assert model.calls == seen
    assert sum(seen) == pairs.num_pairs
    assert len(seen) > 2
    assert set(np.cumsum(seen)) <= set(pairs.offsets)


def test_random_order_is_the_floor_and_splits_are_reported_apart():
    judged = pa.concat_tables([judged_table(split="dev"), judged_table(seed=1), judged_table(seed=2, split="train")])
    results = evaluate_models(judged, {"student": TitleReader()}, ESCI, FAST)
    assert list(results["splits"]) == ["dev", "test"]
    random = results["splits"]["test"]["models"]["random"]["metrics"]
    assert random["roc_auc"]["value"] == random["pairwise_accuracy"]["value"] == 0.5
    assert 0.2 < random["ndcg"]["value"] < 1.0


def test_no_judgment_in_any_split_says_what_to_change():
    with pytest.raises(UserError, match=r"dev or test.*evaluate\.splits"):
        evaluate_models(judged_table(split="train"), {}, ESCI, FAST)


@pytest.mark.parametrize(
    "wrong", [{"splits": ["tset"]}, {"splits": []}, {"ks": [0]}, {"precisions": [0.0]}, {"num_resamples": 0}]
)
def test_options_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EvaluateOptions(**wrong)


def test_the_report_says_what_the_interval_carries(tmp_path):
    models = {"teacher": TitleReader(noise=1.0), "student": TitleReader()}
    results = evaluate_models(judged_table(60), models, ESCI, FAST)
    write_report(results, str(tmp_path), title="Market", about={"teacher": "a title reader"})
    markdown = (tmp_path / "report.md").read_text()
    assert "The student passes the teacher on test nDCG: +0." in markdown
    assert "- **teacher**: a title reader" in markdown
    assert "| student minus | teacher | random |" in markdown
    assert "| recall at precision 0.9 |" in markdown
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["about"] == {"teacher": "a title reader"}
    assert stored["splits"]["test"]["models"]["student"]["metrics"]["ndcg"]["value"] == 1.0


def test_a_shift_of_probabilities_within_queries_is_seen_though_the_pool_hides_it():
    """Half of the queries hold relevant products only, half none; the model says .5 of everything."""
    relevant = np.repeat([True, False] * 10, 4)
    offsets = group_offsets([4] * 20)
    pairs = Judgments(offsets, relevant.astype(float), relevant.astype(int), relevant)
    said = Predictions(np.zeros(80), relevant.astype(int), np.full(80, 0.5))
    parts = measure(pairs, said, 2, [10], [0.9])
    found = {metric: value for part in parts for metric, value in zip(part.names, part.values, strict=True)}
    assert found["calibration_error"] == pytest.approx(0.0)
    assert found["query_calibration_error"] == pytest.approx(0.5 - np.sqrt(2 / np.pi * 0.25 / 4))
    assert found["query_brier"] == found["brier"] == pytest.approx(0.25)


def test_right_probabilities_have_no_calibration_error_by_query_whatever_the_lists_length():
    rng = np.random.default_rng(4)
    lengths = rng.integers(4, 40, 4000)
    offsets = group_offsets(lengths)
    probabilities = rng.beta(0.6, 1.4, offsets[-1])
    relevant = rng.random(offsets[-1]) < probabilities
    pairs = Judgments(offsets, relevant.astype(float), relevant.astype(int), relevant)
    *_, levels = measure(pairs, Predictions(probabilities, relevant.astype(int), probabilities), 2, [10], [0.9])
    assert dict(zip(levels.names, levels.values, strict=True))["query_calibration_error"] == pytest.approx(0, abs=0.003)


@pytest.mark.parametrize("change", [{"splits": ["test", "test"]}, {"ks": [10, 10]}, {"slices": ["brand", "brand"]}])
def test_what_is_named_twice_is_refused(change):
    with pytest.raises(ValueError, match="names something twice"):
        replace(FAST, **change)


def test_only_one_split_is_taken():
    judged = pa.concat_tables([judged_table(3, split="dev"), judged_table(4)])
    assert of_split(judged, "dev").num_rows == 3


def products_of(judged: pa.Table) -> pa.Table:
    rows = {p["product_id"]: p for group in judged["products"].to_pylist() for p in group}
    return pa.Table.from_pylist([{"product_id": key, **row["fields"]} for key, row in rows.items()], schema=PRODUCT)


def test_baselines_are_model_folders_calibrated_on_dev_and_built_once(tmp_path):
    judged, scale = grounded_table(), SCALES["binary"]
    dev, streams = judged.slice(0, 6), []

    def products():
        streams.append(1)
        yield products_of(judged)

    template = Template(max_tokens=32, prompt="{query} {product}")
    folders = build_baselines(FAST, products, dev, scale, template, tmp_path)
    assert list(folders) == ["bm25", "cosine"]
    before = {name: (folder / "relevance.json").read_bytes() for name, folder in folders.items()}
    assert build_baselines(FAST, products, dev, scale, template, tmp_path) == folders
    assert len(streams) == 1
    assert {name: (folder / "relevance.json").read_bytes() for name, folder in folders.items()} == before

    models = {name: load_pair_model(folder) for name, folder in folders.items()}
    results = evaluate_models(judged, models, scale, FAST)
    found = {name: model["metrics"] for name, model in results["splits"]["test"]["models"].items()}
    for name in ("bm25", "cosine"):
        assert found[name]["ndcg"]["value"] > found["random"]["ndcg"]["value"] + 0.1
        assert found[name]["macro_f1"]["value"] > 0.8


def test_on_real_judgments_bm25_and_the_cosine_beat_random_order(shared_data, tmp_path):
    prepare(DataOptions(format="esci", path=str(shared_data / "esci")), tmp_path / "prepared")
    judged, scale = read_judged(tmp_path / "prepared"), read_scale(tmp_path / "prepared")
    dev = of_split(judged, "dev")
    folders = build_baselines(
        FAST, lambda: iter_products(tmp_path / "prepared"), dev, scale, Template(max_tokens=48), tmp_path / "baselines"
    )
    models = {name: load_pair_model(folder) for name, folder in folders.items()}
    split = evaluate_models(judged, models, scale, replace(FAST, splits=["test"]))["splits"]["test"]
    assert split["num_queries"] == 15
    for name in ("bm25", "cosine"):
        assert difference(split, "ndcg", name, "random")["difference"] > 0.02
        assert difference(split, "pairwise_accuracy", name, "random")["difference"] > 0.03
        assert split["models"][name]["num_failed"] == 0


def grounded_table() -> pa.Table:
    """Queries for a thing, one product that is the thing and four that are other things."""
    things = ["lamp", "kettle", "bicycle", "carpet", "violin", "hammer", "sofa", "camera", "tent", "mirror"]
    rows = []
    for q, thing in enumerate(things):
        sold = [thing, *(things[(q + i) % len(things)] for i in range(1, 5))]
        products = [
            {
                "pair_id": pair_id(thing, name),
                "product_id": name,
                "fields": product_fields({"title": f"a fine {name}", "brand": "Acme"}),
                "origins": [{"name": "human", "rank": 0}],
                "grade": str(int(name == thing)),
                "soft_target": float(name == thing),
                "rater_grades": None,
            }
            for name in reversed(sold)
        ]
        rows.append({"query_id": thing, "query": thing, "query_source": "human", "split": "test", "products": products})
    return pa.Table.from_pylist(rows, schema=JUDGED_GROUP)


def test_queries_of_one_text_under_two_ids_are_told(tmp_path):
    rows = judged_table(3).to_pylist()
    rows[1]["query"] = " QUERY  0"
    judged = pa.Table.from_pylist(rows, schema=JUDGED_GROUP)
    results = evaluate_models(judged, {"student": TitleReader()}, ESCI, FAST)
    markdown = render_markdown(results, title="t", about={})
    assert "1 of 3 queries have the text of another query_id; each counts as a query." in markdown
