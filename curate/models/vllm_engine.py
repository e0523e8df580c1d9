"""vLLM as an Engine: continuous batching in this process, one seed a row."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from curate.errors import ModelError
from curate.models.engines import (
    Engine,
    EngineDead,
    Generated,
    GenerationSpec,
    prompt_error,
    stop_ids,
    to_generated,
)
from curate.models.load import (
    ModelSpec,
    context_length,
    dtype_name,
    load_tokenizer,
    materialise,
    resolve_device,
    resolve_dtype,
)


def _environment(device: torch.device) -> None:
    """vLLM reads these when it is imported; what the user has set stays."""
    wanted = {
        # In this process: an actor is a process already, and a dead one must take its engine with it.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if device.type == "cpu":
        # More threads than free cores is ten times slower; binding would put every actor on the same cores.
        wanted |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    for name, value in wanted.items():
        os.environ.setdefault(name, value)


def _shield_llvmlite() -> None:
    """Let vLLM's start survive a numba that was imported before it.

    vLLM 0.32 looks through the attributes of all modules that are loaded for kernels to replace, and trips over
    llvmlite's wrapper of its library, which answers to every name, `__dict__` too, with a function.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if ffi is None or not hasattr(ffi, "lib"):
        return
    wrapper = type(ffi.lib)
    answer = wrapper.__getattr__

    def only_functions(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return answer(self, name)

    wrapper.__getattr__ = only_functions


def _eos(folder: Path, config: PretrainedConfig) -> int | list[int] | None:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder).eos_token_id
    return config.get_text_config().eos_token_id


class VllmEngine(Engine):
    """Takes any number of prompts a call; vLLM schedules at most `max_batch` of them at a time."""

    name: ClassVar[str] = "vllm"

    def __init__(self, model: ModelSpec, generation: GenerationSpec) -> None:
        """
        Raises:
            ModelError: vLLM cannot start with this model (unknown architecture, too little memory, …).
        """
        device = resolve_device(model.device)
        _environment(device)
        _shield_llvmlite()
        import vllm

        if device.type == "cpu":
            # The variable came too late where torch was imported before; vLLM starts threads as torch counts them.
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self._vllm = vllm
        self._spec = generation
        dtype = resolve_dtype(generation.dtype, device)
        # Sums in 16 bits come out differently in every batch shape; in 32 bits the differences move no sample.
        self.row_reproducible = dtype == torch.float32 or os.environ.get("VLLM_BATCH_INVARIANT") == "1"
        folder = materialise(model)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
        self._vocab = int(config.get_text_config().vocab_size)
        self._max_len = min(generation.max_model_len, context_length(config))
        self._tokenizer = load_tokenizer(model)
        memory = (
            {"kv_cache_memory_bytes": int(generation.kv_cache_gb * 2**30)}
            if device.type == "cpu"
            else {"gpu_memory_utilization": generation.gpu_memory_utilization}
        )
        try:
            self._llm = vllm.LLM(
                model=str(folder),
                dtype=dtype_name(dtype),
                max_model_len=self._max_len,
                max_num_seqs=generation.max_batch,
                tensor_parallel_size=generation.tensor_parallel,
                enforce_eager=generation.enforce_eager,
                trust_remote_code=model.trust_remote_code,
                seed=0,
                disable_log_stats=True,
                **memory,
            )
        except Exception as error:
            raise ModelError(f"vLLM cannot start with the model {model.path!r}: {error}") from error
        self._stops = stop_ids(self._tokenizer, _eos(folder, config))

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Generated]:
        errors = [prompt_error(p, self._max_len, self._vocab) for p in prompts]
        good = [i for i, error in enumerate(errors) if error is None]
        out = [Generated("", [], "error", error) for error in errors]
        if not good:
            return out
        try:
            answers = self._llm.generate(
                [self._vllm.TokensPrompt(prompt_token_ids=list(prompts[i])) for i in good],
                [self._sampling(seeds[i]) for i in good],
                use_tqdm=False,
            )
        except Exception as error:
            raise EngineDead(f"vLLM failed while generating: {type(error).__name__}: {error}") from error
        for i, answer in zip(good, answers, strict=True):
            out[i] = to_generated(self._tokenizer, list(answer.outputs[0].token_ids), self._stops)
        return out

    def _sampling(self, seed: int) -> Any:
        return self._vllm.SamplingParams(
            temperature=self._spec.temperature,
            top_p=self._spec.top_p,
            max_tokens=self._spec.max_new_tokens,
            seed=seed,
            stop_token_ids=self._stops,
            detokenize=False,
        )

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        cleanup_dist_env_and_memory()
