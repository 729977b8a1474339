"""The task of a student: to follow the labels of groups, by a weighted sum of losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import nn

from relevance_ray import losses
from relevance_ray.student import collate
from relevance_ray.student.two_tower import TowerReader, TowerTokens
from relevance_ray.training.contrast import Contrast
from relevance_ray.training.options import StudentOptions
from relevance_ray.training.pair_task import PairTask

THRESHOLD_STRIDE = 30.0
"""AdamW moves a parameter by about the learning rate a step; thresholds must move farther, and are multiples of this."""


@dataclass(frozen=True)
class StudentTaskSpec:
    """A student's task: paths and options, built anew in each worker.

    Attributes:
        start: folder of the model to start from.
        train_files: labeled groups; or judged groups, of which split train is used.
        judged_file: judged groups, of which split dev is evaluated on.
        options: of the student.
        label_smoothing: of human grades, where classes are distilled.
        max_groups: only the first so many groups of `train_files`.
    """

    start: str
    train_files: Sequence[str]
    judged_file: str
    options: StudentOptions
    label_smoothing: float = 0.0
    max_groups: int | None = None

    def build(self, rank: int, world_size: int) -> StudentTask:
        return StudentTask(self)


class StudentTask(PairTask):
    """Distills logits group by group; an example is a group."""

    def __init__(self, spec: StudentTaskSpec) -> None:
        super().__init__(spec.start, spec.judged_file)
        self.options = options = spec.options

        def encode(files: Sequence[str], max_groups: int | None) -> collate.TrainingGroups:
            return collate.encode_groups(
                collate.read_training_tables(files),
                self.reader,
                self.info.scale,
                options.max_group_products,
                options.fit.seed,
                max_groups=max_groups,
                with_classes=options.kl_weight > 0,
                label_smoothing=spec.label_smoothing,
            )

        parts = [encode(spec.train_files, spec.max_groups)]
        if options.human_share:
            parts.append(encode([spec.judged_file], None))
        self.groups = collate.join_groups(parts, self.reader)
        self.num_generated = len(parts[0].group_sizes)
        num_human = round(self.num_generated * options.human_share / (1 - options.human_share))
        human = np.arange(self.num_generated, len(self.groups.group_sizes))
        self.examples = np.concatenate([np.arange(self.num_generated), np.resize(human, num_human * (len(human) > 0))])
        self.costs = self.groups.group_tokens[self.examples]
        self.num_pairs = self.groups.group_sizes[self.examples]
        if options.kl_weight:
            assert self.groups.classes is not None
            self.thresholds = OrdinalThresholds(self.groups.classes.shape[1])
            self.model = nn.ModuleDict({"net": self.net, "thresholds": self.thresholds})
        self.contrast = Contrast(options.infonce_temperature) if options.infonce_weight else None

    def order(self, seed: int, epoch: int) -> np.ndarray:
        mixed = super().order(seed, epoch)
        if self.options.human_order == "mixed":
            return mixed
        return np.concatenate([mixed[mixed < self.num_generated], mixed[mixed >= self.num_generated]])

    def begin(self, examples: np.ndarray) -> None:
        if self.contrast is not None:
            rows, place = self.groups.take(self.examples[examples])
            reader, tokens = cast(TowerReader, self.reader), cast(TowerTokens, self.groups.pairs)
            positive = self.groups.target[rows] > 0
            self.contrast.begin(reader, self.net, tokens, examples, rows, place, positive)

    def loss(self, examples: np.ndarray) -> torch.Tensor:
        """The weighted sum of the losses, summed over groups; pointwise ones are averaged within a group first."""
        options, num_groups = self.options, len(examples)
        rows, place = self.groups.take(self.examples[examples])
        if self.contrast is None:
            student = self.reader.outputs(self.net, self.groups.pairs, rows)[:, 0]
        else:
            reader, tokens = cast(TowerReader, self.reader), cast(TowerTokens, self.groups.pairs)
            queries, products = reader.vectors(self.net, tokens, rows)
            student = self.net.logits(queries, products)
        device = student.device
        teacher, group = torch.from_numpy(self.groups.target[rows]).to(device), torch.from_numpy(place).to(device)
        total = student.new_zeros(num_groups)
        if options.margin_weight:
            grade = torch.from_numpy(self.groups.grade[rows].astype(np.int64)).to(device)
            classes = grade if options.margins == "differing" else None
            margin = losses.group_margin_mse(student, teacher, group, num_groups, classes)
            total = total + options.margin_weight * margin
        if options.level_weight:
            total = total + options.level_weight * losses.level_anchor(student, teacher, group, num_groups)
        if options.bce_weight:
            by_pair = losses.soft_bce(student, torch.sigmoid(teacher))
            total = total + options.bce_weight * losses.group_mean(by_pair, group, num_groups)
        if options.kl_weight:
            assert self.groups.classes is not None
            classes = torch.from_numpy(self.groups.classes[rows]).to(device)
            own = losses.ordinal_log_probabilities(student, self.thresholds())
            by_pair = losses.class_kl(own, classes, options.kl_temperature)
            total = total + options.kl_weight * losses.group_mean(by_pair, group, num_groups)
        if self.contrast is not None:
            total = total + options.infonce_weight * self.contrast.loss(examples, queries, products, place)
        return total.sum()


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
