"""One SAE's training: the loop over batches of states, in this process.

In: steps (batches of states, see `Steps`), SaeSettings, a URL. Out, below the URL: checkpoints/ while it runs,
log.jsonl, the SAE's files, and done.json last. A run that finds a whole checkpoint goes on from it, to the same weights
as if nothing had happened. Knows no corpus and no cluster.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import safetensors.torch
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from connectors import storage
from curate.concepts import sae_files
from curate.errors import TrainingError
from curate.training import checkpoints, sae_loss
from curate.training.activation_batches import ActivationBatches
from curate.training.log import TrainingLog
from curate.training.sae_module import Autoencoder, Beginning, Pass, begin
from curate.training.sae_settings import SaeSettings

DONE, CHECKPOINTS, STATE = "done.json", "checkpoints", "state.safetensors"
SAMPLE = 16384  # states that the beginning is learnt from
# Summed since the last line of the log: loss, relative error, squared error, squared distance from the centre, active
# latents, task loss; and what they are of: tokens, tokens with a task loss.
_SUMS = ("loss", "error", "squared", "distance", "active", "task", "tokens", "task_tokens")


@dataclass(frozen=True)
class Micro:
    """A part of a step that is worked on at once.

    `x`: states. `wanted`: which of them are learnt from (None: all). `task`: the summed loss of a model that goes on
    with the reconstructions of all of them, over `task_tokens` tokens.
    """

    x: Float[Tensor, "n d"]
    wanted: Bool[Tensor, " n"] | None = None
    task: Callable[[Float[Tensor, "n d"]], Float[Tensor, ""]] | None = None
    task_tokens: int = 0


class Steps(Protocol):
    """Where batches come from. `tokens`: of one epoch."""

    @property
    def steps(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    def sample(self) -> Float[Tensor, "n d"]:
        """States that stand for all, for the beginning."""

    def after(self, first: int) -> Iterator[Sequence[Micro]]:
        """Step `first` (from 0) and those after it; the same whenever they are asked for."""


class StoredSteps:
    """Steps of stored activations; each is one part."""

    def __init__(self, batches: ActivationBatches) -> None:
        self.batches, self.steps, self.tokens = batches, batches.steps, batches.tokens

    def sample(self) -> Float[Tensor, "n d"]:
        return self.batches.sample()

    def after(self, first: int) -> Iterator[Sequence[Micro]]:
        for x in self.batches.batches(first):
            yield [Micro(x)]


@dataclass(frozen=True)
class SaeIdentity:
    """What an SAE is called and where it belongs: see concepts.sae.SAE. `meta`: what it is made from."""

    name: str
    layer: int
    model: Mapping[str, Any]
    meta: Mapping[str, Any]


def finished(url: str) -> dict[str, Any] | None:
    """What done.json of the SAE at `url` holds, or None where it is not done."""
    where = storage.join(url, DONE)
    return json.loads(storage.read_text(where)) if storage.exists(where) else None


def train_sae(
    settings: SaeSettings, steps: Steps, identity: SaeIdentity, url: str, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Train, or go on training, or find it done. Deterministic in `settings.seed` on one kind of machine.

    Returns:
        What done.json holds: layer, steps, tokens (seen in all), seconds, and of the last line of the log loss, error,
        explained_variance, l0, dead.

    Raises:
        TrainingError: no tokens; states that are not finite; a loss that is no number, names the step.
    """
    done = finished(url)
    if done is not None:
        return done
    return _Run(settings, steps, identity, url, torch.device(device)).go()


