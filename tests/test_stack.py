"""The stack of an ensemble: its weights against a reference, what it is not fooled by, and a member of each template."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from tiny_student import build_tiny_student

from relevance_ray.calibration import OrdinalCalibration
from relevance_ray.engines.ensemble import build_ensemble_folder, fit_stack, stack_logits
from relevance_ray.engines.registry import load_pair_model
from relevance_ray.schema import SCALES
from relevance_ray.scoring import score_file
from relevance_ray.templates import Template


def test_stack_weights_equal_sklearn_on_pairs_within_queries() -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 3)) * [1, 20, 0.1] + 5
    classes = (features[:, 0] > 5).astype(int) + (features[:, 1] + rng.normal(size=300) * 10 > 20)
    groups = np.repeat(np.arange(30), 10)
    l2 = 0.05
    stack = fit_stack(features, np.eye(3)[classes], groups, l2)

    z = (features - features.mean(axis=0)) / features.std(axis=0)
    pairs = [(i, j) for i in range(300) for j in range(300) if groups[i] == groups[j] and classes[i] > classes[j]]
    margins = np.stack([(z[i] - z[j]) * (classes[i] - classes[j]) for i, j in pairs])
    in_group = np.bincount(groups[[i for i, _ in pairs]], minlength=30)
    share = 1 / in_group[groups[[i for i, _ in pairs]]] / np.count_nonzero(in_group)
    # Each pair in both orders with half its weight: the classes of a logistic regression without intercept.
    peer = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=5000, fit_intercept=False)
    outcome = np.repeat([1, 0], len(margins))
    peer.fit(np.concatenate([margins, -margins]), outcome, sample_weight=np.tile(share / 2, 2))
    np.testing.assert_allclose(stack["weights"], peer.coef_[0], atol=1e-4)
    assert stack == fit_stack(features, np.eye(3)[classes], groups, l2)


def test_stack_is_not_fooled_by_a_member_whose_level_is_the_querys() -> None:
    """The member that orders the products has another level in each query; the other knows only the queries' levels."""
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(40), 8)
    easy = rng.normal(size=40) * 3
    within = rng.normal(size=320)
    classes = np.clip(np.round(1 + easy[groups] / 2 + within / 2), 0, 2).astype(int)
    features = np.stack([within - 5 * easy[groups], easy[groups] + rng.normal(size=320) * 0.1], axis=1)
    stack = fit_stack(features, np.eye(3)[classes], groups)
    scores = stack_logits(features, stack) @ [0, 1, 2]
    first, second = np.nonzero((groups[:, None] == groups) & (classes[:, None] > classes))
    assert np.mean(scores[first] > scores[second]) > 0.95
    assert stack["slope"] > 0


def test_stack_keeps_the_share_of_each_class() -> None:
    rng = np.random.default_rng(2)
    features = rng.normal(size=(500, 2))
    target = np.eye(4)[np.clip(np.round(features[:, 0] + 1.5 + rng.normal(size=500)), 0, 3).astype(int)]
    logits = stack_logits(features, fit_stack(features, target, np.arange(500) // 10)).astype(np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities.mean(axis=0), target.mean(axis=0), atol=1e-4)


def test_members_count_alike_where_no_query_orders_its_products() -> None:
    features = np.asarray([[1.0, 2.0], [3.0, 1.0], [0.0, 5.0]])
    stack = fit_stack(features, np.eye(2)[[0, 1, 1]], np.arange(3))
    assert stack["weights"] == [1.0, 1.0]


def test_each_member_of_an_ensemble_reads_its_own_fields_from_a_file(tmp_path: Path) -> None:
    fields = [("title",), ("title", "brand"), ("color",)]
    members = [
        build_tiny_student(tmp_path / "-".join(names), Template(fields=names, max_tokens=32)) for names in fields
    ]
    products = [{"title": "red shoe", "brand": "nike", "color": "blue"}, {"title": "phone case", "color": "green"}]
    features = np.stack([load_pair_model(member).logits(["red"] * 2, products) for member in members], axis=1)
    stack = fit_stack(features, np.eye(4)[[3, 0]], np.zeros(2))
    calibration = OrdinalCalibration(1.0, (-1.0, 0.0, 1.0))
    folder = build_ensemble_folder(members, stack, SCALES["esci"], tmp_path / "ensemble", calibration)
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["query", "title", "brand", "color"])
        writer.writeheader()
        writer.writerows({"query": "red", **product} for product in products)
    score_file(folder, tmp_path / "rows.csv", tmp_path / "scored.csv")
    with open(tmp_path / "scored.csv", newline="") as file:
        found = [float(row["logit"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(found, load_pair_model(folder).logits(["red"] * 2, products), atol=1e-5)
    assert len({round(value, 3) for value in features[0]}) == 3
