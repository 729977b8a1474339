"""Model folders, and text generation, through vLLM: what `transformers` does, faster on a GPU.

vLLM packs sequences without padding, keeps the keys and values of a prefix that rows share, and forces text into a
grammar. It pays with half a minute to open, with processes of its own that hold the memory (so `close` it), and with an
environment of its own, for it pins its torch. Token ids come from our own `PairEncoder`, and raw logits come out, so
that labels do not depend on who ran the model. Float32 and eager on a CPU, bf16 on a GPU.
"""

from __future__ import annotations

import dataclasses
import difflib
import gc
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, AutoTokenizer

from relevance_ray.engines import vllm_worker
from relevance_ray.engines.base import FolderModel
from relevance_ray.engines.chat import ChatEncoder
from relevance_ray.engines.encoding import PairEncoder
from relevance_ray.engines.forward import DEFAULT_BATCH_TOKENS
from relevance_ray.engines.generation import Generated, Message, Sampling
from relevance_ray.engines.transformers import as_class_logits, gains_of
from relevance_ray.errors import UserError
from relevance_ray.model_folder import read_model_info

CPU_CACHE_BYTES = 1 << 30
"""Keys and values on a CPU, where vLLM would take nine tenths of the machine's memory."""
SHARED_GPU_UTILIZATION = 0.85
"""Of a GPU's memory, what several models in it divide among themselves; vLLM's or not; the rest is a bi-encoder's."""
MAX_CHOICES = 128
"""vLLM returns the log probabilities of so many chosen tokens."""

_OURS = ("model", "tokenizer", "runner", "skip_tokenizer_init")


class VllmModel(FolderModel):
    """A cross-encoder or classifier, as `transformers.SequenceModel` runs it: the same ids in, the same logits out.

    Rows are scored in their order, so that those of one query share the keys and values of its prefix (causal models).
    An engine whose process died raises vLLM's `EngineDeadError` from then on: `close` it and open another.

    Args:
        folder: a model folder of kind cross_encoder or classifier.
        device: "auto", or what this build of vLLM is for ("cpu", "cuda"), which nothing else can choose.
        num_threads: CPU threads of the model's process, not bound to cores; 0 leaves vLLM's choice.
        max_batch_tokens: tokens of one forward pass, or the longest row's.
        engine_args: arguments of `vllm.LLM`, over our defaults.
        memory_share: of the GPU's memory, where it is shared with other models.

    Raises:
        UserError: vLLM is not installed, or it refuses the model or an argument.
    """

    def __init__(
        self,
        folder: str | Path,
        device: str = "auto",
        num_threads: int = 0,
        max_batch_tokens: int | None = None,
        engine_args: Mapping[str, Any] | None = None,
        memory_share: float = 1.0,
    ) -> None:
        vllm = import_vllm()
        self._num_tokens = 0
        self.info = read_model_info(folder)
        self.gains = gains_of(self.info, AutoConfig.from_pretrained(folder).num_labels)
        self.encoder = PairEncoder(AutoTokenizer.from_pretrained(folder), self.info.template)
        max_tokens = self.info.template.max_tokens
        engine_args = dict(engine_args or {})
        if engine_args.get("max_model_len", max_tokens) < max_tokens:
            raise UserError(
                f"vllm.engine_args.max_model_len {engine_args['max_model_len']} is below the teacher's max_tokens "
                f"{max_tokens}; leave it out"
            )
        defaults = {
            "runner": "pooling",
            "max_model_len": max_tokens,
            # A row must fit into one pass: encoders cannot be read in parts.
            "max_num_batched_tokens": max(max_batch_tokens or DEFAULT_BATCH_TOKENS, max_tokens),
        }
        if memory_share < 1 and not _is_cpu():
            defaults["gpu_memory_utilization"] = SHARED_GPU_UTILIZATION * memory_share
        self._llm = open_llm(str(folder), defaults, engine_args, device, num_threads)
        self._params = vllm.PoolingParams

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def _forward(
        self, queries: Sequence[str], products: Sequence[Mapping[str, Any]]
    ) -> tuple[np.ndarray, list[str | None]]:
        encoded = self.encoder.encode(queries, products)
        class_logits = np.full((len(queries), len(self.gains)), np.nan, dtype=np.float32)
        rows = np.flatnonzero(encoded.lengths)
        self._num_tokens += int(encoded.lengths.sum())
        if len(rows):
            types = encoded.token_type_ids
            # `use_activation` off: no softmax or sigmoid, the logits as they are.
            params = [
                self._params(use_activation=False, extra_kwargs=None if types is None else _second_text(types[row]))
                for row in rows
            ]
            prompts = [{"prompt_token_ids": encoded.input_ids[row].tolist()} for row in rows]
            with _woken_by_death(self._llm):
                outputs = self._llm.classify(prompts, pooling_params=params, use_tqdm=False)
            class_logits[rows] = as_class_logits(np.asarray([out.outputs.probs for out in outputs], dtype=np.float32))
        return class_logits, encoded.errors

    def close(self) -> None:
        close_llm(self._llm)


