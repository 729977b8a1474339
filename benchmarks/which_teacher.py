"""Which untrained scorers, alone and stacked, rank the judged queries best: the choice of a teacher's members.

    python benchmarks/which_teacher.py --format esci|chorus|homedepot [--data FOLDER] [--member YAML]... [--quick]

Each member scores every judged pair once; none of them is trained, so all judged queries count. A stack is fitted as the
teacher's is, on four fifths of the queries, and ranks the last fifth; that is done for `--repeats` random partitions. Stacks
grow greedily from the best member by whichever of the others gains most, as long as any does; where not all are in, the
stack of all is shown beside them. (What a stack gains is measured on the queries that chose it: a little too good.)
Intervals are of resampled queries, paired, against the first member.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from relevance_ray.calibration import logit_of_classes
from relevance_ray.config import Config, build_config
from relevance_ray.data.prepare import iter_products, read_judged, read_scale
from relevance_ray.engines.ensemble import fit_stack, member_folders, stack_logits
from relevance_ray.engines.registry import load_pair_model
from relevance_ray.evaluation.ask import predict
from relevance_ray.evaluation.judged import JudgedPairs, flatten
from relevance_ray.evaluation.significance import percentile_interval, resample_counts
from relevance_ray.metrics import ndcg, roc_auc
from relevance_ray.options import semantic
from relevance_ray.quiet import quiet_libraries
from relevance_ray.schema import LabelScale
from relevance_ray.steps import Chain
from relevance_ray.storage import fingerprint
from relevance_ray.student.collate import grade_distributions
from relevance_ray.training.teacher import build_untrained

MEMBERS = [
    "{kind: bi_encoder, model: minilm, fields: [title, brand, category], max_tokens: 64}",
    "{kind: bm25}",
    "{kind: query_likelihood, model: smollm2-135m, fields: [title, category], max_tokens: 80}",
]
FOLDS = 5


def member_logits(config: Config, prepared: str, scale: LabelScale, pairs: JudgedPairs, work: Path) -> list[np.ndarray]:
    """float64 [n] of each member; kept in the work folder."""
    places = [
        work / f"logits-{fingerprint(semantic(member), pairs.num_pairs, prepared)}.npy"
        for member in config.teacher.members
    ]
    if not all(place.exists() for place in places):
        with tempfile.TemporaryDirectory() as scratch:
            folder = build_untrained(config.teacher, scale, partial(iter_products, prepared), Path(scratch))
            for member, place in zip(member_folders(folder), places, strict=True):
                if not place.exists():
                    print(f"scoring {pairs.num_pairs:,} pairs: {place.name}", flush=True)
                    unfinished = place.with_suffix(".unfinished.npy")
                    np.save(unfinished, predict(load_pair_model(member), pairs).logits)
                    unfinished.rename(place)
    return [np.load(place) for place in places]


class Judged:
    """The judged pairs of one data set, and how well columns of logits rank them."""

    def __init__(self, pairs: JudgedPairs, distributions: np.ndarray, scale: LabelScale, repeats: int) -> None:
        self.pairs, self.distributions, self.scale, self.repeats = pairs, distributions, scale, repeats
        self.groups = np.repeat(np.arange(pairs.num_queries), np.diff(pairs.offsets))

    def of_member(self, logits: np.ndarray) -> dict[str, np.ndarray]:
        return self._measured(logits[None])

    def of_stack(self, columns: list[np.ndarray]) -> dict[str, np.ndarray]:
        """A stack that never saw the query which it ranks."""
        features = np.stack(columns, axis=1)
        usable = np.isfinite(features).all(axis=1)
        out = np.full((self.repeats, len(features)), -np.inf)
        for repeat in range(self.repeats):
            fold_of_query = np.random.default_rng(repeat).permutation(self.pairs.num_queries) % FOLDS
            for fold in range(FOLDS):
                held_out = fold_of_query[self.groups] == fold
                learnt = usable & ~held_out
                stack = fit_stack(features[learnt], self.distributions[learnt], self.groups[learnt])
                rows = usable & held_out
                out[repeat, rows] = logit_of_classes(stack_logits(features[rows], stack), self.scale.gains)
        return self._measured(out)

    def _measured(self, logits: np.ndarray) -> dict[str, np.ndarray]:
        """nDCG of each query and pooled ROC AUC, averaged over repeats [r, n]."""
        pairs = self.pairs
        return {
            "ndcg": np.mean([ndcg(pairs.gains, each, pairs.offsets) for each in logits], axis=0),
            "ndcg@10": np.mean([ndcg(pairs.gains, each, pairs.offsets, 10) for each in logits], axis=0),
            "auc": np.mean([roc_auc(pairs.relevant, each) for each in logits]),
        }


def mean(found: dict[str, np.ndarray]) -> float:
    return float(np.nanmean(found["ndcg"]))


def row(found: dict[str, np.ndarray], first: dict[str, np.ndarray]) -> dict[str, Any]:
    own, other = found["ndcg"], first["ndcg"]
    defined = ~np.isnan(own) & ~np.isnan(other)
    draws = resample_counts(int(defined.sum()), 2000, seed=0) / defined.sum()
    low, high = percentile_interval(draws @ (own - other)[defined])
    return {
        "ndcg": round(float(own[defined].mean()), 4),
        "ndcg@10": round(float(np.nanmean(found["ndcg@10"])), 4),
        "auc": round(float(found["auc"]), 4),
        "to_first": [round(float((own - other)[defined].mean()), 4), round(low, 4), round(high, 4)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="esci", choices=["esci", "homedepot", "chorus"])
    parser.add_argument("--data", help="folder of the official files")
    parser.add_argument("--member", action="append", help="of the teacher, as in its configuration; repeatable")
    parser.add_argument("--repeats", type=int, default=5, help="random partitions of the queries")
    parser.add_argument("--work", default="runs/which_teacher", help="where scores are kept, and resumed from")
    parser.add_argument("--quick", action="store_true", help="the first two members, one partition")
    arguments = parser.parse_args()
    data = arguments.data or f"{os.environ.get('RELEVANCE_RAY_TEST_DATA', 'data')}/{arguments.format}"
    members = [yaml.safe_load(text) for text in arguments.member or MEMBERS]
    if any(member.get("kind") in (None, "classifier") for member in members):
        parser.error("a classifier needs training: --member takes the other kinds")
    if arguments.quick:
        members, arguments.repeats = members[:2], 1
    quiet_libraries()
    work = Path(arguments.work).absolute() / arguments.format
    config = build_config(
        {
            "data": {"format": arguments.format, "path": str(Path(data).resolve())},
            "storage": {"root": str(work)},
            "teacher": {"kind": "ensemble", "members": members},
        },
        where="which_teacher.py",
    )
    prepared = Chain(config).run("prepare").folders["prepare"]
    scale, groups = read_scale(prepared), read_judged(prepared)
    pairs = flatten(groups, scale)
    columns = member_logits(config, prepared, scale, pairs, work)
    judged = Judged(pairs, grade_distributions(groups, scale, config.data.label_smoothing), scale, arguments.repeats)

    names = [" ".join(str(value) for value in member.values()) for member in members]
    found = {name: judged.of_member(column) for name, column in zip(names, columns, strict=True)}
    first = found[names[0]]
    chosen = [max(range(len(names)), key=lambda index: mean(found[names[index]]))]
    best = mean(found[names[chosen[0]]])
    while left := [index for index in range(len(names)) if index not in chosen]:
        stacks = {index: judged.of_stack([columns[each] for each in [*chosen, index]]) for index in left}
        new = max(stacks, key=lambda index: mean(stacks[index]))
        if mean(stacks[new]) <= best:
            found["all"] = judged.of_stack(columns)
            break
        chosen, best = [*chosen, new], mean(stacks[new])
        found[" + ".join(names[index] for index in chosen)] = stacks[new]
    rows = {name: row(each, first) for name, each in found.items()}
    print(f"\n{pairs.num_queries} queries, {pairs.num_pairs:,} pairs\n")
    print(f"| scorer | nDCG | nDCG@10 | AUC | nDCG to {names[0]} |\n|---|---|---|---|---|")
    for name, each in rows.items():
        value, low, high = each["to_first"]
        span = f"{value:+.4f} [{low:+.4f}, {high:+.4f}]" if name != names[0] else ""
        print(f"| {name} | {each['ndcg']:.4f} | {each['ndcg@10']:.4f} | {each['auc']:.4f} | {span} |")
    print(
        json.dumps(
            {
                "benchmark": "which_teacher",
                "format": arguments.format,
                "quick": arguments.quick,
                "hardware": f"{os.cpu_count()} CPUs {platform.machine()}",
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
