"""What a run writes down about itself, and what can be told of it from outside, while it runs or after it died.

`run.json` at the root holds the configuration, the folder it was started in (paths in a configuration may be relative),
and the folder of each step that was begun. Everything else is counted from commits, so it is true whatever was killed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from relevance_ray.chain.folders import ALL_STEPS
from relevance_ray.config import Config, build_config
from relevance_ray.errors import UserError
from relevance_ray.labeling.attempts import shards_set_aside
from relevance_ray.labeling.pipeline import shards_to_label
from relevance_ray.lease import lease_holder
from relevance_ray.object_log import newest_lines
from relevance_ray.storage import CommitLog, check_reachable, exists, is_remote, join, read_json, write_json

_FILE = "run.json"


def begin_run(root: str, config: Config) -> None:
    """Write down what is run. Steps that this run does not come to keep the folders of an earlier one."""
    place = join(root, _FILE)
    folders = read_json(place)["folders"] if exists(place) else {}
    write_json(place, {"config": dataclasses.asdict(config), "directory": os.getcwd(), "folders": folders})


def begin_step(root: str, step: str, folder: str) -> None:
    """Write down that a step was begun."""
    state = read_json(join(root, _FILE))
    state["folders"][step] = folder
    write_json(join(root, _FILE), state)


def config_of(root: str) -> tuple[Config, str]:
    """The configuration that was last run at a root, and the folder it was started in, where its paths are meant."""
    state = _read(root)
    state["config"]["storage"]["root"] = root if is_remote(root) else str(Path(root).absolute())
    return build_config(state["config"], where=join(root, _FILE)), state["directory"]


def describe(root: str) -> Iterator[str]:
    """Lines that say how far each step is, what failed, and whether a driver is at work."""
    state = _read(root)
    for step in ALL_STEPS:
        if step in state["folders"]:
            yield f"{step:14} {_step_line(step, state['folders'])}"
    holder = lease_holder(root)
    if holder is None:
        yield "no driver is at work"
    else:
        yield f"driver: process {holder.get('pid', '?')} on {holder.get('host', '?')}"
        if (line := _last_line(root)) is not None:
            yield line


def _read(root: str) -> dict[str, Any]:
    check_reachable(root)
    if not exists(join(root, _FILE)):
        raise UserError(f"{root} holds no {_FILE}, so nothing was run there; give the storage.root of a run")
    return dict(read_json(join(root, _FILE)))


def _step_line(step: str, folders: dict[str, str]) -> str:
    folder = folders[step]
    marker = join(folder, "step.json")
    done = read_json(marker) if exists(marker) else None
    took = f"done in {done['seconds']:,.0f} s, {done['finished']}" if done else "not finished"
    if step not in ("generate", "label", "compact"):
        return took
    records, given_up, earlier = CommitLog(folder).committed(), {}, 0
    if step == "label":
        asked = _labels_asked(folders)
        earlier = sum(name not in asked for name in records)
        given_up = {
            name: why for name, why in shards_set_aside(folder).items() if name in asked and name not in records
        }
        records = {name: record for name, record in records.items() if name in asked}
    pairs, errors = (sum(record.get(key, 0) for record in records.values()) for key in ("pairs", "errors"))
    parts = [took, f"{len(records):,} {'files' if step == 'compact' else 'shards'}", f"{pairs:,} pairs"]
    if errors:
        parts.append(f"{errors:,} failed rows")
    if given_up:
        named = "; ".join(f"{shard}: {why}" for shard, why in list(given_up.items())[:3])
        parts.append(f"{len(given_up):,} shards set aside ({named}{'; ...' if len(given_up) > 3 else ''})")
    if earlier:
        parts.append(f"{earlier:,} shards of earlier runs beside them")
    return ", ".join(parts)


def _labels_asked(folders: dict[str, str]) -> set[str]:
    """Label names of the shards that the last run generated."""
    generated = CommitLog(folders["generate"])
    return {shard.label_name for shard in shards_to_label(generated, list(generated.committed()))}


def _last_line(root: str) -> str | None:
    """The newest line of the run's log."""
    lines = [line for line in _end_of_log(root).split(b"\n") if line.endswith(b"}")]
    if not lines:
        return None
    record = json.loads(lines[-1])
    of = f" of {record['total']:,}" if record["total"] else ""
    parts = [f"{record['step']}: {record['done']:,}{of} {record['unit']}", f"{record['per_second']:,.1f}/s"]
    if record["failures"]:
        parts.append(f"{record['failures']:,} failed")
    if record["seconds_left"] is not None:
        parts.append(f"{record['seconds_left'] / 60:,.1f} minutes left")
    return f"{', '.join(parts)} ({time.time() - record['time']:,.0f} s ago)"


def _end_of_log(root: str) -> bytes:
    if is_remote(root):
        return newest_lines(root)
    log = Path(root.removeprefix("file://")) / "log.jsonl"
    if not log.is_file():
        return b""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        return file.read()
