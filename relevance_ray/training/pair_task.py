"""What the tasks of the loop share: a model that reads pairs, its forward pass, its dev queries.

The pairs of a micro-batch are sorted by length and go through the model in runs of about a thousand tokens, so that hardly
any token is padding; a loss then joins them again, because a margin needs both of its products.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from relevance_ray import distributed, metrics
from relevance_ray.calibration import logit_of_classes
from relevance_ray.engines.encoding import PairEncoder
from relevance_ray.engines.transformers import as_class_logits, gains_of
from relevance_ray.model_folder import ModelInfo, read_model_info, write_model_info
from relevance_ray.storage import localize
from relevance_ray.student import collate
from relevance_ray.student.cross_encoder import CrossReader
from relevance_ray.student.packed import PairTokens
from relevance_ray.student.reading import Reader
from relevance_ray.student.two_tower import TowerReader, TwoTower
from relevance_ray.teacher.classifier import merge_lora
from relevance_ray.training.fit import MAIN_METRIC
from relevance_ray.training.placement import load_trained_weights


class PairTask:
    """What all tasks share: a model that reads pairs, and its dev queries.

    Args:
        start: the model folder to start from, local or s3://, as is the file of judged groups.
        judged_file: judged groups; those of split dev are evaluated on.
        model: what is trained.
        net: the part of it that reads.
    """

    model: nn.Module
    net: Any
    reader: Reader
    costs: np.ndarray
    num_pairs: np.ndarray

    def __init__(self, start: str, judged_file: str) -> None:
        self._start = localize(start)
        self.info = read_model_info(self._start)
        self.tokenizer = AutoTokenizer.from_pretrained(self._start)
        self.reader = reader_of(self.info, self.tokenizer)
        self.net = self.open_net()
        self.model = self.open_model(self.net)
        num_labels = 1 if isinstance(self.net, TwoTower) else self.net.config.num_labels
        self.gains = gains_of(self.info, num_labels)
        judged = collate.read_judged_split(judged_file, "dev")
        self.dev = collate.encode_judged(judged, self.reader, self.info.scale)
        self.asked = self.dev.pairs
        self.asked_rows = np.arange(len(self.asked.lengths))

    def open_net(self) -> Any:
        """What reads pairs, from the start folder, on the CPU."""
        if self.info.kind == "bi_encoder":
            return TwoTower(self._start)
        return AutoModelForSequenceClassification.from_pretrained(self._start, dtype=torch.float32)

    def open_model(self, net: Any) -> nn.Module:
        """What is trained, around it."""
        return cast(nn.Module, net)

    def order(self, seed: int, epoch: int) -> np.ndarray:
        """The order of the examples in one epoch, int64: a pure function of its arguments."""
        return np.random.default_rng([seed, epoch]).permutation(len(self.costs))

    def compile(self) -> None:
        """Run the encoder through `torch.compile`, for inputs of any shape."""
        encoder = self.net.encoder if isinstance(self.net, TwoTower) else self.net
        encoder.compile(dynamic=True)

    def begin(self, examples: np.ndarray) -> None:
        """Before the examples of this worker in a step come in micro-batches. Collective."""

    def class_logits(self, pairs: PairTokens, rows: np.ndarray) -> np.ndarray:
        """float32 [n, K] of n pairs, NaN for those not in `rows` or that could not be encoded; every worker does its
        share. Collective."""
        lengths = pairs.lengths
        usable = rows[lengths[rows] > 0]
        usable = usable[np.argsort(-lengths[usable], kind="stable")]
        mine = usable[distributed.rank() :: distributed.world_size()]
        out = np.full((len(lengths), len(self.gains)), np.nan, dtype=np.float32)
        if not len(usable):
            return out
        with torch.inference_mode():
            found = as_class_logits(self.reader.outputs(self.net, pairs, mine).cpu().numpy())
        for rows, values in distributed.gather((mine, found)):
            out[rows] = values
        return out

    def evaluate(self) -> dict[str, float]:
        """Mean nDCG over the dev queries that have a positive gain."""
        logits = logit_of_classes(self.class_logits(self.dev.pairs, np.arange(len(self.dev.gains))), self.gains)
        scores = np.where(np.isnan(logits), -np.inf, logits)
        per_query = metrics.ndcg(self.dev.gains, scores, self.dev.offsets)
        return {MAIN_METRIC: float(np.nanmean(per_query)) if np.isfinite(per_query).any() else 0.0}

    def predict(self) -> np.ndarray:
        return self.class_logits(self.asked, self.asked_rows)

    def save(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Write a plain model folder of some trained weights."""
        net = self.open_net()
        load_trained_weights(self.open_model(net), weights)
        folder.mkdir(parents=True)
        write_model_info(folder, self.info)
        merge_lora(net).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def reader_of(info: ModelInfo, tokenizer: Any) -> Reader:
    """How models of a kind read pairs."""
    if info.kind == "bi_encoder":
        return TowerReader(tokenizer, info.template)
    return CrossReader(PairEncoder(tokenizer, info.template))
