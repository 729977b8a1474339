"""The two tasks that the loop trains: a student on groups, a teacher on judged pairs.

Both run the same forward pass. The pairs of a micro-batch are sorted by length and go through the model in runs of about a
thousand tokens, so that hardly any token is padding; the loss then joins them again, because a margin needs both of
its products. A run is not smaller than that, since each costs the embedding table one dense gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from relevance_ray import losses, metrics
from relevance_ray.calibration import logit_of_classes
from relevance_ray.engines.encoding import PairEncoder, token_batches
from relevance_ray.engines.transformers import as_class_logits, gains_of
from relevance_ray.errors import UserError
from relevance_ray.model_folder import read_model_info
from relevance_ray.schema import normalize_query, query_id
from relevance_ray.student import collate
from relevance_ray.teacher.classifier import add_lora, merge_lora
from relevance_ray.training import distributed
from relevance_ray.training.fit import MAIN_METRIC

CPU_RUN_TOKENS = 1024
GPU_RUN_TOKENS = 16384


class SequenceTask:
    """What both tasks share: a sequence-classification model, its encoder, its dev queries.

    Args:
        start: the model folder to start from.
        judged_file: judged groups; those of split dev are evaluated on.
        lora: rank of LoRA adapters, 0 for none.
        seed: decides fresh weights.
    """

    model: nn.Module
    costs: np.ndarray
    num_pairs: np.ndarray

    def __init__(self, start: str, judged_file: str, lora: int = 0, seed: int = 0) -> None:
        self.info = read_model_info(start)
        self.tokenizer = AutoTokenizer.from_pretrained(start)
        self.encoder = PairEncoder(self.tokenizer, self.info.template)
        model = AutoModelForSequenceClassification.from_pretrained(start, dtype=torch.float32)
        self.gains = gains_of(self.info, model.config.num_labels)
        self.model = add_lora(model, lora, seed) if lora else model
        judged = collate.read_judged_split(judged_file, "dev")
        self.dev = collate.encode_judged(judged, self.encoder, self.info.scale)
        self.asked = self.dev.pairs
        self.asked_rows = np.arange(len(self.asked.lengths))

    def forward(self, pairs: collate.PackedPairs, rows: np.ndarray) -> torch.Tensor:
        """Outputs of the model for some rows: float32 [len(rows), num_labels]."""
        device = next(self.model.parameters()).device
        run_tokens = CPU_RUN_TOKENS if device.type == "cpu" else GPU_RUN_TOKENS
        runs = token_batches(pairs.lengths[rows], run_tokens)
        outputs = []
        for run in runs:
            inputs = {name: torch.from_numpy(value).to(device) for name, value in pairs.pad(rows[run]).items()}
            outputs.append(self.model(**inputs).logits.float())
        back = torch.from_numpy(np.argsort(np.concatenate(runs))).to(device)
        return torch.cat(outputs)[back]

    def class_logits(self, pairs: collate.PackedPairs, rows: np.ndarray) -> np.ndarray:
        """float32 [n, K] of n pairs, NaN for those not in `rows` or that could not be encoded; every worker does its
        share. Collective."""
        usable = rows[pairs.lengths[rows] > 0]
        usable = usable[np.argsort(-pairs.lengths[usable], kind="stable")]
        mine = usable[distributed.rank() :: distributed.world_size()]
        out = np.full((len(pairs.lengths), len(self.gains)), np.nan, dtype=np.float32)
        with torch.inference_mode():
            found = as_class_logits(self.forward(pairs, mine).cpu().numpy()) if len(mine) else out[:0]
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

    def save(self, folder: Path) -> None:
        merge_lora(self.model).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


class StudentTask(SequenceTask):
    """Distills logits group by group; an example is a group."""

    def __init__(self, spec: StudentTaskSpec) -> None:
        super().__init__(spec.start, spec.judged_file)
        self.loss_name, self.level_weight = spec.loss, spec.level_weight
        tables = collate.read_training_tables(spec.train_files)
        self.groups = collate.encode_groups(
            tables, self.encoder, spec.max_group_products, spec.seed, max_groups=spec.max_groups
        )
        self.costs, self.num_pairs = self.groups.group_tokens, self.groups.group_sizes

    def loss(self, examples: np.ndarray) -> torch.Tensor:
        """`margin + level_weight * level`, or the mean binary cross-entropy on the sigmoid of the targets; summed over
        groups."""
        rows, place = self.groups.take(examples)
        student = self.forward(self.groups.pairs, rows)[:, 0]
        teacher = torch.from_numpy(self.groups.target[rows]).to(student.device)
        group = torch.from_numpy(place).to(student.device)
        if self.loss_name == "soft_bce":
            by_pair = losses.soft_bce(student, torch.sigmoid(teacher))
            return losses.group_mean(by_pair, group, len(examples)).sum()
        loss = losses.group_margin_mse(student, teacher, group, len(examples))
        if self.level_weight:
            loss = loss + self.level_weight * losses.level_anchor(student, teacher, group, len(examples))
        return loss.sum()


class TeacherTask(SequenceTask):
    """Learns human judgments; an example is a judged pair."""

    def __init__(self, spec: TeacherTaskSpec) -> None:
        super().__init__(spec.start, spec.judged_file, spec.lora, spec.seed)
        judged = collate.read_judged_split(spec.judged_file, "train")
        flat = collate.flatten_groups(judged)
        fold = query_folds(flat.queries, spec.folds)
        pairs = collate.pack_pairs(self.encoder, flat.queries, flat.products)
        if spec.held_out is not None:
            self.asked, self.asked_rows = pairs, np.flatnonzero(fold == spec.held_out)
        train = (pairs.lengths > 0) & (fold != spec.held_out if spec.held_out is not None else True)
        self.pairs, self.rows = pairs, np.flatnonzero(train)
        self.single = len(self.gains) == 2 and self.model.config.num_labels == 1
        distributions = collate.grade_distributions(judged, self.info.scale, spec.label_smoothing)
        target = self.info.scale.expected_gain(distributions) if self.single else distributions
        self.target = target.astype(np.float32)
        self.costs = pairs.lengths[self.rows]
        self.num_pairs = np.ones(len(self.rows), dtype=np.int64)

    def loss(self, examples: np.ndarray) -> torch.Tensor:
        """Cross-entropy against the soft grades; for a single logit, binary cross-entropy against their expected gain."""
        rows = self.rows[examples]
        outputs = self.forward(self.pairs, rows)
        target = torch.from_numpy(self.target[rows]).to(outputs.device)
        if self.single:
            return losses.soft_bce(outputs[:, 0], target).sum()
        return losses.soft_cross_entropy(outputs, target).sum()


@dataclass(frozen=True)
class StudentTaskSpec:
    """A student's task: paths and options, built anew in each worker.

    Attributes:
        start: folder of the model to start from.
        train_files: labeled groups; or judged groups, of which split train is used.
        judged_file: judged groups, of which split dev is evaluated on.
        loss: `margin_mse` or `soft_bce`.
        max_groups: only the first so many groups of `train_files`.
    """

    start: str
    train_files: Sequence[str]
    judged_file: str
    loss: str
    level_weight: float
    max_group_products: int
    seed: int
    max_groups: int | None = None

    def build(self, rank: int, world_size: int) -> StudentTask:
        return StudentTask(self)


@dataclass(frozen=True)
class TeacherTaskSpec:
    """A classifier's task.

    Attributes:
        start: folder of the model to start from.
        judged_file: judged groups; split train is learnt, split dev evaluated on.
        lora: rank, or 0.
        label_smoothing: mass of a grade that leaks to its neighbours.
        folds, held_out: with `held_out`, the queries of that fold (of `folds`) are not trained on, and the
            prediction is for them, in their rows among all train pairs, instead of for the dev pairs.
    """

    start: str
    judged_file: str
    lora: int
    label_smoothing: float
    seed: int
    folds: int = field(default=1)
    held_out: int | None = None

    def build(self, rank: int, world_size: int) -> TeacherTask:
        return TeacherTask(self)


def query_folds(queries: Sequence[str], folds: int) -> np.ndarray:
    """The fold of each query, int64 [n]: queries in the order of a hash of their normal form, dealt out in turn, so that
    folds are of equal size and all spellings of a query share one.

    Raises:
        UserError: fewer distinct queries than folds.
    """
    distinct = {query: query_id(normalize_query(query)) for query in set(queries)}
    ids = sorted(set(distinct.values()))
    if len(ids) < folds:
        raise UserError(f"there are {len(ids)} train queries, too few for {folds} folds; lower teacher.folds")
    place = {identity: index % folds for index, identity in enumerate(ids)}
    return np.asarray([place[distinct[query]] for query in queries], dtype=np.int64)
