"""vLLM as an Engine: continuous batching in this process, one seed a row, LoRA adapters put on and taken off.

Of adapters: vLLM 0.32 keeps them in slots, and on the CPU gives a request without an adapter the weights of the last
slot, whatever it holds, when others in its batch have one (the index of "none" is -1; see also vllm_lora_cpu). So all
requests of a call have the same adapter or none; and there are two slots for one adapter at a time: the last is empty.
"""

from __future__ import annotations

import gc
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

from curate.errors import EngineDead, EngineGone, ModelError
from curate.models import adapter as lora
from curate.models import vllm_lora_cpu
from curate.models.engines import (
    Engine,
    FirstToken,
    Generated,
    GenerationSpec,
    prompt_error,
    stop_ids,
    to_generated,
    token_text,
)
from curate.models.load import (
    ModelSpec,
    bare_model,
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


_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_SLOTS = 2  # see the module's docstring


def _lora_settings(rank: int) -> dict[str, Any]:
    """Settings of an engine that serves adapters up to `rank`; vLLM knows some ranks only.

    Raises:
        ModelError: a rank above the largest.
    """
    if rank == 0:
        return {}
    room = next((r for r in _RANKS if r >= rank), None)
    if room is None:
        raise ModelError(
            f"an adapter of rank {rank}: vLLM serves {_RANKS[-1]} at most; set generation.engine=transformers"
        )
    return {"enable_lora": True, "max_loras": _SLOTS, "max_cpu_loras": _SLOTS, "max_lora_rank": room}


def _dead(doing: str, error: Exception) -> EngineDead:
    # By name: an engine's own process is there with some settings and versions only, and so is its error.
    kind = EngineGone if type(error).__name__ == "EngineDeadError" else EngineDead
    return kind(
        f"vLLM failed while {doing}: {type(error).__name__}: {error}. Where it cannot run this model at all, "
        f"the engine transformers can (generation.engine, judge.engine)."
    )


class VllmEngine(Engine):
    """Takes any number of prompts a call; vLLM schedules at most `max_batch` of them at a time."""

    name: ClassVar[str] = "vllm"

    def __init__(self, model: ModelSpec, generation: GenerationSpec, lora_rank: int = 0) -> None:
        """`lora_rank`: of the adapters to come, the largest; 0 for none, and faster.

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
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        self._vocab = int(config.get_text_config().vocab_size)
        self._max_len = min(generation.max_model_len, context_length(config))
        self._tokenizer = load_tokenizer(model)
        memory = (
            {"kv_cache_memory_bytes": int(generation.kv_cache_gb * 2**30)}
            if device.type == "cpu"
            else {"gpu_memory_utilization": generation.gpu_memory_utilization}
        )
        if lora_rank and device.type == "cpu":
            vllm_lora_cpu.install()
        try:
            self._llm = vllm.LLM(
                model=str(folder),
                dtype=dtype_name(dtype),
                max_model_len=self._max_len,
                max_num_seqs=generation.max_batch,
                tensor_parallel_size=generation.tensor_parallel,
                enforce_eager=generation.enforce_eager,
                trust_remote_code=False,
                seed=0,
                disable_log_stats=True,
                **memory,
                **_lora_settings(lora_rank),
            )
        except Exception as error:
            raise ModelError(f"vLLM cannot start with the model {model.path!r}: {error}") from error
        self._stops = stop_ids(self._tokenizer, _eos(folder, config))
        self._lora_rank = lora_rank
        self._bare = bare_model(model) if lora_rank else None
        self._worn: Any = None  # the LoRARequest of the adapter in the first slot
        self._adapters = 0  # numbers are never used twice: vLLM's prefix cache tells adapters apart by them

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        adapter: str | Path | None = None,
        sampling: GenerationSpec | None = None,
    ) -> list[Generated]:
        self._wear(None if adapter is None else Path(adapter))
        errors = [prompt_error(p, self._max_len, self._vocab) for p in prompts]
        good = [i for i, error in enumerate(errors) if error is None]
        out = [Generated("", [], "error", error) for error in errors]
        if not good:
            return out
        try:
            answers = self._llm.generate(
                [self._vllm.TokensPrompt(prompt_token_ids=list(prompts[i])) for i in good],
                [self._sampling(seeds[i], sampling or self._spec) for i in good],
                use_tqdm=False,
                lora_request=self._worn,
            )
        except Exception as error:
            raise _dead("generating", error) from error
        for i, answer in zip(good, answers, strict=True):
            out[i] = to_generated(self._tokenizer, list(answer.outputs[0].token_ids), self._stops)
        return out

    def _wear(self, adapter: Path | None) -> None:
        if (None if self._worn is None else self._worn.lora_path) == (None if adapter is None else str(adapter)):
            return
        engine = self._llm.llm_engine
        if self._worn is not None:
            engine.remove_lora(self._worn.lora_int_id)
            self._worn = None
        if adapter is None:
            return
        if (needed := lora.rank(adapter)) > self._lora_rank:
            raise ModelError(
                f"the adapter {adapter} has the rank {needed}; the engine was started for {self._lora_rank or 'none'}"
            )
        if self._bare is not None:
            lora.check_fits(self._bare, adapter)  # vLLM writes matrices of any smaller shape into its slots
        from vllm.lora.request import LoRARequest

        self._adapters += 1
        request = LoRARequest(f"{self._adapters}", self._adapters, str(adapter))
        try:
            engine.add_lora(request)
        except Exception as error:
            raise ModelError(f"vLLM cannot put the adapter {adapter} on the model: {error}") from error
        self._worn = request

    def _sampling(self, seed: int, spec: GenerationSpec) -> Any:
        return self._vllm.SamplingParams(
            temperature=spec.temperature,
            top_p=spec.top_p,
            max_tokens=spec.max_new_tokens,
            seed=seed,
            stop_token_ids=self._stops,
            detokenize=False,
        )

    def first_token(self, prompts: Sequence[Sequence[int]], top: int = 20) -> list[FirstToken]:
        self._wear(None)
        errors = [prompt_error(p, self._max_len, self._vocab) for p in prompts]
        good = [i for i, error in enumerate(errors) if error is None]
        out = [FirstToken((), error) for error in errors]
        if not good:
            return out
        # No end of turn is given: as the first token it is an answer like any other.
        asked = self._vllm.SamplingParams(temperature=0, max_tokens=1, logprobs=top, detokenize=False)
        try:
            answers = self._llm.generate(
                [self._vllm.TokensPrompt(prompt_token_ids=list(prompts[i])) for i in good], asked, use_tqdm=False
            )
        except Exception as error:
            raise _dead("reading prompts", error) from error
        for i, answer in zip(good, answers, strict=True):
            given: Any = answer.outputs[0].logprobs
            found = sorted(given[0].items(), key=lambda item: item[1].rank)[:top]
            chances = [(token, math.exp(p.logprob)) for token, p in found]
            out[i] = FirstToken(tuple((t, token_text(self._tokenizer, t), p) for t, p in chances))
        return out

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        cleanup_dist_env_and_memory()
