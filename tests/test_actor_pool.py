"""What actors of a pool tell: counts, and what the user must mend."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator

import pytest
from ray import cloudpickle

from relevance_ray.cluster.actor_pool import ItemActor, run_pool
from relevance_ray.cluster.workers import Workers
from relevance_ray.errors import UserError


@pytest.fixture(autouse=True)
def by_value() -> Iterator[None]:
    """Actors cannot import this module."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def square() -> Callable[[int], int]:
    return lambda value: value * value


def full_disk(path: str) -> Callable[[int], int]:
    def work(value: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    return work


def never_opens() -> Callable[[int], int]:
    raise UserError("there is no model at here; give one that is there")


def bug() -> Callable[[int], int]:
    return lambda value: 1 // 0


def run(open_work: Callable[..., Callable[[int], int]], *arguments: str) -> list[int]:
    items = [{"value": value} for value in range(6)]
    rows = run_pool(items, ItemActor, (open_work, *arguments), Workers(2), num_blocks=3)
    return sorted(row["done"] for row in rows)


def test_every_item_is_done_once(ray_cluster: None) -> None:
    assert run(square) == [0, 1, 4, 9, 16, 25]


def test_a_full_disk_and_a_missing_model_come_out_of_an_actor_as_one_sentence(ray_cluster: None) -> None:
    with pytest.raises(UserError, match=r"^/data/x: No space left on device; make room, and the same command goes on$"):
        run(full_disk, "/data/x")
    with pytest.raises(UserError, match=r"^there is no model at here; give one that is there$"):
        run(never_opens)


def test_our_own_fault_stays_loud(ray_cluster: None) -> None:
    with pytest.raises(Exception, match="division") as raised:
        run(bug)
    assert not isinstance(raised.value, UserError)
