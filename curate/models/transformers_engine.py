"""transformers as an Engine: the fallback where vLLM is not installed.

Its own sampling loop, as Hugging Face's `generate` draws for a whole batch from one stream: here every row draws from
its own.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from curate.errors import EngineDead
from curate.models.adapter import Wardrobe
from curate.models.batching import collate
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
from curate.models.load import ModelSpec, context_length, load_model, load_tokenizer, pad_id
from curate.models.tap import head_logits


def sample(
    logits: Float[Tensor, "rows vocab"], uniform: Float[Tensor, " rows"], temperature: float, top_p: float
) -> Int[Tensor, " rows"]:
    """One token a row: the likeliest at temperature 0, else the one at which the cumulative probability passes u.

    top_p keeps the smallest set of likeliest tokens whose probability reaches it.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.double() / temperature).softmax(-1)
    if top_p == 1:
        return _draw(probabilities, uniform)
    probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
    nucleus = probabilities.cumsum(-1) - probabilities < top_p
    return order.gather(1, _draw(torch.where(nucleus, probabilities, 0.0), uniform)[:, None])[:, 0]


def _draw(weights: Float[Tensor, "rows vocab"], uniform: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    total = weights.cumsum(-1)
    # Strictly below the total, whatever the product rounds to: a token without weight is never drawn.
    below = torch.nextafter(total[:, -1], torch.zeros_like(uniform, dtype=torch.float64))
    target = torch.minimum(uniform.double() * total[:, -1], below)
    return torch.searchsorted(total, target[:, None], right=True)[:, 0]


class TransformersEngine(Engine):
    """Batches of up to `max_batch` prompts of like length, padded on the left, with a key–value cache."""

    name: ClassVar[str] = "transformers"

    def __init__(self, model: ModelSpec, generation: GenerationSpec) -> None:
        """
        Raises:
            ModelError: the model cannot be loaded.
        """
        self._spec = generation
        self._model = load_model(replace(model, dtype=generation.dtype))
        self._wardrobe = Wardrobe(self._model)
        self.row_reproducible = self._model.dtype == torch.float32
        self._tokenizer = load_tokenizer(model)
        config = self._model.config
        self._vocab = int(config.get_text_config().vocab_size)
        self._max_len = min(generation.max_model_len, context_length(config))
        self._stops = stop_ids(self._tokenizer, self._model.generation_config.eos_token_id)
        self._takes_positions = "position_ids" in inspect.signature(self._model.base_model.forward).parameters

    @property
    def model(self) -> PreTrainedModel:
        """The model that answers, for those who change what it computes."""
        return self._model

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        adapter: str | Path | None = None,
        sampling: GenerationSpec | None = None,
    ) -> list[Generated]:
        self._wardrobe.wear(None if adapter is None else Path(adapter))
        spec = sampling or self._spec
        errors = [prompt_error(p, self._max_len, self._vocab) for p in prompts]
        out = [Generated("", [], "error", error) for error in errors]
        good = sorted((i for i, error in enumerate(errors) if error is None), key=lambda i: len(prompts[i]))
        for at in range(0, len(good), self._spec.max_batch):
            rows = good[at : at + self._spec.max_batch]
            try:
                answers = self._batch([prompts[i] for i in rows], [seeds[i] for i in rows], spec)
            except RuntimeError as error:
                raise EngineDead(
                    f"generating failed: {error}. If memory ran out, lower generation.max_batch "
                    f"(now {self._spec.max_batch})."
                ) from error
            for i, ids in zip(rows, answers, strict=True):
                out[i] = to_generated(self._tokenizer, ids, self._stops)
        return out

    @torch.no_grad()
    def _batch(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], spec: GenerationSpec) -> list[list[int]]:
        device = self._model.device
        # A row's own limit: its neighbours' lengths must not change where it is cut.
        limits = [min(spec.max_new_tokens, self._max_len - len(p)) for p in prompts]
        # Drawn ahead, and on the CPU: the same numbers on every device.
        draws = torch.stack([_uniform(seed, max(limits)) for seed in seeds]).to(device)
        step, mask = collate(prompts, pad_id(self._tokenizer), side="left", device=device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = DynamicCache(config=self._model.config)
        answers: list[list[int]] = [[] for _ in prompts]
        open_rows = set(range(len(prompts)))
        for t in range(max(limits)):
            more = {"position_ids": positions} if self._takes_positions else {}
            hidden = self._model.base_model(
                input_ids=step, attention_mask=mask, past_key_values=cache, use_cache=True, **more
            ).last_hidden_state[:, -1]
            chosen = sample(head_logits(self._model, hidden), draws[:, t], spec.temperature, spec.top_p)
            for i, token in enumerate(chosen.tolist()):
                if i in open_rows:
                    answers[i].append(token)
                    if token in self._stops or len(answers[i]) == limits[i]:
                        open_rows.remove(i)
            if not open_rows:
                break
            step = chosen[:, None]
            mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
            positions = positions[:, -1:] + 1
        return answers

    def first_token(self, prompts: Sequence[Sequence[int]], top: int = 20) -> list[FirstToken]:
        self._wardrobe.wear(None)
        errors = [prompt_error(p, self._max_len, self._vocab) for p in prompts]
        out = [FirstToken((), error) for error in errors]
        good = sorted((i for i, error in enumerate(errors) if error is None), key=lambda i: len(prompts[i]))
        for at in range(0, len(good), self._spec.max_batch):
            rows = good[at : at + self._spec.max_batch]
            try:
                values, tokens = self._likeliest([prompts[i] for i in rows], top)
            except RuntimeError as error:
                raise EngineDead(
                    f"reading prompts failed: {error}. If memory ran out, lower generation.max_batch "
                    f"(now {self._spec.max_batch})."
                ) from error
            for i, ps, ts in zip(rows, values.tolist(), tokens.tolist(), strict=True):
                out[i] = FirstToken(tuple((t, token_text(self._tokenizer, t), p) for t, p in zip(ts, ps, strict=True)))
        return out

    @torch.no_grad()
    def _likeliest(
        self, prompts: Sequence[Sequence[int]], top: int
    ) -> tuple[Float[Tensor, "rows top"], Int[Tensor, "rows top"]]:
        """Probability and id of the `top` likeliest next tokens."""
        ids, mask = collate(prompts, pad_id(self._tokenizer), side="left", device=self._model.device)
        more = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if self._takes_positions else {}
        hidden = self._model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, **more).last_hidden_state
        found = head_logits(self._model, hidden[:, -1]).float().softmax(-1).topk(min(top, self._vocab))
        return found.values, found.indices

    def close(self) -> None:
        del self._model, self._wardrobe
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _uniform(seed: int, n: int) -> Float[Tensor, " n"]:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
