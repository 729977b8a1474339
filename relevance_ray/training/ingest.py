"""From labeled groups to token files: each file of labels is read and tokenised once, whatever the workers and epochs.

Where training begins again it finds the files that are there. `ray_ingest.py` spreads the files over a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from relevance_ray.errors import UserError
from relevance_ray.model_folder import ModelInfo, read_model_info
from relevance_ray.storage import fingerprint
from relevance_ray.student.collate import encode_groups, read_training_table
from relevance_ray.student.reading import Reader
from relevance_ray.student.token_files import groups_bytes
from relevance_ray.training.options import StudentOptions
from relevance_ray.training.pair_task import reader_of
from relevance_ray.whole_files import write_bytes


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

    def open(self) -> Callable[[str, str], int]:
        """A function from a file of labeled (or judged) groups and the file to write to the number of pairs in it."""
        info: ModelInfo = read_model_info(self.start)
        reader: Reader = reader_of(info, AutoTokenizer.from_pretrained(self.start))

        def work(source: str, target: str) -> int:
            groups = encode_groups(
                read_training_table(source),
                reader,
                info.scale,
                self.options.max_group_products,
                self.options.fit.seed,
                with_classes=self.options.kl_weight > 0,
                label_smoothing=self.label_smoothing,
            )
            write_bytes(target, b"" if groups is None else groups_bytes(groups))
            return 0 if groups is None else len(groups.target)

        return work


Item = dict[str, str]
RunItems = Callable[[IngestSpec, Sequence[Item]], Iterator[int]]
"""Does items of `source` and `target`, and gives the pairs of each, in any order."""


def in_turn(spec: IngestSpec, items: Sequence[Item]) -> Iterator[int]:
    """One after another, in this process."""
    work = spec.open()
    for item in items:
        yield work(item["source"], item["target"])


def ingest(
    spec: IngestSpec,
    sources: Sequence[str],
    folder: Path,
    run: RunItems = in_turn,
    on_file: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The token files of some files of groups, in their order; those without any usable group are left out.

    Args:
        sources: Parquet files of labeled groups, or of judged ones, of which split train is used.
        folder: keeps the token files, on a file system that all workers see.
        run: does those that are missing.
        on_file: told how many files are done, and of how many.

    Raises:
        UserError: no group of two usable pairs in any of them.
    """
    items = [
        {"source": source, "target": str(folder / f"{Path(source).stem}-{fingerprint(source)[:8]}.arrow")}
        for source in sources
    ]
    missing = [item for item in items if not Path(item["target"]).exists()]
    for count, _ in enumerate(run(spec, missing) if missing else (), start=1):
        if on_file is not None:
            on_file(count, len(missing))
    found = [item["target"] for item in items if Path(item["target"]).stat().st_size]
    if not found:
        raise UserError("there is no group with two labeled products to train on; look at the errors of the label step")
    return found
