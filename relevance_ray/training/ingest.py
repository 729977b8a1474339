"""From labeled groups to token files: each file of labels is read and tokenised once, whatever the workers and epochs.

Where training begins again it finds the files that are there. `ray_ingest.py` spreads the files over a cluster. A worker
maps every token file, and Linux lets a process map some 65,000, so many files of labels share a token file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from transformers import AutoTokenizer

from relevance_ray.errors import UserError
from relevance_ray.model_folder import ModelInfo, read_model_info
from relevance_ray.storage import absolute, file_sizes, fingerprint, join, localize
from relevance_ray.student.collate import encode_groups, join_groups, read_training_table
from relevance_ray.student.reading import Reader
from relevance_ray.student.token_files import groups_bytes
from relevance_ray.training.options import StudentOptions
from relevance_ray.training.pair_task import reader_of
from relevance_ray.whole_files import write_bytes

MAX_FILES = 4096
"""Of tokens; more files of groups than that share them."""


@dataclass(frozen=True)
class IngestSpec:
    """How groups become tokens and targets; picklable, opened anew in each process.

    Attributes:
        start: folder of the model that training starts from.
        options: of the student.
        label_smoothing: of human grades, where classes are distilled.
    """

    start: str
    options: StudentOptions
    label_smoothing: float = 0.0

    def open(self) -> Callable[[Sequence[str], str], int]:
        """A function from files of labeled (or judged) groups and the file to write to the number of pairs in it."""
        start = localize(self.start)
        info: ModelInfo = read_model_info(start)
        reader: Reader = reader_of(info, AutoTokenizer.from_pretrained(start))

        def work(sources: Sequence[str], target: str) -> int:
            found = [
                encode_groups(
                    read_training_table(source),
                    reader,
                    info.scale,
                    self.options.max_group_products,
                    with_classes=self.options.kl_weight > 0,
                    label_smoothing=self.label_smoothing,
                )
                for source in sources
            ]
            parts = [part for part in found if part is not None]
            write_bytes(target, groups_bytes(join_groups(parts)) if parts else b"")
            return sum(len(part.target) for part in parts)

        return work


class Item(TypedDict):
    """One token file to make, of some files of groups."""

    sources: list[str]
    target: str


RunItems = Callable[[IngestSpec, Sequence[Item]], Iterator[int]]
"""Does items, and gives the pairs of each, in any order."""


def in_turn(spec: IngestSpec, items: Sequence[Item]) -> Iterator[int]:
    """One after another, in this process."""
    work = spec.open()
    for item in items:
        yield work(item["sources"], item["target"])


def ingest(
    spec: IngestSpec,
    sources: Sequence[str],
    folder: str | Path,
    run: RunItems = in_turn,
    on_file: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The token files of some files of groups, in their order; those without any usable group are left out.

    Args:
        sources: Parquet files of labeled groups, or of judged ones, of which split train is used.
        folder: keeps the token files, where all workers see them, local or s3://; of this spec and no other.
        run: does those that are missing.
        on_file: told how many files are done, and of how many.

    Raises:
        UserError: no group of two usable pairs in any of them.
    """
    each = max(1, -(-len(sources) // MAX_FILES))
    shares = [list(sources[start : start + each]) for start in range(0, len(sources), each)]
    folder = absolute(folder)
    names = [f"{Path(share[0]).stem}-{fingerprint(share)[:8]}.arrow" for share in shares]
    there = _sizes(folder)
    missing: list[Item] = [
        {"sources": share, "target": join(folder, name)}
        for share, name in zip(shares, names, strict=True)
        if name not in there
    ]
    for count, _ in enumerate(run(spec, missing) if missing else (), start=1):
        if on_file is not None:
            on_file(count, len(missing))
    there = _sizes(folder)
    found = [join(folder, name) for name in names if there[name]]
    if not found:
        raise UserError("there is no group with two labeled products to train on; look at the errors of the label step")
    return found


def _sizes(folder: str) -> dict[str, int]:
    """Name -> bytes of the files in a folder that may not be there yet."""
    try:
        return file_sizes(folder)
    except FileNotFoundError:
        return {}
