"""The command line: one command a step, and what each exit code means.

Exit codes: 0 done; 2 what the user must mend (one sentence, no traceback); 3 done with failed rows; 130 stopped by
Ctrl-C, to be continued by the same command; 1 our fault, with its traceback.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from relevance_ray.errors import what_to_mend
from relevance_ray.quiet import quiet_libraries

if TYPE_CHECKING:
    from relevance_ray.config import Config
    from relevance_ray.steps import Chain, Outcome

EXIT_USER, EXIT_FAILED_ROWS, EXIT_STOPPED = 2, 3, 130

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Distill an LLM's relevance judgments into a model that scores (query, product) in milliseconds.",
)

ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="The run's configuration.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, e.g. generate.num_pairs=20000."),
]

Root = Annotated[str, typer.Argument(metavar="ROOT", help="The storage.root of a run.")]


def _load(path: str, overrides: list[str] | None) -> Config:
    from relevance_ray.config import load_config

    return load_config(path, overrides or [])


def _run_chain(config: Config, until: str | None) -> None:
    from relevance_ray.steps import Chain

    outcome = Chain(config).run(until)
    evaluated = outcome.summaries.get("evaluate")
    if evaluated:
        typer.echo(f"\nreport: {evaluated['report']}")
    _report_failures(outcome)


def _report_failures(outcome: Outcome) -> None:
    said = []
    if outcome.failed_rows:
        where = f"{outcome.folders['label']}/data"
        said.append(f"{outcome.failed_rows:,} rows could not be labeled; their `error` in {where} says why")
    if outcome.failed_shards:
        named = list(outcome.summaries["label"]["set_aside"].items())
        shown = "; ".join(f"{shard}: {why}" for shard, why in named[:3])
        said.append(f"{len(named):,} shards were set aside ({shown}{'; ...' if len(named) > 3 else ''})")
    if said:
        root = outcome.folders["label"].rsplit("/", 1)[0]
        typer.echo(f"{'; '.join(said)}. Training leaves them out; relevance-ray retry-failed {root}", err=True)
        raise typer.Exit(EXIT_FAILED_ROWS)


@app.command()
def run(
    config: ConfigPath,
    set_: Overrides = None,
    until: Annotated[str | None, typer.Option(metavar="STEP", help="Stop after this step.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
) -> None:
    """Run the whole chain: what is finished is skipped, what is half-done resumes."""
    loaded = _load(config, set_)
    if dry_run:
        from relevance_ray.steps import Chain

        chain = Chain(loaded)
        chain.preflight(until)
        for step, state, folder in chain.at.plan(until):
            typer.echo(f"{step:14} {state:7} {folder}")
        return
    _run_chain(loaded, until)


def _step_command(step: str, doc: str) -> None:
    def command(config: ConfigPath, set_: Overrides = None) -> None:
        _run_chain(_load(config, set_), step)

    command.__doc__ = f"{doc} Runs the steps it needs first."
    app.command(step)(command)


_step_command("prepare", "Read and check the data, and split it by query.")
_step_command("train-teacher", "Train the teacher on the human judgments.")
_step_command("generate", "Generate pairs to label.")
_step_command("label", "Label the pairs with the teacher.")
_step_command("compact", "Put the labels into few large files.")
_step_command("embed", "Give the catalog's vectors by a two-tower student, for an index of vectors.")
_step_command("train-student", "Distill the student.")
_step_command("evaluate", "Compare all models on held-out human judgments.")


@app.command()
def plan(
    config: ConfigPath,
    set_: Overrides = None,
    pairs_per_second: Annotated[
        float | None, typer.Option(help="Of one engine, where you know it; otherwise it is measured here.")
    ] = None,
    gpu_hour_price: Annotated[float | None, typer.Option(help="For the cost, in any currency.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What labeling will take, before it is spent: pairs, tokens, hours, storage, cost."""
    import json

    from relevance_ray.chain.plan_text import describe, describe_last, last_run
    from relevance_ray.chain.planning import plan_labeling

    loaded = _load(config, set_)
    found = plan_labeling(loaded, pairs_per_second, gpu_hour_price)
    if as_json:
        typer.echo(json.dumps(found.to_dict() | {"last_run": last_run(loaded.storage.root)}, indent=1))
        return
    for line in (*describe(found), *describe_last(loaded.storage.root)):
        typer.echo(line)


