"""A pool of Ray Data actors that do one item after another.

Ray Data strips an exception of an actor of its kind, so what the user must mend is told as a row and raised here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from relevance_ray.cluster.workers import Workers
from relevance_ray.errors import UserError, what_to_mend


class ItemActor:
    """The actor that opens what its work needs with its first item, and then does one item after another.

    Args:
        open_work: called once with the arguments; what it returns takes an item's values by name and returns a count.
    """

    def __init__(self, open_work: Callable[..., Callable[..., int]], *arguments: Any) -> None:
        self._open_work, self._arguments = open_work, arguments
        self._work: Callable[..., int] | None = None

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        rows = [self._do(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
        return {key: [row[key] for row in rows] for key in rows[0]}

    def _do(self, item: dict[str, Any]) -> dict[str, Any]:
        try:
            self._work = self._work or self._open_work(*self._arguments)
            return {"done": self._work(**item), "user_error": ""}
        except Exception as error:
            if not (said := what_to_mend(error)):
                raise
            return {"done": 0, "user_error": said}


def run_pool(
    items: Sequence[Mapping[str, Any]],
    actor: type,
    arguments: tuple[Any, ...],
    workers: Workers,
    *,
    num_blocks: int,
) -> Iterator[dict[str, Any]]:
    """The rows that a pool of actors makes of the items, in any order.

    Args:
        items: rows of the same keys.
        actor: called with batches of one item; its rows have a `user_error`, which is empty or ends the run.
        arguments: of its constructor.
        workers: the pool; it begins with the first of them that there is room for.
        num_blocks: into how many tasks the items are put, which Ray's head keeps account of.

    Raises:
        UserError: what an actor said.
    """
    import ray

    results = ray.data.from_items([dict(item) for item in items], override_num_blocks=num_blocks).map_batches(
        actor,
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers.count, max_tasks_in_flight_per_actor=2),
        **workers.remote_options(),
    )
    for row in results.iter_rows():
        if row["user_error"]:
            raise UserError(row["user_error"])
        yield row