class _Run:
    def __init__(
        self, settings: SaeSettings, steps: Steps, identity: SaeIdentity, url: str, device: torch.device
    ) -> None:
        if settings.dtype == "auto":
            raise TrainingError("sae.dtype is 'auto' where it must be decided; give float32 or bfloat16")
        self.settings, self.steps, self.identity, self.url, self.device = settings, steps, identity, url, device
        self.checkpoints = storage.join(url, CHECKPOINTS)
        self.dead_after = settings.dead_after or min(10_000_000, max(1, steps.tokens // 4))
        self.warm = max(1, round(settings.warmup * steps.steps))
        self.cool = max(1, round(settings.decay * steps.steps))

    def go(self) -> dict[str, Any]:
        s = self.settings
        resumed = checkpoints.newest(self.checkpoints)
        state = self._load(resumed) if resumed is not None else None
        first = resumed or 0
        if state is None:
            beginning = begin(self.steps.sample()[:SAMPLE], s, self.identity.layer)
        else:
            beginning = Beginning(state["centre"], float(state["scale"]))
        generator = torch.Generator().manual_seed(s.seed * 1009 + self.identity.layer)
        self.module = Autoencoder(s, beginning, generator).to(self.device)
        self.optimizer = self._optimizer()
        self.unused = torch.zeros(s.latents, dtype=torch.int64, device=self.device)
        self.sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=self.device)
        if state is not None:
            self._restore(state)
        self.log = TrainingLog(self.url, first)
        self.before, self.began = self.log.seconds, time.perf_counter()
        seen = int(self.log.lines[-1]["tokens"]) if self.log.lines else 0
        self.seen = seen + int(self.sums[_SUMS.index("tokens")])
        for number, parts in enumerate(self.steps.after(first), start=first):
            self._step(number, parts)
            step = number + 1
            last = step == self.steps.steps
            if step % s.log_every == 0 or step == 1 or last:
                self._line(step)
            if step % s.save_every == 0 and not last:
                self._save(step)
        return self._finish()

    def _optimizer(self) -> torch.optim.Optimizer:
        s = self.settings
        kind = torch.optim.AdamW if s.optimizer == "adamw" else torch.optim.Adam
        return kind(self.module.parameters(), lr=s.learning_rate, weight_decay=s.weight_decay)

    def _precision(self) -> AbstractContextManager:
        if self.settings.dtype != "bfloat16":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    # one step

    def _step(self, number: int, parts: Sequence[Micro]) -> None:
        s, module = self.settings, self.module
        tokens = sum(len(p.x) if p.wanted is None else int(p.wanted.sum()) for p in parts)
        task_tokens = sum(p.task_tokens for p in parts)
        dead = self.unused >= self.dead_after
        fired = torch.zeros_like(dead)
        ramp = min(1.0, (number + 1) / self.warm)
        rate = s.learning_rate * ramp * min(1.0, (self.steps.steps - number) / self.cool)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        for part in parts:
            fired |= self._part(part, max(tokens, 1), max(task_tokens, 1), dead, ramp)
        torch.nn.utils.clip_grad_norm_(module.parameters(), s.max_grad_norm or math.inf)
        module.project_gradient()
        self.optimizer.step()
        module.normalise_decoder()
        self.unused = torch.where(fired, 0, self.unused + tokens)
        self.seen += tokens

    def _part(
        self, part: Micro, tokens: int, task_tokens: int, dead: Bool[Tensor, " h"], ramp: float
    ) -> Bool[Tensor, " h"]:
        """Gradients of a part of a step that has so many tokens, and so many with a task loss; which latents fired."""
        s, module = self.settings, self.module
        x = part.x.to(self.device, torch.float32) * module.beginning.scale
        with self._precision():
            out = module(x)
        task = None
        if part.task is not None:
            task = part.task(out.rebuilt / module.beginning.scale)
        if part.wanted is not None:
            x, out = x[part.wanted], _chosen(out, part.wanted)
        share = len(x) / tokens
        loss = share * self._terms(x, out, dead, ramp).mean() if len(x) else x.new_zeros(())
        if s.orthogonality:
            r = out.values if out.indices is None else sae_loss.spread_out(out.values, out.indices, s.latents)
            loss = loss + share * s.orthogonality * sae_loss.orthogonality(r)
        if task is not None:
            loss = loss + s.task * task / task_tokens
        loss.backward()
        with torch.no_grad():
            squared = (x - out.rebuilt).square().sum(-1)
            of = sae_loss.spread(x, module.centre, s.error, x.shape[1])
            told = (
                loss * tokens, (squared / of).sum(), squared.sum(),
                (x - module.centre).square().sum(), out.active().sum(), task if task is not None else 0.0,
                len(x), part.task_tokens,
            )  # fmt: skip
            self.sums += torch.stack([torch.as_tensor(t, dtype=torch.float64, device=self.device) for t in told])
            return out.fired(s.latents)

    def _terms(self, x: Float[Tensor, "n d"], out: Pass, dead: Tensor, ramp: float) -> Float[Tensor, " n"]:
        s, module = self.settings, self.module
        of = sae_loss.spread(x, module.centre, s.error, x.shape[1])
        loss = sae_loss.reconstruction(x, out.rebuilt, of)
        if s.activation == "relu" and s.sparsity_weight:
            loss = loss + ramp * s.sparsity_weight * sae_loss.l1(out.values, of)
        if s.activation == "jumprelu" and s.sparsity_weight:
            loss = loss + ramp * s.sparsity_weight * sae_loss.l0(out.pre, module.thresholds(), s.bandwidth)
        if s.auxiliary and bool(dead.any()):
            k = s.auxiliary_k or max(1, x.shape[1] // 2)
            loss = loss + s.auxiliary * sae_loss.auxiliary(x - out.rebuilt, out.pre, dead, k, module.w_dec)
        return loss

    # log, checkpoints, the end

    def _line(self, step: int) -> None:
        found = dict(zip(_SUMS, self.sums.tolist(), strict=True))
        n = max(found["tokens"], 1.0)
        if not all(math.isfinite(v) for v in found.values()):
            raise TrainingError(
                f"the loss of the SAE at layer {self.identity.layer} is no number any more (step {step} of "
                f"{self.steps.steps}): the training diverged, or activations are not finite. Lower "
                f"sae.learning_rate, raise sae.warmup, or set sae.dtype=float32"
            )
        line = {
            "step": step,
            "of": self.steps.steps,
            "loss": found["loss"] / n,
            "error": found["error"] / n,
            "explained_variance": 1 - found["squared"] / max(found["distance"], 1e-30),
            "l0": found["active"] / n,
            "dead": float((self.unused >= self.dead_after).float().mean()),
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "tokens": self.seen,
            "seconds": self.before + time.perf_counter() - self.began,
        }
        if found["task_tokens"]:
            line["task_loss"] = found["task"] / found["task_tokens"]
        self.log.add(line)
        self.sums.zero_()

    def _save(self, step: int) -> None:
        state = {name: p.detach() for name, p in self.module.named_parameters()}
        for name, p in self.module.named_parameters():
            for key, value in self.optimizer.state[p].items():
                state[f"{key}/{name}"] = torch.as_tensor(value)
        state |= {"unused": self.unused, "sums": self.sums, "centre": self.module.beginning.centre}
        state["scale"] = torch.tensor(self.module.beginning.scale, dtype=torch.float64)
        blob = safetensors.torch.save({name: t.cpu().contiguous() for name, t in state.items()})
        storage.write_atomic(storage.join(checkpoints.step_url(self.checkpoints, step), STATE), blob)
        self.log.write()
        checkpoints.complete(self.checkpoints, step, {STATE: len(blob)})

    def _load(self, step: int) -> dict[str, Tensor]:
        where = storage.join(checkpoints.step_url(self.checkpoints, step), STATE)
        return safetensors.torch.load(storage.read_bytes(where))

    def _restore(self, state: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self.module.named_parameters():
                p.copy_(state[name])
                moments = {key.rpartition("/")[0]: t for key, t in state.items() if key.endswith(f"/{name}")}
                self.optimizer.state[p] = {
                    key: t.clone() if key == "step" else t.to(self.device) for key, t in moments.items()
                }
        self.unused, self.sums = state["unused"].to(self.device), state["sums"].to(self.device)

    def _finish(self) -> dict[str, Any]:
        line = self.log.lines[-1]
        told = ("loss", "error", "explained_variance", "l0", "dead", "seconds", "tokens")
        done = {
            "layer": self.identity.layer,
            "steps": self.steps.steps,
            **{name: line[name] for name in told},
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
        }
        i = self.identity
        sae = self.module.to_sae(i.layer, i.name, i.model, {**i.meta, "training": done})
        sae_files.save(self.url, sae)
        self.log.write()
        storage.write_atomic(storage.join(self.url, DONE), json.dumps(done, indent=2) + "\n")
        checkpoints.remove(self.checkpoints)
        return done


def _chosen(out: Pass, wanted: Bool[Tensor, " n"]) -> Pass:
    indices = None if out.indices is None else out.indices[wanted]
    return Pass(out.rebuilt[wanted], out.pre[wanted], out.values[wanted], indices)
