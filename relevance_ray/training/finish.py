"""The last acts of a training: calibration on the dev queries, and a model folder that appears whole."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import numpy as np

from relevance_ray.calibration import MIN_ISOTONIC, Calibration, fit_calibration
from relevance_ray.errors import UserError
from relevance_ray.model_folder import INFO_FILE, finish_folder, read_model_info, staged_folder
from relevance_ray.schema import LabelScale
from relevance_ray.storage import join, localize, read_json, remove_tree
from relevance_ray.student.collate import grade_distributions, read_judged_split
from relevance_ray.training.fit import FitResult
from relevance_ray.training.options import CalibrationMethod


def finished_summary(out_dir: str) -> dict[str, Any] | None:
    """What the training said that finished this folder, or None where there is no finished folder."""
    try:
        return dict(read_json(join(out_dir, INFO_FILE))["extra"]["training"])
    except FileNotFoundError:
        return None


def check_dev_queries(judged_file: str, method: CalibrationMethod = "ordinal") -> None:
    """Raise `UserError` where there is nothing to choose weights by, or too little to calibrate on; before training, not
    after."""
    dev = read_judged_split(judged_file, "dev")
    num_pairs = sum(map(len, dev["products"].to_pylist()))
    if method == "isotonic" and num_pairs < MIN_ISOTONIC:
        raise UserError(
            f"student.calibration=isotonic follows the noise of few judgments: {judged_file} has {num_pairs:,} dev pairs, "
            f"and it takes {MIN_ISOTONIC:,}; leave it at ordinal, or raise data.dev_percent"
        )
    if dev.num_rows == 0:
        raise UserError(f"{judged_file} has no query of split dev, which training needs; raise data.dev_percent")
    if read_judged_split(judged_file, "train").num_rows == 0:
        raise UserError(f"{judged_file} has no query of split train; lower data.test_percent and data.dev_percent")


def calibrate(
    logits: np.ndarray, judged_file: str, scale: LabelScale, method: CalibrationMethod = "ordinal"
) -> Calibration:
    """Fit the class probabilities of a model on the human grades of the dev queries, without smoothing.

    Args:
        logits: [n] of the dev pairs in the order of the file, NaN where a pair could not be scored.
    """
    distributions = grade_distributions(read_judged_split(judged_file, "dev"), scale, label_smoothing=0.0)
    calibration = fit_calibration(method, logits, distributions)
    if calibration is None:
        raise UserError(f"none of the dev pairs of {judged_file} can be scored; look at its queries and product fields")
    return calibration


def publish_fit(result: FitResult, start: str, out_dir: str, calibration: Calibration, labels: str) -> dict[str, Any]:
    """Make the model folder of what a loop left, which began at folder `start`, and drop both. Returns the summary."""
    summary = {
        "labels": labels,
        "steps": result.steps,
        "best_step": result.best_step,
        "dev": result.metrics,
        "pairs": result.pairs,
        "seconds": result.seconds,
        "pairs_per_second": round(result.pairs_per_second, 2),
    }
    model = localize(result.model_folder)
    trained = read_model_info(model)
    info = replace(trained, calibration=calibration, extra={**trained.extra, "training": summary})
    with staged_folder(out_dir) as partial:
        shutil.copytree(model, partial, dirs_exist_ok=True)
        finish_folder(partial, info)
    remove_tree(result.model_folder)
    remove_tree(start)
    return summary
