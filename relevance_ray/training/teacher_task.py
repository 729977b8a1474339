"""The task of a classifier: to learn human judgments, pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from relevance_ray import losses
from relevance_ray.errors import UserError
from relevance_ray.schema import normalize_query, query_id
from relevance_ray.student import collate
from relevance_ray.teacher.classifier import add_lora
from relevance_ray.training.pair_task import PairTask


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


class TeacherTask(PairTask):
    """Learns human judgments; an example is a judged pair."""

    def __init__(self, spec: TeacherTaskSpec) -> None:
        self._lora, self._seed = spec.lora, spec.seed
        super().__init__(spec.start, spec.judged_file)
        judged = collate.read_judged_split(spec.judged_file, "train")
        flat = collate.flatten_groups(judged)
        fold = query_folds(flat.queries, spec.folds)
        pairs = self.reader.pack(flat.queries, flat.products)
        lengths = pairs.lengths
        if spec.held_out is not None:
            self.asked, self.asked_rows = pairs, np.flatnonzero(fold == spec.held_out)
        train = (lengths > 0) & (fold != spec.held_out if spec.held_out is not None else True)
        if not train.any():
            raise UserError(
                "no judged pair of train can be read by this teacher; raise teacher.max_tokens, which its prompt counts "
                "towards, or name in teacher.fields what the products have"
            )
        self.pairs, self.rows = pairs, np.flatnonzero(train)
        self.single = len(self.gains) == 2 and self.net.config.num_labels == 1
        distributions = collate.grade_distributions(judged, self.info.scale, spec.label_smoothing)
        target = self.info.scale.expected_gain(distributions) if self.single else distributions
        self.target = target.astype(np.float32)
        self.costs = lengths[self.rows]
        self.num_pairs = np.ones(len(self.rows), dtype=np.int64)

    def open_net(self) -> Any:
        net = super().open_net()
        return add_lora(net, self._lora, self._seed) if self._lora else net

    def loss(self, examples: np.ndarray) -> torch.Tensor:
        """Cross-entropy against the soft grades; for a single logit, binary cross-entropy against their expected gain."""
        rows = self.rows[examples]
        outputs = self.reader.outputs(self.net, self.pairs, rows)
        target = torch.from_numpy(self.target[rows]).to(outputs.device)
        if self.single:
            return losses.soft_bce(outputs[:, 0], target).sum()
        return losses.soft_cross_entropy(outputs, target).sum()


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
