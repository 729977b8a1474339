"""The losses against double loops in float64, values and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from relevance_ray import losses

GROUP = torch.tensor([0, 1, 0, 2, 1, 0, 1, 0])  # four, three and one product, interleaved


def naive_group_margin(
    student: torch.Tensor, teacher: torch.Tensor, group: torch.Tensor, num_groups: int
) -> torch.Tensor:
    out = []
    for index in range(num_groups):
        rows = (group == index).nonzero()[:, 0].tolist()
        margins = [
            ((student[i] - student[j]) - (teacher[i] - teacher[j])) ** 2 for i, j in itertools.combinations(rows, 2)
        ]
        out.append(torch.stack(margins).mean() if margins else student.sum() * 0.0)
    return torch.stack(out)


def scores(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, len(GROUP), dtype=torch.float64, generator=generator)
    return student.requires_grad_(), teacher * 3


@pytest.mark.parametrize("seed", range(3))
def test_group_margin_is_the_mean_over_all_margins_with_its_gradient(seed: int) -> None:
    student, teacher = scores(seed)
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    ours = losses.group_margin_mse(student, teacher, GROUP, 3)
    naive = naive_group_margin(student, teacher, GROUP, 3)
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
