"""What the live line shows of a training, over a resume and from part to part."""

from __future__ import annotations

import io
from typing import Any

from relevance_ray.chain.trainings import show_training
from relevance_ray.progress import Progress


def shown(progress: Progress, **record: Any) -> None:
    show_training(progress, lambda _: None, {"steps": 100, **record})


def test_steps_of_before_a_resume_took_none_of_this_runs_time() -> None:
    with Progress("train-student", stream=io.StringIO()) as progress:
        shown(progress, step=51, loss=0.5)
        assert (progress.done, progress.already_done) == (51, 51)
        shown(progress, step=52, loss=0.4)
        assert (progress.done, progress.already_done) == (52, 51)


def test_a_part_shows_nothing_of_the_part_before() -> None:
    with Progress("scaling", stream=io.StringIO()) as progress:
        shown(progress, step=1, part="seed 0", loss=0.5)
        shown(progress, step=1, part="seed 0", dev={"ndcg": 0.8})
        assert progress.extra == {"part": "seed 0", "loss": 0.5, "dev_ndcg": 0.8}
        shown(progress, step=1, part="seed 1", loss=0.7)
        assert progress.extra == {"part": "seed 1", "loss": 0.7}
