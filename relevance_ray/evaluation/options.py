"""Options of the evaluation, light enough for the configuration to import."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from relevance_ray.options import STRICT, option
from relevance_ray.training.options import HumanFitOptions

Baseline = Literal["bm25", "cosine", "random"]
Dimension = Literal["frequency", "length", "language", "category", "brand", "price", "missing"]
MODEL_NAME = re.compile("[A-Za-z0-9_-]{1,40}")


@dataclass(frozen=True)
class EvaluateOptions:
    """How models are compared on held-out human judgments."""

    __pydantic_config__ = STRICT
    splits: list[str] = option(["dev", "test"], "Splits of the human judgments to report, each by itself")
    ks: list[int] = option([10], "Cutoffs k of nDCG@k and recall@k, beside nDCG over the whole list")
    precisions: list[float] = option([0.9, 0.95], "Precisions at which recall is reported")
    num_resamples: int = option(1000, "Bootstrap resamples of the queries behind each 95% interval")
    num_permutations: int = option(
        10_000, "Random sign assignments behind each p-value (fewer, from 1,000 on, beyond 8,000 queries)"
    )
    seed: int = option(0, "Seed of the resamples")
    baselines: list[Baseline] = option(
        ["bm25", "cosine", "random"], "Untrained scorers beside the models: BM25, a zero-shot cosine, random order"
    )
    cosine_model: str = option("minilm", "Encoder of the zero-shot cosine: a short name, a folder or a hub id")
    models: dict[str, str] = option(
        {},
        "Further model folders beside the run's own, by the name that the report gives each: another student, say. One that "
        "has seen the judgments of a split is flattered there",
        operational=True,
    )
    scores: dict[str, str] = option(
        {},
        "Files of scores from elsewhere (the shop's own ranker) beside the models, by the name that the report gives each: "
        "Parquet, CSV or JSON lines with columns query, product_id and logit (any number, higher is better) or grade",
        operational=True,
    )
    slices: list[Dimension] = option(
        list(get_args(Dimension)),
        "What judgments are sliced by: the query's frequency in the log, its length, the language of its products; a "
        "product's category, brand (judged in training or not), price and missing fields",
    )
    human_loss: Literal["margin_mse", "soft_bce"] = option(
        "soft_bce", "Loss of the same student on human labels alone: on the soft targets, or on their log-odds' margins"
    )
    human_fit: HumanFitOptions = option(HumanFitOptions(), "The loop of the same student on human labels alone")

    def __post_init__(self) -> None:
        if not self.splits or not set(self.splits) <= {"train", "dev", "test"}:
            raise ValueError(f"splits {self.splits} must name some of train, dev, test")
        for name in ("splits", "ks", "precisions", "baselines", "slices"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} {getattr(self, name)} names something twice")
        if any(k < 1 for k in self.ks):
            raise ValueError(f"ks {self.ks} must be cutoffs of at least 1")
        taken = {"student", "teacher", "human_only", *get_args(Baseline)}
        for key, names in (("models", self.models), ("scores", self.scores)):
            for name in names:
                if name in taken or not MODEL_NAME.fullmatch(name):
                    raise ValueError(
                        f"{key}.{name} must be named otherwise: by letters, digits, _ and -, and as no other of the report"
                    )
                taken.add(name)
        if self.human_fit.sharded:
            raise ValueError("human_fit.sharded is for teachers; a student fits every worker")
        if not all(0 < precision <= 1 for precision in self.precisions):
            raise ValueError(f"precisions {self.precisions} must be above 0 and at most 1")
        for name in ("num_resamples", "num_permutations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
