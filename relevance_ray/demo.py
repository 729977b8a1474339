"""`relevance-ray demo`: the whole chain on the built-in market, then one request to the served student."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from relevance_ray.cluster.session import ray_session
from relevance_ray.config import Config, build_config
from relevance_ray.evaluation.report.words import verdicts
from relevance_ray.steps import Chain, Outcome
from relevance_ray.storage import join, localize, read_json

SHOWN = ("teacher", "student", "human_only", "bm25")


def demo_config(root: str | None = None, overrides: Iterable[str] = ()) -> Config:
    """The demo's configuration, as `relevance_ray/demo.yaml` has it."""
    values = yaml.safe_load(resources.files("relevance_ray").joinpath("demo.yaml").read_text(encoding="utf-8"))
    if root is not None:
        values["storage"]["root"] = root
    return build_config(values, overrides, where="the demo's configuration")


def run_demo(root: str, overrides: Iterable[str] = ()) -> Outcome:
    """Run the chain, print the comparison, serve the student and score one request."""
    started = time.monotonic()
    config = demo_config(root, overrides)
    with ray_session(config.resources.num_cpus):
        outcome = Chain(config).run()
        print(f"\n{comparison(outcome)}\n")
        for sentence in verdicts(read_json(join(outcome.folders["evaluate"], "report.json"))):
            print(sentence)
        print()
        folder = localize(join(outcome.folders["train-student"], "model"))
        request = example_request(outcome.folders["prepare"])
        print(f"one request to the served student, POST /score {json.dumps(request)[:200]} ...")
        print(json.dumps(ask(folder, config, request), indent=1)[:1500])
    print(f"\nreport:  {outcome.summaries['evaluate']['report']}")
    print(f"student: {folder}")
    print(f"serve it again with: relevance-ray serve {folder}")
    print(f"took {time.monotonic() - started:.0f} s")
    return outcome


def comparison(outcome: Outcome, split: str = "test") -> str:
    """The models beside each other on a split, as a table of text."""
    metrics = outcome.summaries["evaluate"]["splits"][split]
    names = [name for name in SHOWN if name in metrics]
    columns = ["ndcg", "ndcg@10", "roc_auc", "pairwise_accuracy", "macro_f1"]
    lines = ["".join([f"{split:22}", *(f"{column:>18}" for column in columns)])]
    for name in names:
        values = [metrics[name].get(column, {}).get("value") for column in columns]
        lines.append("".join([f"{name:22}", *(f"{'-' if v is None else format(v, '.3f'):>18}" for v in values)]))
    return "\n".join(lines)


def example_request(prepared: str) -> dict[str, Any]:
    """A request from the test split: a query that no model has trained on, and its judged products."""
    from relevance_ray.data.prepare import read_judged

    group = read_judged(localize(prepared), "test").slice(0, 1).to_pylist()[0]
    products = [
        {"title": product["fields"]["title"], "brand": product["fields"]["brand"], "color": product["fields"]["color"]}
        for product in group["products"][:5]
    ]
    return {"query": group["query"], "products": products}


def ask(folder: Path, config: Config, request: dict[str, Any]) -> Any:
    """Serve a model folder for as long as one `POST /score` takes; its answer."""
    from relevance_ray.serving.app import running_server

    with running_server(folder, port=0, options=config.serve) as server:
        body = json.dumps(request).encode()
        call = urllib.request.Request(f"{server.url}/score", data=body, headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(call, timeout=60) as answer:
            return json.loads(answer.read())
