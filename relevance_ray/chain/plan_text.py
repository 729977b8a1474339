"""A plan in lines for a reader, and beside it what the last run took."""

from __future__ import annotations

from collections.abc import Iterator

from relevance_ray.chain.planning import Plan
from relevance_ray.storage import exists, join, read_json


def describe(plan: Plan) -> Iterator[str]:
    """The plan in lines for a reader."""
    done = f", {plan.pairs_labeled:,} of them labeled already" if plan.pairs_labeled else ""
    earlier = (
        f"; {plan.pairs_of_earlier_runs:,} of earlier runs may be taken over" if plan.pairs_of_earlier_runs else ""
    )
    yield f"{'pairs':10} {plan.pairs:,}{done}{earlier}"
    if plan.tokens_per_pair:
        give = 2 * plan.tokens_per_pair_error
        yield f"{'tokens':10} {plan.tokens:,.0f}: {plan.tokens_per_pair:.1f} a pair, give or take {give:.1f}"
    if plan.pairs == plan.pairs_labeled:
        yield f"{'time':10} none: all are labeled"
    elif plan.pairs_per_second is None or plan.hours is None:
        yield f"{'time':10} not known: {plan.rate_source}; give --pairs-per-second of one engine"
    else:
        yield f"{'rate':10} {plan.pairs_per_second:,.1f} pairs/s an engine ({plan.rate_source}), {plan.engines} at once"
        held = f"{plan.gpu_hours:,.1f} GPU hours" if plan.gpu_hours else f"{_time(plan.cpu_hours or 0.0)} of a CPU"
        yield f"{'time':10} {_time(plan.hours)} without the starts; {held}"
    if plan.cost is not None:
        free = "" if plan.gpu_hours else ": no GPU is asked for (resources.gpus_per_label_actor)"
        yield f"{'cost':10} {plan.cost:,.2f}{free}"
    yield f"{'storage':10} {_size(plan.generate_gigabytes)} of pairs, {_size(plan.label_gigabytes)} of labels"
    yield f"{'shards':10} {plan.shards:,}, for which the head keeps {_size(plan.head_gigabytes)}"
    requests = f"; {plan.put_requests:,} requests that write or list, {plan.get_requests:,} that read, if on S3"
    yield f"{'objects':10} {plan.objects:,}{requests}"
    yield f"{'sample':10} {plan.sampled_pairs:,} pairs of {plan.sample}"


def _size(gigabytes: float) -> str:
    return f"{gigabytes:,.1f} GB" if gigabytes >= 1 else f"{1000 * gigabytes:,.1f} MB"


def last_run(root: str) -> dict[str, float] | None:
    """What labeling took when it was last run at a root: `pairs` that the engine was asked for, their `tokens`, and
    `seconds`, the start of Ray and of engines included; None where it has not ended there, or asked for none."""
    latest = join(root, "latest.json")
    marker = join(read_json(latest).get("label", root), "step.json") if exists(latest) else latest
    if not exists(marker):
        return None
    took = read_json(marker)
    now = took["summary"]["labeled_now"]
    return {**now, "seconds": took["seconds"]} if now["pairs"] else None


def describe_last(root: str) -> Iterator[str]:
    """What labeling took at a root, to hold the plan against."""
    if (took := last_run(root)) is None:
        return
    tokens = f", {took['tokens'] / took['pairs']:.1f} tokens a pair" if took["tokens"] else ""
    rate = f"{took['pairs'] / took['seconds']:,.1f} pairs/s over {_time(took['seconds'] / 3600)}, starts included"
    yield f"{'last run':10} {took['pairs']:,} pairs{tokens}, {rate}"


def _time(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} hours"
    return f"{60 * hours:.1f} minutes" if hours >= 1 / 60 else f"{3600 * hours:.0f} seconds"
