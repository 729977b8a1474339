"""Untrained scorers to hold the trained models against: BM25 and a zero-shot cosine.

Each is an ordinary model folder, so nothing downstream knows that it is a baseline; only its calibration is fitted, on
the same dev judgments as the student's, so that F1 compares rankings and not thresholds. (Random order needs no folder:
see `ask.random_predictions`.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from relevance_ray.calibration import Calibration, fit_calibration
from relevance_ray.engines.bi_encoder import build_bi_encoder_folder
from relevance_ray.engines.bm25 import build_bm25_folder
from relevance_ray.engines.registry import load_pair_model
from relevance_ray.evaluation.ask import Asked, predict
from relevance_ray.evaluation.judged import flatten
from relevance_ray.evaluation.options import EvaluateOptions
from relevance_ray.model_folder import read_model_info, write_model_info
from relevance_ray.models import resolve_model
from relevance_ray.schema import LabelScale
from relevance_ray.templates import Template
from relevance_ray.training.options import CalibrationMethod


def build_baselines(
    options: EvaluateOptions,
    products: Callable[[], Iterable[pa.Table]],
    dev: pa.Table,
    scale: LabelScale,
    template: Template,
    out_dir: Path,
    method: CalibrationMethod = "ordinal",
) -> dict[str, Path]:
    """Build the model folders of `options.baselines`; those that are there and calibrated are kept.

    Args:
        options: which baselines, and the encoder of the cosine.
        products: starts a stream of PRODUCT tables, the catalog that BM25 counts its words in.
        dev: JUDGED_GROUP rows to calibrate on; with none, the baselines have no grades and so no F1.
        template: the fields they read; the student's, for a fair comparison (its prompt, if any, is left out).
        out_dir: each baseline becomes a folder in here, by name.
        method: of their calibration; the student's, likewise.

    Returns:
        Name ("bm25", "cosine") -> model folder, in the order of the options.

    Raises:
        UserError: `options.cosine_model` does not resolve, or the catalog is empty.
    """
    template = replace(template, prompt=None)
    out: dict[str, Path] = {}
    for name in options.baselines:
        folder = out_dir / name
        if name == "random":
            continue
        if not folder.exists():
            if name == "bm25":
                build_bm25_folder(products(), template, scale, folder)
            else:
                build_bi_encoder_folder(resolve_model(options.cosine_model), scale, folder, template)
        if read_model_info(folder).calibration is None and dev.num_rows:
            calibrate_folder(folder, dev, scale, method)
        out[name] = folder
    return out


def calibrate_folder(folder: Path, dev: pa.Table, scale: LabelScale, method: CalibrationMethod = "ordinal") -> None:
    """Fit a model folder's calibration on judged groups and write it into its `relevance.json`."""
    calibration = calibration_on(load_pair_model(folder), dev, scale, method)
    write_model_info(folder, replace(read_model_info(folder), calibration=calibration))


def calibration_on(model: Asked, dev: pa.Table, scale: LabelScale, method: CalibrationMethod) -> Calibration | None:
    """A calibration of what a model says of judged groups, without smoothing; None where it can score none of them."""
    logits = predict(model, flatten(dev, scale)).logits
    judged = [product for row in dev["products"].to_pylist() for product in row]
    distributions = np.array([scale.distribution(item["grade"], item["rater_grades"], 0.0) for item in judged])
    return fit_calibration(method, logits, distributions)
