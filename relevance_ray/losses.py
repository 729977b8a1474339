"""Losses: tensors in, tensor out, over flat batches.

A batch of groups is flat: `P` scores one after another and, for each, the index of its group, so groups of any size need no
padding. Losses come back per group (or per pair), unreduced: what they are averaged over (the *global* batch, across ranks
and micro-batches) is for the caller to know.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def group_margin_mse(
    student: torch.Tensor, teacher: torch.Tensor, group: torch.Tensor, num_groups: int
) -> torch.Tensor:
    """Mean squared error between all margins of a group, at the cost of one pass over its products.

    Walmart (arXiv 2505.07105): with student scores s and teacher logits t of the n products of one query,
    `2 / (n(n-1)) * sum over i<j of ((s_i - s_j) - (t_i - t_j))^2`. With d = s - t that equals
    `2 / (n-1) * sum (d_i - mean d)^2`. The centred form is kept because `sum d^2 - n mean(d)^2` loses its digits in
    float32 as soon as student and teacher differ in level.

    Args:
        student: [P] scores, float.
        teacher: [P] logits.
        group: [P] int64 index of each product's group, 0 .. num_groups - 1, in any order.
        num_groups: G.

    Returns:
        [G]; 0 for a group of fewer than two products, which has no margin.
    """
    difference = student - teacher
    count, mean = _group_mean(difference, group, num_groups)
    centred = difference - mean[group]
    squares = centred.new_zeros(num_groups).index_add(0, group, centred.square())
    return squares * (2.0 / (count - 1).clamp(min=1.0))


def level_anchor(student: torch.Tensor, teacher: torch.Tensor, group: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Square of a group's mean difference `mean(s - t)^2`: [G].

    Margins leave the level of a query's scores free, so pooled thresholds and probabilities would mean nothing; this term,
    weighed by `level_weight`, ties it to the teacher's. Arguments as in `group_margin_mse`.
    """
    return _group_mean(student - teacher, group, num_groups)[1].square()


def group_mean(values: torch.Tensor, group: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Mean of each group's values, [P] -> [G]; 0 for an empty group."""
    return _group_mean(values, group, num_groups)[1]


def _group_mean(values: torch.Tensor, group: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    count = torch.bincount(group, minlength=num_groups).to(values.dtype)
    total = values.new_zeros(num_groups).index_add(0, group, values)
    return count, total / count.clamp(min=1.0)


def soft_cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy against a soft distribution, `-sum_k target_k * log softmax(logits)_k`.

    Args:
        logits: [n, K].
        target: [n, K], rows summing to 1.

    Returns:
        [n].
    """
    return -(target * F.log_softmax(logits, dim=-1)).sum(dim=-1)


def soft_bce(logit: torch.Tensor, soft_target: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy against a soft target, the Walmart teacher's form (arXiv 2505.07105).

    Args:
        logit: [n].
        soft_target: [n], in [0, 1].

    Returns:
        [n].
    """
    return F.binary_cross_entropy_with_logits(logit, soft_target, reduction="none")
