"""The task of a student: to follow the labels of groups, by a weighted sum of losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from relevance_ray import losses
from relevance_ray.errors import UserError
from relevance_ray.storage import localize
from relevance_ray.student.collate import TrainingGroups, join_groups
from relevance_ray.student.token_files import GroupFiles
from relevance_ray.student.two_tower import TowerReader
from relevance_ray.training.contrast import Contrast
from relevance_ray.training.options import StudentOptions
from relevance_ray.training.pair_task import PairTask

THRESHOLD_STRIDE = 30.0
"""AdamW moves a parameter by about the learning rate a step; thresholds must move farther, and are multiples of this."""


@dataclass(frozen=True)
class StudentTaskSpec:
    """A student's task: paths (local or s3://) and options, built anew in each worker.

    Attributes:
        start: folder of the model to start from.
        token_files: of `ingest`: groups of the teacher's labels (or, without any, of the human ones).
        human_files: of `ingest`: groups of human judgments to mix in, by `options.human_share`.
        judged_file: judged groups, of which split dev is evaluated on.
        options: of the student.
        max_pairs: only the first groups of `token_files`, of so many pairs at most.
    """

    start: str
    token_files: Sequence[str]
    judged_file: str
    options: StudentOptions
    human_files: Sequence[str] = ()
    max_pairs: int | None = None

    def build(self, rank: int, world_size: int) -> StudentTask:
        return StudentTask(self)


class StudentTask(PairTask):
    """Distills logits group by group; an example is a group."""

    def __init__(self, spec: StudentTaskSpec) -> None:
        self.options = options = spec.options
        generated = GroupFiles(_local(spec.token_files), spec.max_pairs)
        self.thresholds = OrdinalThresholds(generated.num_classes) if options.kl_weight else None
        super().__init__(spec.start, spec.judged_file)
        human = GroupFiles(_local(spec.human_files))
        self.sources = generated, human
        self.num_generated = len(generated.sizes)
        num_human = 0
        if len(human.sizes):
            num_human = round(self.num_generated * options.human_share / (1 - options.human_share))
        if options.kl_weight and len(human.sizes) and generated.num_classes != human.num_classes:
            raise UserError(
                f"the teacher's labels have {generated.num_classes} classes and the human ones {human.num_classes}, which "
                "student.kl_weight cannot mix; set student.human_share to 0"
            )
        repeated = np.resize(np.random.default_rng(options.fit.seed).permutation(len(human.sizes)), num_human)
        self.examples = np.concatenate([np.arange(self.num_generated), repeated])
        self.costs = np.concatenate([generated.num_tokens, human.num_tokens[repeated]])
        self.num_pairs = np.concatenate([generated.sizes, human.sizes[repeated]])
        self.contrast = Contrast(options.infonce_temperature) if options.infonce_weight else None

    def open_model(self, net: Any) -> nn.Module:
        return net if self.thresholds is None else nn.ModuleDict({"net": net, "thresholds": self.thresholds})

    def take(self, examples: np.ndarray) -> TrainingGroups:
        """The groups of some examples, in their order."""
        is_human = examples >= self.num_generated
        parts = [
            source.take(self.examples[examples[mine]])
            for source, mine in zip(self.sources, (~is_human, is_human), strict=True)
            if mine.any()
        ]
        groups = join_groups(parts)
        back = np.argsort(np.concatenate([np.flatnonzero(~is_human), np.flatnonzero(is_human)]))
        return groups.take(back) if len(parts) > 1 else groups

    def order(self, seed: int, epoch: int) -> np.ndarray:
        mixed = super().order(seed, epoch)
        if self.options.human_order == "mixed":
            return mixed
        return np.concatenate([mixed[mixed < self.num_generated], mixed[mixed >= self.num_generated]])

    def begin(self, examples: np.ndarray) -> None:
        if self.contrast is not None:
            groups = self.take(examples) if len(examples) else None
            self.contrast.begin(cast(TowerReader, self.reader), self.net, groups, examples)

    def loss(self, examples: np.ndarray) -> torch.Tensor:
        """The weighted sum of the losses, summed over groups; pointwise ones are averaged within a group first."""
        options, num_groups = self.options, len(examples)
        batch = self.take(examples)
        rows = np.arange(len(batch.target))
        if self.contrast is None:
            student = self.reader.outputs(self.net, batch.pairs, rows)[:, 0]
        else:
            queries, products = cast(TowerReader, self.reader).vectors(self.net, batch.pairs, rows)
            student = self.net.logits(queries, products)
        device = student.device
        teacher, group = torch.from_numpy(batch.target).to(device), torch.from_numpy(batch.place).to(device)
        total = student.new_zeros(num_groups)
        if options.margin_weight:
            grade = torch.from_numpy(batch.grade.astype(np.int64)).to(device)
            classes = grade if options.margins == "differing" else None
            margin = losses.group_margin_mse(student, teacher, group, num_groups, classes)
            total = total + options.margin_weight * margin
        if options.level_weight:
            total = total + options.level_weight * losses.level_anchor(student, teacher, group, num_groups)
        if options.bce_weight:
            by_pair = losses.soft_bce(student, torch.sigmoid(teacher))
            total = total + options.bce_weight * losses.group_mean(by_pair, group, num_groups)
        if self.thresholds is not None:
            assert batch.classes is not None
            classes = torch.from_numpy(batch.classes).to(device)
            own = losses.ordinal_log_probabilities(student, self.thresholds())
            by_pair = losses.class_kl(own, classes, options.kl_temperature)
            total = total + options.kl_weight * losses.group_mean(by_pair, group, num_groups)
        if self.contrast is not None:
            total = total + options.infonce_weight * self.contrast.loss(examples, queries, products, batch)
        return total.sum()


def _local(files: Sequence[str]) -> list[Path]:
    """The files as they lie on this machine; those of a folder are fetched at once."""
    folders = {folder: localize(folder) for folder in {file.rsplit("/", 1)[0] for file in files}}
    return [folders[file.rsplit("/", 1)[0]] / file.rsplit("/", 1)[1] for file in files]


class OrdinalThresholds(nn.Module):
    """K - 1 rising thresholds that give a student of one output K classes; trained, and dropped afterwards, since
    calibration fits those that are kept."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        start = torch.linspace(-2.0, 2.0, num_classes - 1) if num_classes > 2 else torch.zeros(1)
        self.register_buffer("start", start)
        self.steps = nn.Parameter(torch.zeros(num_classes - 1))

    def forward(self) -> torch.Tensor:
        """[K - 1]: the first, and what each next one adds, which stays above 0."""
        steps = THRESHOLD_STRIDE * self.steps
        gaps = torch.diff(self.start) * torch.exp(steps[1:])
        return torch.cat([self.start[:1] + steps[:1], gaps]).cumsum(dim=0)
