"""Losses: tensors in, tensor out, over flat batches.

A batch of groups is flat: `P` scores one after another and, for each, the index of its group, so groups of any size need no
padding. Losses come back per group (or per pair), unreduced: what they are averaged over (the *global* batch, across ranks
and micro-batches) is for the caller to know. A weighted sum of them is a sum of their results.

| loss | takes, of each pair | ties the student to the teacher's |
|---|---|---|
| `group_margin_mse` | score, logit (and classes, for margins between differing ones only) | differences within a query |
| `level_anchor` | score, logit | level of a query |
| `soft_bce` | logit, soft target | probability of one pair |
| `soft_cross_entropy`, `class_kl` | class log probabilities, class distribution | classes of one pair |
| `info_nce` | vectors of query and product, which are positive | order, against all other products of the batch |
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def group_margin_mse(
    student: torch.Tensor,
    teacher: torch.Tensor,
    group: torch.Tensor,
    num_groups: int,
    classes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error between the margins of a group, at the cost of one pass over its products.

    Walmart (arXiv 2505.07105): with student scores s and teacher logits t of the n products of one query,
    `2 / (n(n-1)) * sum over i<j of ((s_i - s_j) - (t_i - t_j))^2`. With d = s - t that sum equals
    `n * sum (d_i - mean d)^2`. The centred form is kept because `sum d^2 - n mean(d)^2` loses its digits in
    float32 as soon as student and teacher differ in level. Margins between products of one class are left out by taking
    the same sum within each class away from it.

    Args:
        student: [P] scores, float.
        teacher: [P] logits.
        group: [P] int64 index of each product's group, 0 .. num_groups - 1, in any order.
        num_groups: G.
        classes: [P] int64, at least 0: only margins between products of differing classes count. None: all do.

    Returns:
        [G]; 0 for a group without a margin that counts.
    """
    difference = student - teacher
    total, count = _margins(difference, group, num_groups)
    if classes is not None:
        cells, cell = torch.unique(torch.stack([group, classes]), dim=1, return_inverse=True)
        within, within_count = _margins(difference, cell, cells.shape[1])
        total = total.index_add(0, cells[0], -within)
        count = count.index_add(0, cells[0], -within_count)
    return torch.where(count > 0, total / count.clamp(min=1.0), 0.0)


def _margins(difference: torch.Tensor, group: torch.Tensor, num_groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the squared margins of each group, `n * sum (d_i - mean d)^2`, and how many there are: two [G]."""
    count, mean = _group_mean(difference, group, num_groups)
    centred = difference - mean[group]
    squares = centred.new_zeros(num_groups).index_add(0, group, centred.square())
    return squares * count, count * (count - 1) / 2


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


def class_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """`T^2 KL(softmax(teacher / T) || softmax(student / T))`, classes of a pair against the teacher's.

    Hinton, Vinyals and Dean (arXiv 1503.02531), and the class term of MKD (arXiv 2411.13045); T^2 keeps the size of the
    gradient independent of T.

    Args:
        student, teacher: [n, K] class logits, or log probabilities (such as `ordinal_log_probabilities` of one score).
        temperature: T; above 1 the teacher's small probabilities count for more.

    Returns:
        [n].
    """
    log_p = F.log_softmax(teacher / temperature, dim=-1)
    log_q = F.log_softmax(student / temperature, dim=-1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def ordinal_log_probabilities(score: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Log probabilities of K ordered classes from one score: the cumulative link `P(class > k) = sigmoid(s - threshold_k)`
    (McCullagh, 1980), by which a student of one output has classes.

    The difference of two sigmoids is taken as `sigmoid(a) sigmoid(-b) (1 - e^(b-a))`, which keeps its digits in the tails.

    Args:
        score: [n].
        thresholds: [K - 1], strictly rising.

    Returns:
        [n, K].
    """
    above = score[:, None] - thresholds
    first, last = F.logsigmoid(-above[:, :1]), F.logsigmoid(above[:, -1:])
    gaps = torch.log1p(-torch.exp(thresholds[:-1] - thresholds[1:]))
    return torch.cat([first, F.logsigmoid(above[:, :-1]) + F.logsigmoid(-above[:, 1:]) + gaps, last], dim=1)


def soft_bce(logit: torch.Tensor, soft_target: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy against a soft target, the Walmart teacher's form (arXiv 2505.07105).

    Args:
        logit: [n].
        soft_target: [n], in [0, 1].

    Returns:
        [n].
    """
    return F.binary_cross_entropy_with_logits(logit, soft_target, reduction="none")


def info_nce(
    queries: torch.Tensor,
    products: torch.Tensor,
    group: torch.Tensor,
    positive: torch.Tensor,
    identity: torch.Tensor,
    temperature: float,
    same_query: torch.Tensor | None = None,
) -> torch.Tensor:
    """Contrast of a query's positive products with every other product of the batch (InfoNCE, arXiv 1807.03748; with
    in-batch negatives as in arXiv 2004.04906).

    Of query g with positives P_g: the mean over p in P_g of
    `-log( e^(q.p/T) / (e^(q.p/T) + sum over n not in P_g of e^(q.n/T)) )`. A product that is the same as one of P_g is no
    negative, whichever query it came with; nor is a positive of a query that is the same.

    Args:
        queries: [G, d] unit vectors.
        products: [P, d] unit vectors.
        group: [P] int64 index of the query a product came with.
        positive: [P] bool.
        identity: [P] int64, equal for equal products.
        temperature: T.
        same_query: [G] int64, equal for equal queries; without it all are different.

    Returns:
        [G]; 0 for a query without a positive product, or without a negative one.
    """
    similarity = queries @ products.T / temperature
    own = (group == torch.arange(len(queries), device=group.device)[:, None]) & positive
    query = torch.arange(len(queries), device=group.device) if same_query is None else same_query
    of_query = (query[group[positive]] == query[:, None]).to(queries.dtype)
    same = (identity[positive][:, None] == identity).to(queries.dtype)
    no_negative = (of_query @ same) > 0
    # Not -inf: the gradient of a logsumexp over nothing is no number.
    negatives = torch.logsumexp(similarity.masked_fill(no_negative, -1e9), dim=1)
    by_pair = F.softplus(negatives[:, None] - similarity)
    return torch.where(own, by_pair, 0.0).sum(dim=1) / own.sum(dim=1).clamp(min=1)
