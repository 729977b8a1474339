"""Several models stacked into one: a weighted sum of their logits, and an ordinal model from it to the K classes.

A language model, a bi-encoder and BM25 err on different pairs, so a handful of weights over their logits make a better
teacher than any of them. The weights must be fitted on out-of-fold logits: a member looks perfect on the pairs that it
was trained on, and would get all the weight. And they must be fitted within queries: a member's level differs from query
to query (BM25's with the number of words), and weights fitted on pooled pairs pay for the level with the order.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_softmax

from relevance_ray.calibration import Calibration, logit_of_classes
from relevance_ray.engines.base import FolderModel
from relevance_ray.errors import UserError
from relevance_ray.model_folder import ModelInfo, read_model_info, staged_folder, write_model_info
from relevance_ray.schema import LabelScale

_MEMBERS = "members"


def fit_stack(features: np.ndarray, distributions: np.ndarray, groups: np.ndarray, l2: float = 1e-2) -> dict[str, Any]:
    """The weights of the members and what their sum means, from soft grades; float64, convex, the same on every run.

    The model is the adjacent-category one with a level `u` of each query's own: `P(class k) ~ exp(k (z w + u) + b_k)`
    for standardised logits z. Given that two products of a query have classes i and j in some order, the level cancels:
    `P(first has i) = sigmoid((i - j)(z1 - z2) w)` (the conditional likelihood; Agresti, Categorical Data Analysis,
    8.3 and 11.2). That gives w: the mean over queries of the mean over their pairs, plus `l2 / 2 * sum(w^2)`, with the
    expected class in place of i and j. Then `slope` and `bias` of the classes, with w fixed and no levels, by
    cross-entropy over all pairs.

    Args:
        features: [n, m] out-of-fold logits, finite.
        distributions: [n, K].
        groups: int [n] the query of each pair. Where no query has two pairs of different grades, every member counts
            alike.

    Returns:
        Plain lists, for `relevance.json`: `mean`, `spread` and `weights` [m], `slope`, `bias` [K].

    Raises:
        ValueError: no rows, or features that are not finite.
    """
    x = np.asarray(features, dtype=np.float64)
    target = np.asarray(distributions, dtype=np.float64)
    assert x.ndim == 2, x.shape
    assert len(x) == len(target) == len(groups), (x.shape, target.shape, len(groups))
    if len(x) == 0 or not np.isfinite(x).all():
        raise ValueError(f"stacking needs at least one row and finite logits; got {len(x)} rows")
    mean, spread = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-6)
    z = (x - mean) / spread
    classes = np.arange(target.shape[1])
    weights = _within_query_weights(z, target @ classes, np.asarray(groups), l2)
    slope, bias = _adjacent_categories(z @ weights, target)
    return {
        "mean": mean.tolist(),
        "spread": spread.tolist(),
        "weights": weights.tolist(),
        "slope": slope,
        "bias": bias.tolist(),
    }


def _within_query_weights(z: np.ndarray, level: np.ndarray, groups: np.ndarray, l2: float) -> np.ndarray:
    """[m] from standardised logits [n, m] and expected classes [n]."""
    differences, shares = [], []
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        first, second = np.nonzero(level[rows][:, None] > level[rows][None, :] + 1e-9)
        if len(first):
            first, second = rows[first], rows[second]
            differences.append((z[first] - z[second]) * (level[first] - level[second])[:, None])
            shares.append(np.full(len(first), 1 / len(first)))
    if not differences:
        return np.ones(z.shape[1])
    d, share = np.concatenate(differences), np.concatenate(shares) / len(differences)

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        margin = d @ weights
        value = share @ np.logaddexp(0, -margin) + 0.5 * l2 * (weights @ weights)
        return float(value), l2 * weights - d.T @ (share * expit(-margin))

    return np.asarray(minimize(objective, np.zeros(z.shape[1]), jac=True, method="L-BFGS-B").x)


def _adjacent_categories(score: np.ndarray, target: np.ndarray) -> tuple[float, np.ndarray]:
    """Slope and bias [K] that give the classes least cross-entropy; the bias of class 0 is 0."""
    classes = np.arange(target.shape[1])

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        log_p = log_softmax(parameters[0] * score[:, None] * classes + np.append(0, parameters[1:]), axis=1)
        residual = (np.exp(log_p) * target.sum(axis=1, keepdims=True) - target) / len(target)
        return -(target * log_p).sum() / len(target), np.append(score @ residual @ classes, residual.sum(axis=0)[1:])

    # A slope of 0 would forget the order that the weights found, as one below would turn it around.
    bounds = [(1e-3, None), *[(None, None)] * (target.shape[1] - 1)]
    start = np.append(1.0, np.zeros(target.shape[1] - 1))
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 1000})
    return float(found.x[0]), np.append(0, found.x[1:])


def stack_logits(features: np.ndarray, stack: Mapping[str, Any]) -> np.ndarray:
    """Class logits float32 [n, K] of member logits [n, m]."""
    z = (np.asarray(features, dtype=np.float64) - np.asarray(stack["mean"])) / np.asarray(stack["spread"])
    score = stack["slope"] * (z @ np.asarray(stack["weights"]))
    bias = np.asarray(stack["bias"])
    return (score[:, None] * np.arange(len(bias)) + bias).astype(np.float32)


class EnsembleModel(FolderModel):
    """A model folder of kind ensemble: members under `members/0`, `members/1`, ..., the stack in `relevance.json`.
    The members come loaded, by `registry.load_pair_model`.

    A row that any member cannot score is an error of the ensemble.
    """

    def __init__(self, folder: str | Path, members: Sequence[FolderModel]) -> None:
        self.info = read_model_info(folder)
        self.stack = self.info.extra["stack"]
        self.gains = self.info.scale.gains
        self.members = list(members)
        assert len(self.members) == len(self.stack["mean"]), (len(self.members), self.stack)

    @property
    def num_tokens(self) -> int:
        return sum(member.num_tokens for member in self.members)

    def _forward(
        self, queries: Sequence[str], products: Sequence[Mapping[str, Any]]
    ) -> tuple[np.ndarray, list[str | None]]:
        features = np.empty((len(queries), len(self.members)), dtype=np.float32)
        errors: list[str | None] = [None] * len(queries)
        for column, member in enumerate(self.members):
            labels = member.label_rows(queries, products)
            features[:, column] = logit_of_classes(labels.class_logits, member.gains)
            errors = [first or second for first, second in zip(errors, labels.errors, strict=True)]
        return stack_logits(features, self.stack), errors

    def close(self) -> None:
        for member in self.members:
            member.close()


def member_folders(folder: str | Path) -> list[Path]:
    """The model folders of an ensemble's members, in the order of its stack."""
    count = len(read_model_info(folder).extra["stack"]["mean"])
    return [Path(folder) / _MEMBERS / str(index) for index in range(count)]


def build_ensemble_folder(
    members: Sequence[str | Path],
    stack: Mapping[str, Any],
    scale: LabelScale,
    out: str | Path,
    calibration: Calibration | None = None,
) -> Path:
    """Make a model folder of kind ensemble: copies the member folders in; `out` appears whole.

    Args:
        members: model folders, in the order of the stack's features. The ensemble's own template is the first one's
            with the fields of all; each member reads pairs with its own.
        stack: from `fit_stack`.

    Raises:
        UserError: a member is no model folder, or there is none.
    """
    if not members:
        raise UserError("an ensemble needs at least one member; list them under teacher.members")
    assert len(members) == len(stack["mean"]), (len(members), stack)
    infos = [read_model_info(member) for member in members]
    with staged_folder(out) as partial:
        for index, member in enumerate(members):
            shutil.copytree(member, partial / _MEMBERS / str(index))
        # What a caller must hand over is what any member reads, not only the first.
        fields = dict.fromkeys(name for info in infos for name in info.template.fields)
        template = replace(infos[0].template, fields=tuple(fields))
        info = ModelInfo("ensemble", scale, template, calibration, {"stack": dict(stack)})
        write_model_info(partial, info)
    return Path(out)