@app.command()
def diversity(config: ConfigPath, set_: Overrides = None) -> None:
    """How diverse the generated pairs are, and where they drift from the query log. Runs the steps it needs first."""
    from relevance_ray.generate.diversity.report import warning_lines
    from relevance_ray.steps import Chain

    report, path = Chain(_load(config, set_)).measure_diversity()
    for line in warning_lines(report):
        typer.echo(line)
    typer.echo(f"\nreport: {path}")


def _chain_at(root: str) -> Chain:
    """The chain that was last run at a root, in the folder that its paths are meant in."""
    import os

    from relevance_ray.chain.run_state import config_of
    from relevance_ray.steps import Chain

    config, directory = config_of(root)
    if os.path.isdir(directory):
        os.chdir(directory)
    return Chain(config)


@app.command()
def forecast(
    root: Root,
    seeds: Annotated[int, typer.Option(min=1, help="Students of each size: more of them, a steadier curve.")] = 1,
) -> None:
    """Train students on parts of a run's labels, and say how many pairs it takes until they pass the teacher."""
    report, path = _chain_at(root).measure_scaling(seeds)
    from relevance_ray.evaluation.scaling import scaling_markdown

    typer.echo(scaling_markdown(report))
    typer.echo(f"report: {path}")


@app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="The root of an evaluated run, or an evaluate folder.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another.")],
    model: Annotated[str, typer.Option(help="Of each run: student, teacher, or another of its report.")] = "student",
    out: Annotated[str, typer.Option(metavar="FOLDER", help="Write report.html, .md and .json there, too.")] = "",
) -> None:
    """Put two runs side by side, on the pairs that both judged."""
    from relevance_ray.errors import UserError
    from relevance_ray.evaluation.report.markdown import render_markdown
    from relevance_ray.evaluation.report.write import write_report
    from relevance_ray.evaluation.runs import compare_runs, names_of, read_run
    from relevance_ray.storage import exists, join

    if out and exists(join(out, "predictions.parquet")):
        raise UserError(f"--out {out} holds an evaluation, whose report it would replace; name another folder")
    runs = read_run(first), read_run(second)
    results = compare_runs(*runs, model)
    names = names_of(*runs)
    title = f"{model} of {names[0]} beside {names[1]}"
    about = {name: run.folder for name, run in zip(names, runs, strict=True)}
    typer.echo(render_markdown(results, title=title, about=about))
    if out:
        write_report(results, out, title=title, about=about)
        typer.echo(f"report: {out}/report.html")


@app.command("retry-failed")
def retry_failed(root: Root) -> None:
    """Label again what failed at a root, and nothing else; run the configuration again to train on it."""
    outcome = _chain_at(root).retry_failed()
    asked = outcome.summaries["label"]["labeled_now"]["pairs"]
    typer.echo(f"labeled again: {asked:,} pairs" if asked else f"nothing to label again at {root}")
    _report_failures(outcome)


@app.command()
def status(root: Root) -> None:
    """How far a run is, from outside."""
    from relevance_ray.chain.run_state import describe

    for line in describe(root):
        typer.echo(line)


@app.command()
def demo(
    set_: Overrides = None,
    root: Annotated[str, typer.Option(help="Folder of the run.")] = "runs/demo",
) -> None:
    """The whole chain on the built-in market, then one request to the served student."""
    from relevance_ray.demo import run_demo

    _report_failures(run_demo(root, set_ or []))


