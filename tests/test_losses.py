"""The losses against double loops in float64, values and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from relevance_ray import losses

GROUP = torch.tensor([0, 1, 0, 2, 1, 0, 1, 0])  # four, three and one product, interleaved


CLASSES = torch.tensor([0, 2, 1, 0, 2, 1, 2, 0])  # the second group is all of one class


def naive_group_margin(
    student: torch.Tensor,
    teacher: torch.Tensor,
    group: torch.Tensor,
    num_groups: int,
    classes: torch.Tensor | None = None,
) -> torch.Tensor:
    out = []
    for index in range(num_groups):
        rows = (group == index).nonzero()[:, 0].tolist()
        margins = [
            ((student[i] - student[j]) - (teacher[i] - teacher[j])) ** 2
            for i, j in itertools.combinations(rows, 2)
            if classes is None or classes[i] != classes[j]
        ]
        out.append(torch.stack(margins).mean() if margins else student.sum() * 0.0)
    return torch.stack(out)


def scores(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, len(GROUP), dtype=torch.float64, generator=generator)
    return student.requires_grad_(), teacher * 3


@pytest.mark.parametrize("classes", [None, CLASSES], ids=["all", "differing"])
@pytest.mark.parametrize("seed", range(3))
def test_group_margin_is_the_mean_over_its_margins_with_its_gradient(seed: int, classes: torch.Tensor | None) -> None:
    student, teacher = scores(seed)
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    ours = losses.group_margin_mse(student, teacher, GROUP, 3, classes)
    naive = naive_group_margin(student, teacher, GROUP, 3, classes)
    torch.testing.assert_close(ours, naive)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), student)
    (expected,) = torch.autograd.grad((naive * weights).sum(), student)
    torch.testing.assert_close(gradient, expected)


def test_group_margin_of_a_worked_example() -> None:
    student, teacher = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0.0, 0.0, 4.0])
    # d = 1, 3, -2: margins of d are -2, 3, 5, their squares 4 + 9 + 25 = 38, over three pairs.
    found = losses.group_margin_mse(student, teacher, torch.zeros(3, dtype=torch.int64), 1)
    torch.testing.assert_close(found, torch.tensor([38.0 / 3.0]))


def test_a_single_product_has_no_margin_and_an_empty_group_no_loss() -> None:
    found = losses.group_margin_mse(torch.tensor([5.0]), torch.tensor([1.0]), torch.tensor([0]), 2)
    assert found.tolist() == [0.0, 0.0]


def test_group_margin_keeps_its_digits_when_levels_differ_in_float32() -> None:
    student, teacher = scores(0)
    level = 4096.0
    exact = losses.group_margin_mse(student.detach() + level, teacher, GROUP, 3)
    single = losses.group_margin_mse((student.detach() + level).float(), teacher.float(), GROUP, 3)
    torch.testing.assert_close(single.double(), exact, rtol=2e-3, atol=0)


def test_group_margin_does_not_see_the_level_and_the_anchor_sees_nothing_else() -> None:
    student, teacher = scores(1)
    shift = torch.tensor([10.0, -4.0, 2.0], dtype=torch.float64)[GROUP]
    torch.testing.assert_close(
        losses.group_margin_mse(teacher + shift, teacher, GROUP, 3), torch.zeros(3, dtype=torch.float64)
    )
    torch.testing.assert_close(
        losses.level_anchor(teacher + shift, teacher, GROUP, 3), torch.tensor([100.0, 16.0, 4.0], dtype=torch.float64)
    )
    (gradient,) = torch.autograd.grad(losses.level_anchor(student, teacher, GROUP, 3).sum(), student)
    for index in range(3):
        member = index == GROUP
        mean = (student - teacher)[member].mean()
        torch.testing.assert_close(gradient[member], (2 * mean / member.sum()).expand(int(member.sum())))


def test_soft_cross_entropy_against_the_sum_and_torch() -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    target = torch.softmax(torch.randn(4, 3, dtype=torch.float64), dim=1)
    naive = -sum(target[:, k] * torch.log(logits.exp()[:, k] / logits.exp().sum(dim=1)) for k in range(3))
    torch.testing.assert_close(losses.soft_cross_entropy(logits, target), naive)
    (gradient,) = torch.autograd.grad(losses.soft_cross_entropy(logits, target).sum(), logits)
    torch.testing.assert_close(gradient, torch.softmax(logits, dim=1) - target)
    hard = F.one_hot(torch.tensor([2, 0, 1, 1]), 3).double()
    expected = F.cross_entropy(logits, torch.tensor([2, 0, 1, 1]), reduction="none")
    torch.testing.assert_close(losses.soft_cross_entropy(logits, hard), expected)


def test_soft_bce_is_stable_for_large_logits_and_least_at_the_log_odds() -> None:
    logit = torch.tensor([0.0, 60.0, -60.0], dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0.25, 1.0, 1.0], dtype=torch.float64)
    found = losses.soft_bce(logit, target)
    torch.testing.assert_close(found, torch.tensor([0.6931471805599453, 0.0, 60.0], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(found.sum(), logit)
    torch.testing.assert_close(gradient, torch.sigmoid(logit) - target)


def test_ordinal_probabilities_against_differences_of_sigmoids_and_in_the_tails() -> None:
    score = torch.randn(6, dtype=torch.float64, requires_grad=True)
    thresholds = torch.tensor([-1.5, 0.2, 2.0], dtype=torch.float64, requires_grad=True)
    above = torch.sigmoid(score[:, None] - thresholds)
    ends = torch.ones(6, 1, dtype=torch.float64)
    naive = torch.cat([ends, above], dim=1) - torch.cat([above, ends * 0], dim=1)
    found = losses.ordinal_log_probabilities(score, thresholds)
    torch.testing.assert_close(found.exp(), naive)
    for ours, theirs in zip(
        torch.autograd.grad(found[:, 1:3].sum(), (score, thresholds)),
        torch.autograd.grad(naive.log()[:, 1:3].sum(), (score, thresholds)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    far = losses.ordinal_log_probabilities(torch.tensor([80.0]), thresholds.detach().float())
    # P(class 2) = (1 - sigmoid(80 - 2)) - (1 - sigmoid(80 - .2)), which float32 sigmoids would give as 0.
    torch.testing.assert_close(
        far[0, 2].double(), -(80 - thresholds[2]) + torch.log1p(-torch.exp(thresholds[1] - thresholds[2]))
    )
    two = losses.ordinal_log_probabilities(score, torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(two.exp(), torch.stack([torch.sigmoid(-score), torch.sigmoid(score)], dim=1))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_class_kl_against_the_sum_and_its_gradient(temperature: float) -> None:
    student = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 4, dtype=torch.float64) * 3
    p, q = ((x / temperature).exp() / (x / temperature).exp().sum(dim=1, keepdim=True) for x in (teacher, student))
    naive = torch.stack([sum(p[i, k] * torch.log(p[i, k] / q[i, k]) for k in range(4)) for i in range(5)])
    found = losses.class_kl(student, teacher, temperature)
    torch.testing.assert_close(found, temperature**2 * naive)
    (ours,) = torch.autograd.grad(found.sum(), student, retain_graph=True)
    torch.testing.assert_close(ours, temperature * (q - p).detach())
    torch.testing.assert_close(losses.class_kl(teacher, teacher), torch.zeros(5, dtype=torch.float64))


def test_info_nce_against_the_double_loop_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(3, 5, dtype=torch.float64, generator=generator), dim=1).requires_grad_()
    products = F.normalize(torch.randn(8, 5, dtype=torch.float64, generator=generator), dim=1).requires_grad_()
    positive = torch.tensor([True, False, True, False, True, False, False, False])  # the third query has none
    identity = torch.tensor([10, 11, 12, 10, 14, 15, 16, 17])  # product 3 is product 0, a positive of the first query
    temperature = 0.1
    naive = []
    for g in range(3):
        mine = [p for p in range(8) if GROUP[p] == g and positive[p]]
        names = {int(identity[p]) for p in mine}
        others = [(queries[g] @ products[n] / temperature).exp() for n in range(8) if int(identity[n]) not in names]
        terms = []
        for p in mine:
            hit = (queries[g] @ products[p] / temperature).exp()
            terms.append(-torch.log(hit / (hit + sum(others))))
        naive.append(torch.stack(terms).mean() if terms else queries.sum() * 0)
    found = losses.info_nce(queries, products, GROUP, positive, identity, temperature)
    torch.testing.assert_close(found, torch.stack(naive))
    assert found[2] == 0
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), (queries, products)),
        torch.autograd.grad(torch.stack(naive).sum(), (queries, products)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_info_nce_takes_no_positive_of_an_equal_query_for_a_negative() -> None:
    generator = torch.Generator().manual_seed(1)
    vector = F.normalize(torch.randn(2, 5, dtype=torch.float64, generator=generator), dim=1)
    queries = vector[[0, 1, 0]]  # the first and the last are parts of one query's products
    products = F.normalize(torch.randn(6, 5, dtype=torch.float64, generator=generator), dim=1)
    group = torch.tensor([0, 0, 1, 1, 2, 2])
    positive = torch.tensor([True, False, True, False, True, False])
    names = torch.arange(6)
    found = losses.info_nce(queries, products, group, positive, names, 0.1, torch.tensor([7, 8, 7]))
    kept = [0, 1, 2, 3, 5]  # without the positive of the other part
    alone = losses.info_nce(queries, products[kept], group[kept], positive[kept], names[kept], 0.1)
    torch.testing.assert_close(found[0], alone[0])
    strangers = losses.info_nce(queries, products, group, positive, names, 0.1)
    torch.testing.assert_close(found[1], strangers[1])
    assert strangers[0] > found[0]


def test_info_nce_without_any_negative_is_nothing() -> None:
    vectors = F.normalize(torch.randn(1, 4), dim=1).requires_grad_()
    one = torch.tensor([0])
    found = losses.info_nce(vectors, vectors.detach(), one, torch.tensor([True]), one, 0.05)
    (gradient,) = torch.autograd.grad(found.sum(), vectors)
    assert found.tolist() == [0.0]
    assert gradient.tolist() == [[0.0] * 4]
