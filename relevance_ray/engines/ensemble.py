"""Several models stacked into one: softmax regression from their logits to the K classes.

A language model, a bi-encoder and BM25 err on different pairs, so a few dozen weights over their logits make a better
teacher than any of them. The weights must be fitted on out-of-fold logits: a member looks perfect on the pairs that it
was trained on, and would get all the weight.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax

from relevance_ray.calibration import OrdinalCalibration, logit_of_classes
from relevance_ray.engines.base import FolderModel
from relevance_ray.errors import UserError
from relevance_ray.model_folder import ModelInfo, read_model_info, staged_folder, write_model_info
from relevance_ray.schema import LabelScale

_MEMBERS = "members"


def fit_stack(features: np.ndarray, distributions: np.ndarray, l2: float = 1e-2) -> dict[str, Any]:
    """Softmax regression on standardised member logits, against soft distributions.

    Minimises the mean cross-entropy plus `l2 / 2 * sum(weights^2)` (bias free) in float64 by L-BFGS from zero: convex,
    so the same on every run.

    Args:
        features: [n, m] out-of-fold logits, finite.
        distributions: [n, K].

    Returns:
        Plain lists, for `relevance.json`: `mean` and `spread` [m], `weights` [m][K], `bias` [K].

    Raises:
        ValueError: no rows, or features that are not finite.
    """
    x = np.asarray(features, dtype=np.float64)
    target = np.asarray(distributions, dtype=np.float64)
    assert x.ndim == 2, x.shape
    assert len(x) == len(target), (x.shape, target.shape)
    if len(x) == 0 or not np.isfinite(x).all():
        raise ValueError(f"stacking needs at least one row and finite logits; got {len(x)} rows")
    n, m, num_classes = len(x), x.shape[1], target.shape[1]
    mean, spread = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-6)
    z = (x - mean) / spread

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = parameters[: m * num_classes].reshape(m, num_classes), parameters[m * num_classes :]
        log_p = log_softmax(z @ weights + bias, axis=1)
        residual = (np.exp(log_p) * target.sum(axis=1, keepdims=True) - target) / n
        value = -(target * log_p).sum() / n + 0.5 * l2 * (weights**2).sum()
        return value, np.concatenate([(z.T @ residual + l2 * weights).ravel(), residual.sum(axis=0)])

    start = np.zeros((m + 1) * num_classes)
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    weights = found.x[: m * num_classes].reshape(m, num_classes)
    return {
        "mean": mean.tolist(),
        "spread": spread.tolist(),
        "weights": weights.tolist(),
        "bias": found.x[m * num_classes :].tolist(),
    }


def stack_logits(features: np.ndarray, stack: Mapping[str, Any]) -> np.ndarray:
    """Class logits float32 [n, K] of member logits [n, m]."""
    z = (np.asarray(features, dtype=np.float64) - np.asarray(stack["mean"])) / np.asarray(stack["spread"])
    return (z @ np.asarray(stack["weights"]) + np.asarray(stack["bias"])).astype(np.float32)


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


def member_folders(folder: str | Path) -> list[Path]:
    """The model folders of an ensemble's members, in the order of its stack."""
    count = len(read_model_info(folder).extra["stack"]["mean"])
    return [Path(folder) / _MEMBERS / str(index) for index in range(count)]


def build_ensemble_folder(
    members: Sequence[str | Path],
    stack: Mapping[str, Any],
    scale: LabelScale,
    out: str | Path,
    calibration: OrdinalCalibration | None = None,
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