class VllmGenerator:
    """Writes answers with a causal language model: a `generation.TextGenerator`.

    Conversations become tokens as `chat.ChatEncoder` says.

    `json_schema` is vLLM's structured output, and an answer cut at `max_tokens` is an error. With `choices` one token is
    written, of theirs alone, and `choice_logits` are the model's own log probabilities, from before that restriction.
    One seed gives one answer: for several samples of a conversation, vary it.

    Args:
        model: a `save_pretrained` folder, or a hub id.
        device, num_threads, engine_args: as `VllmModel` has them.

    Raises:
        UserError: vLLM is not installed, or it refuses the model or an argument.
    """

    def __init__(
        self,
        model: str | Path,
        device: str = "auto",
        num_threads: int = 0,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        self._vllm = import_vllm()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self._chat = ChatEncoder(self.tokenizer)
        defaults = {
            "runner": "generate",
            # Where blanks are free, a small model may write them until its tokens are spent.
            "structured_outputs_config": {"backend": "guidance", "disable_any_whitespace": True},
        }
        self._llm = open_llm(str(model), defaults, dict(engine_args or {}), device, num_threads)

    def generate(self, conversations: Sequence[Sequence[Message]], sampling: Sampling) -> list[Generated]:
        """One answer a conversation, in their order; one that cannot be had carries an error.

        Raises:
            ValueError: a choice that is not a token of its own, or a schema that vLLM cannot follow.
        """
        choice_ids = self._choice_ids(sampling.choices)
        params = self._sampling_params(sampling, choice_ids)
        answers, prompts, rows = [], [], []
        for row, conversation in enumerate(conversations):
            ids, error = self._prompt(conversation)
            answers.append(Generated(error=error, prompt_tokens=len(ids)))
            if error is None:
                prompts.append({"prompt_token_ids": ids})
                rows.append(row)
        if prompts:
            with _woken_by_death(self._llm):
                outputs = self._llm.generate(prompts, params, use_tqdm=False)
            for row, output in zip(rows, outputs, strict=True):
                answers[row] = _answer(output, sampling, choice_ids)
        return answers

    def close(self) -> None:
        """Give back the model's memory; nothing can be generated any more."""
        close_llm(self._llm)

    def _choice_ids(self, choices: Sequence[str]) -> list[int]:
        if len(choices) > MAX_CHOICES:
            raise ValueError(
                f"{len(choices)} choices are more than the {MAX_CHOICES} whose log probabilities vLLM gives"
            )
        return self._chat.choice_ids(choices)

    def _sampling_params(self, sampling: Sampling, choice_ids: list[int]) -> Any:
        params: dict[str, Any] = {"temperature": sampling.temperature, "max_tokens": sampling.max_tokens}
        if sampling.stop:
            params["stop"] = list(sampling.stop)
        if sampling.temperature > 0:
            params["seed"] = sampling.seed
        if choice_ids:
            # A grammar over the choices would let a shorter token begin one of them ("E" of "Exact").
            params |= {"max_tokens": 1, "allowed_token_ids": choice_ids, "logprob_token_ids": choice_ids}
        if sampling.json_schema is not None:
            structured = self._vllm.sampling_params.StructuredOutputsParams(json=dict(sampling.json_schema))
            params["structured_outputs"] = structured
        return self._vllm.SamplingParams(**params)

    def _prompt(self, conversation: Sequence[Message]) -> tuple[list[int], str | None]:
        """Token ids, and why there are none or too many."""
        return self._chat.encode(conversation, self._llm.model_config.max_model_len - 1)


def import_vllm() -> Any:
    """The module `vllm`.

    Raises:
        UserError: it is not installed, or broken.
    """
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        import vllm
        import vllm.sampling_params
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise UserError(f"vLLM is installed but lacks the package {error.name}; install it anew") from error
        raise UserError(
            "the vllm engine needs vLLM, which is not installed here; install relevance-ray[vllm] in an environment of "
            "its own (README, `The vLLM engine`)"
        ) from error
    except ImportError as error:
        raise UserError(f"vLLM is installed but cannot be imported ({error}); install it anew") from error
    return vllm


def open_llm(
    model: str, defaults: Mapping[str, Any], engine_args: Mapping[str, Any], device: str, num_threads: int
) -> Any:
    """A `vllm.LLM`, in processes of its own until `close_llm`.

    Raises:
        UserError: an argument that vLLM does not have or takes otherwise, a model that it does not run, another device.
    """
    vllm = import_vllm()
    from vllm.platforms import current_platform

    if device not in ("auto", current_platform.device_type):
        raise UserError(f"device {device} is not for vLLM, whose build here is for {current_platform.device_type}")
    known = sorted({field.name for field in dataclasses.fields(vllm.EngineArgs)} - set(_OURS))
    for name in engine_args:
        if name in _OURS:
            raise UserError(f"vllm.engine_args.{name} is set by the engine itself; leave it out")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise UserError(f"vllm.engine_args.{name} is no argument of vLLM {vllm.__version__}; did you mean {near}")
    arguments: dict[str, Any] = {
        "dtype": "float32" if _is_cpu() else "bfloat16",
        "enforce_eager": _is_cpu(),
        "worker_extension_cls": f"{vllm_worker.__name__}.{vllm_worker.EndsWithOwner.__name__}",
        "generation_config": "vllm",  # sampling is the caller's, not what the model's author suggests
    }
    if _is_cpu() and "gpu_memory_utilization" not in engine_args:
        arguments["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    with _environment(num_threads):
        try:
            return vllm.LLM(model, **{**arguments, **defaults, **engine_args})
        except (ValueError, TypeError, NotImplementedError) as error:
            # Raised before the model's process starts: the configuration, not the machine.
            raise UserError(f"vLLM refuses {model}: {' '.join(str(error).split())}") from error


def close_llm(llm: Any) -> None:
    """End the processes of a `vllm.LLM`, also of a dead one, and wait for it; a second time does nothing."""
    llm.llm_engine.engine_core.shutdown()
    llm.renderer.shutdown()
    gc.collect()  # an engine within this process (VLLM_ENABLE_V1_MULTIPROCESSING=0) holds its memory by reference


@contextmanager
def _woken_by_death(llm: Any) -> Iterator[None]:
    """Let a call of vLLM raise `EngineDeadError` where its process is killed meanwhile, as when memory runs out. vLLM
    (0.32) notices, but leaves a call that waits for the answer waiting for ever."""
    from vllm.v1.engine.exceptions import EngineDeadError

    core = llm.llm_engine.engine_core
    if not hasattr(core, "outputs_queue"):  # an engine within this process (VLLM_ENABLE_V1_MULTIPROCESSING=0)
        yield
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1.0):
            if core.resources.engine_dead:
                core.outputs_queue.put_nowait(EngineDeadError())
                return

    watcher = threading.Thread(target=watch, name="vllm-watcher", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _is_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


@contextmanager
def _environment(num_threads: int) -> Iterator[None]:
    """What the processes started within inherit. vLLM binds its threads to cores from the first on, and so would each
    of several engines on one machine."""
    values = {vllm_worker.OWNER: str(os.getpid())}
    if num_threads:
        values |= {"OMP_NUM_THREADS": str(num_threads), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _second_text(types: np.ndarray) -> dict[str, int] | None:
    """Token types as vLLM takes them: where the second text begins; None where all are 0, its default."""
    second = np.flatnonzero(types)
    if not len(second):
        return None
    assert set(types[second[0] :].tolist()) == {1}, types
    return {"compressed_token_type_ids": int(second[0])}


def _answer(output: Any, sampling: Sampling, choice_ids: Sequence[int]) -> Generated:
    """What vLLM wrote for one conversation."""
    written = output.outputs[0]
    answer = Generated(
        text=written.text, prompt_tokens=len(output.prompt_token_ids), completion_tokens=len(written.token_ids)
    )
    if choice_ids:
        found = written.logprobs[0] if written.logprobs else {}
        logprobs = [found[token].logprob if token in found else np.nan for token in choice_ids]
        answer.choice_logits = np.asarray(logprobs, dtype=np.float32)
        answer.text = sampling.choices[choice_ids.index(written.token_ids[0])]
    elif written.finish_reason not in ("stop", "length"):
        answer.text, answer.error = "", f"vLLM ended the answer with {written.finish_reason!r}"
    elif sampling.json_schema is not None and written.finish_reason == "length":
        answer.text, answer.error = "", f"the JSON was cut at {len(written.token_ids)} tokens"
    return answer