@app.command()
def serve(
    target: Annotated[
        str, typer.Argument(metavar="CONFIG.yaml|MODEL_DIR", help="A run's configuration or a model folder.")
    ],
    set_: Overrides = None,
    host: Annotated[str, typer.Option(help="Address to bind; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to bind.")] = 8000,
    write_config: Annotated[
        str, typer.Option(metavar="FILE", help="Write a Ray Serve configuration for a cluster, and serve nothing.")
    ] = "",
) -> None:
    """Serve a student over HTTP until Ctrl-C; with a configuration, what the student needs is run first.

    SIGHUP makes it take over, without a pause, the model that is there by then: the folder's, or the run's newest student.
    """
    from relevance_ray.chain.served import model_folder, student_of_run
    from relevance_ray.storage import localize

    is_config = target.endswith((".yaml", ".yml"))
    given = student_of_run(_load(target, set_)) if is_config else model_folder(target, set_ or [])
    if write_config:
        from relevance_ray.serving.config_file import write_serve_config
        from relevance_ray.serving.scorer import read_calibrated_info
        from relevance_ray.serving.two_stage import check_first_stage

        read_calibrated_info(localize(given.model))
        if given.options.first_stage:
            check_first_stage(given.options.first_stage, given.model)
        write_serve_config(write_config, given.model, host, port, given.options)
        typer.echo(f"wrote {write_config}; start it on a cluster with: serve deploy {write_config}")
        return
    from relevance_ray.serving.app import serve_model

    serve_model(localize(given.model), host, port, given.options, lambda: localize(given.newest()))


@app.command()
def export(
    config: ConfigPath,
    set_: Overrides = None,
    runtime: Annotated[
        str, typer.Option(help="auto measures all and takes the fastest that ranks as torch does; or its name.")
    ] = "auto",
    threads: Annotated[
        int, typer.Option(min=0, help="CPU cores that a copy of the server will have; 0: serve.cpus_per_replica.")
    ] = 0,
    out: Annotated[
        str, typer.Option(metavar="FOLDER", help="The model folder to write; ROOT/exported by default.")
    ] = "",
) -> None:
    """Make the student faster on CPUs: a model folder that runs through ONNX Runtime or OpenVINO. Runs the steps it needs
    first."""
    from relevance_ray.chain.export import check_runtime, default_out, export_student
    from relevance_ray.evaluation.runtimes import runtimes_text
    from relevance_ray.steps import Chain

    check_runtime(runtime)
    loaded = _load(config, set_)
    chain = Chain(loaded)
    out = out or default_out(chain)
    name, measured = export_student(chain, out, runtime, threads or loaded.serve.cpus_per_replica)
    typer.echo(runtimes_text(measured))
    refused = next((each.refused for each in measured.figures if each.name == name and each.refused), None)
    if refused:
        typer.echo(f"warning: {name} would not have been chosen: {refused}", err=True)
    typer.echo(f"\n{out} runs through {name}; serve it with: relevance-ray serve {out}")


@app.command()
def score(
    model: Annotated[str, typer.Option(metavar="DIR", help="A student or teacher folder.")],
    input_: Annotated[
        str,
        typer.Option("--input", metavar="FILE", help="Parquet, CSV or JSON lines with `query` and product columns."),
    ],
    output: Annotated[str, typer.Option(metavar="FILE", help="The same rows plus logit, probability, score.")],
) -> None:
    """Score the rows of a file."""
    from pathlib import Path

    from relevance_ray.progress import Progress
    from relevance_ray.scoring import score_file
    from relevance_ray.storage import localize

    with Progress("score", unit="rows") as progress:
        summary = score_file(
            localize(model),
            Path(input_),
            Path(output),
            on_progress=lambda done, failed: progress.update(done, failures=failed),
        )
    if summary.failed:
        typer.echo(f"{summary.failed} rows could not be scored and are left empty; {summary.first_failure}", err=True)
        raise typer.Exit(EXIT_FAILED_ROWS)


@app.command("config")
def show_config() -> None:
    """Every configuration key with its default and meaning."""
    from relevance_ray.config import describe

    for key, default, description in describe():
        typer.echo(f"{key} = {default}\n    {description}")


def _stop(signum: int, frame: FrameType | None) -> None:
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - Ray tells of every actor that ends now as of a failure
    raise KeyboardInterrupt


def main() -> None:
    """Entry point of the command `relevance-ray`."""
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    quiet_libraries()
    try:
        app(standalone_mode=True)
    except (SystemExit, KeyboardInterrupt) as stop:
        if isinstance(stop, SystemExit) and stop.code != EXIT_STOPPED:
            raise
        typer.echo("stopped; the same command goes on from here", err=True)
        sys.exit(EXIT_STOPPED)
    except Exception as error:
        if not (said := what_to_mend(error)):
            raise
        typer.echo(f"error: {said}", err=True)
        sys.exit(EXIT_USER)


if __name__ == "__main__":
    main()
