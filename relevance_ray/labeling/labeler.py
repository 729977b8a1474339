"""One shard after another through an engine: what an actor of the labeling pool does, and knows nothing of Ray for it."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from relevance_ray.engines.base import Engine
from relevance_ray.errors import UserError
from relevance_ray.file_systems import StorageError
from relevance_ray.labeling.attempts import Attempts
from relevance_ray.labeling.earlier import EarlierLabels
from relevance_ray.labeling.shard import Known, count_errors, known_rows, label_groups
from relevance_ray.progress import memory_used
from relevance_ray.storage import CommitLog, read_table

EngineFactory = Callable[[], Engine]

_COUNTS = ("pairs", "errors", "asked", "reused", "tokens")
"""What the record of a labeled shard counts."""


class ShardLabeler:
    """The actor: an engine that labels and commits one shard at a time.

    An engine that fails is opened anew and the shard tried again, `MAX_ATTEMPTS` times in all and over all actors; then
    the shard is set aside. So it is where the shard cannot be read or its labels not be written, for which the engine is
    kept. A store that does not even take the marks of tries ends the job.
    """

    def __init__(self, folder: str, fingerprint: str, open_engine: EngineFactory, run: str, index: str = "") -> None:
        self._log, self._attempts = CommitLog(folder), Attempts(folder, run)
        self._folder, self._index = folder, index
        self._earlier: EarlierLabels | None = None
        self._fingerprint, self._open_engine = fingerprint, open_engine
        self._engine: Engine | None = None  # like the index, opened by the first shard, where its errors can be told

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """What became of each shard. What ends the job is told, not raised: Ray Data would strip an error of its kind."""
        results: list[dict[str, Any]] = []
        for path, name, previous in zip(batch["path"], batch["label_name"], batch["previous"], strict=True):
            result = {"label_name": name, "labeled": False, **dict.fromkeys(_COUNTS, 0), "user_error": ""}
            try:
                if (record := self._label(str(path), str(name), str(previous))) is not None:
                    result |= {"labeled": True, **{key: record.get(key, 0) for key in _COUNTS}}
            except UserError as error:
                result["user_error"] = str(error)
            except OSError as error:  # a disk that takes no more, not even the mark of a try
                result["user_error"] = (
                    f"{error.filename or self._folder}: {error.strerror or error}; the same command goes on"
                )
            result["memory"] = memory_used()
            results.append(result)
        return {key: [result[key] for result in results] for key in results[0]}

    def _label(self, path: str, name: str, previous: str) -> dict[str, int] | None:
        """The counts of a shard's labels; None where it was set aside."""
        if not previous and (record := self._log.record(name)) is not None:
            return record  # committed by a try whose process died before it could say so
        while (attempt := self._attempts.begin(name)) is not None:
            try:
                labeled, counts = self._label_once(path, previous)
                self._commit(name, labeled, counts, previous)
            except StorageError as error:
                self._attempts.fail(name, attempt, str(error))
                continue
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001 (whatever an engine raises is written down, and bounded)
                self._attempts.fail(name, attempt, f"{type(error).__name__}: {error}")
                self._drop_engine(error)
                continue
            self._attempts.end(name, attempt)
            return counts
        if not previous and (record := self._log.record(name)) is not None:
            return record  # another that was taken for dead committed it meanwhile
        self._attempts.set_aside(name)
        return None

    def _label_once(self, path: str, previous: str) -> tuple[pa.Table, dict[str, int]]:
        """The labels of a shard, and its counts: pairs, failed ones, those the engine was asked for and the tokens of that,
        those taken over from earlier shards."""
        if previous:
            groups = read_table(previous)
            known: Known | None = known_rows(groups)
        else:
            groups = read_table(path)
            known = self._known(groups)
        before = self._engine.num_tokens if self._engine is not None else 0
        labeled = label_groups(groups, self._opened, known)
        tokens = self._engine.num_tokens - before if self._engine is not None else 0
        num_pairs = len(labeled.column("products").combine_chunks().flatten())
        num_known = 0 if known is None else len(known.rows)
        return labeled, {
            "pairs": num_pairs,
            "errors": count_errors(labeled),
            "asked": num_pairs - num_known,
            "reused": 0 if previous else num_known,
            "tokens": tokens,
        }

    def _known(self, groups: pa.Table) -> Known | None:
        if not self._index:
            return None
        self._earlier = self._earlier or EarlierLabels(self._folder, self._index)
        return self._earlier.known(groups)

    def _opened(self) -> Engine:
        self._engine = self._engine or self._open_engine()
        return self._engine

    def _commit(self, name: str, labeled: pa.Table, counts: dict[str, int], previous: str) -> None:
        if previous:
            old_file = previous.rsplit("/", 1)[-1]
            before = self._log.record(name) or {}
            counts = counts | {key: counts[key] + before.get(key, 0) for key in ("asked", "reused", "tokens")}
            self._log.replace(name, labeled, self._fingerprint, counts, instead_of=old_file)
        else:
            self._log.commit(name, labeled, self._fingerprint, counts)

    def _drop_engine(self, error: Exception) -> None:
        if "CUDA error" in str(error):
            os._exit(1)  # no later call of this process can use the GPU; Ray starts another
        engine, self._engine = self._engine, None  # what a failed engine holds may be what broke it
        close = getattr(engine, "close", None)
        if close is None:
            return
        try:
            close()  # what it holds in processes of its own would be missing for the new one
        except Exception:  # noqa: BLE001 (of whatever kind: Ray ends those processes with this one, and starts another)
            traceback.print_exc()
            os._exit(1)
