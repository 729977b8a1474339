"""Train a student under torchrun, on labels that are there: no Ray, no configuration file, the same steps.

    torchrun --nproc-per-node 8 -m relevance_ray.training.torchrun --labels label-1a2b \\
        --judged prepare-3c4d/judged_groups.parquet --scale prepare-3c4d/scale.json --out student --set fit.epochs=2

Killed and started again it goes on from its last checkpoint; with other options or labels it begins anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import TypeAdapter, ValidationError

from relevance_ray import distributed
from relevance_ray.errors import UserError, what_to_mend
from relevance_ray.options import semantic
from relevance_ray.quiet import quiet_libraries
from relevance_ray.schema import LabelScale
from relevance_ray.storage import CommitLog, content_id, fingerprint, remove_tree
from relevance_ray.training.options import FitOptions, StudentOptions
from relevance_ray.training.runners import local_runner
from relevance_ray.training.student import StudentRequest, finish_student, student_job


def student_options(settings: list[str]) -> StudentOptions:
    """Options of a student from `key=value`; `fit.key=value` is one of its loop."""
    values: dict[str, dict[str, Any]] = {"": {}, "fit": {}}
    for setting in settings:
        key, separator, value = setting.partition("=")
        section, _, name = key.rpartition(".")
        known = {field.name for field in dataclasses.fields(FitOptions if section == "fit" else StudentOptions)}
        if not separator or section not in values or name not in known or key == "fit":
            raise UserError(f"--set {setting}: give key=value, a key of `student` as relevance-ray config prints them")
        try:
            values[section][name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"--set {setting}: the value is not YAML ({error})".replace("\n", " ")) from error
    try:
        return TypeAdapter(StudentOptions).validate_python({**values[""], "fit": values["fit"]})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise UserError(f"--set {key}: {first['msg']}") from error


def train(arguments: argparse.Namespace) -> None:
    # Of a label step's folder what is committed counts; beside it may lie what a kill left.
    files = (
        CommitLog(arguments.labels).files() if os.path.isdir(arguments.labels) else sorted(glob.glob(arguments.labels))
    )
    if not files:
        raise UserError(f"--labels {arguments.labels} holds no labels; give the folder of a label step, or a pattern")
    for option, path in (("--judged", arguments.judged), ("--scale", arguments.scale)):
        if not os.path.isfile(path):
            raise UserError(f"{option} {path} does not exist; name the file of that name in a prepare step's folder")
    scale = LabelScale.from_dict(json.loads(Path(arguments.scale).read_text(encoding="utf-8")))
    out = Path(arguments.out).absolute()
    options = student_options(arguments.set)
    given = [content_id(arguments.judged), content_id(arguments.scale), arguments.label_smoothing]
    key = fingerprint(semantic(options), files, [os.stat(file).st_size for file in files], given)
    work = out.with_name(f"{out.name}.work-{key}")
    request = StudentRequest(
        options, scale, files, arguments.judged, str(out), str(work), label_smoothing=arguments.label_smoothing
    )
    if (out / "relevance.json").exists():
        if distributed.rank() == 0:
            print(f"{out} is there already and was left as it is")
        return
    jobs = []
    for turn in (0, 1):  # worker 0 makes what the others then find
        if (distributed.rank() == 0) == (turn == 0):
            jobs = [student_job(request)]
        distributed.barrier()
    [result] = local_runner(jobs, lambda record: print(json.dumps(record), flush=True))
    if distributed.rank() == 0:
        finish_student(request, result)
        remove_tree(request.token_folder)
    distributed.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--labels", required=True, help="folder of a label step, or a pattern of files of labeled groups"
    )
    parser.add_argument(
        "--label-smoothing", type=float, default=0.1, help="of human grades, where classes are distilled"
    )
    parser.add_argument("--judged", required=True, help="judged groups, of which split dev chooses and calibrates")
    parser.add_argument("--scale", required=True, help="scale.json of the prepared data")
    parser.add_argument("--out", required=True, help="the model folder; checkpoints lie beside it until it is there")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="an option of the student")
    arguments = parser.parse_args()
    quiet_libraries()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Worker 0 tokenises while the others wait.
        patience = timedelta(hours=12)
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=patience)
    try:
        train(arguments)
    except Exception as error:
        if not (said := what_to_mend(error)):
            raise
        print(f"error: {said}", file=sys.stderr)
        sys.exit(2)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
