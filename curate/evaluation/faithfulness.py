"""Faithfulness of a ranking of latents: what the model loses without its first k, and what it keeps with them alone.

In: a model, an SAE that is spliced into it, test items and orders of latents. Out: necessity (the first k latents are
zeroed) and sufficiency (all others are) for each order, k and item (METHODS §5, paper B §5.4). Does not know where an
order comes from.

Everything is measured where the model is about to say its answer: at the token before the response's first one. The
"correct token" is that first one. Latents are masked at every token of the prompt. Blocks below the SAE run once an
item; every mask is a row of a batch that runs the blocks above it, and masks that are the same to an item's active
latents are one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from curate.concepts.sae import SAE, Sparse, decode, encode
from curate.corpus.render import Rendered
from curate.errors import ConfigError, ModelError
from curate.evaluation.masking import BASE, MEASURES, MODES, Faithfulness, Mode
from curate.models.splice import downstream
from curate.models.tap import LayerTap, head_logits

KS = (10, 25, 50, 75, 100, 125, 150, 175, 200)

Order = Int[np.ndarray, "... m"]  # latents, first to last; [draws, m] where an order is drawn several times


@dataclass(frozen=True)
class Question:
    """A test item: its right answer rendered, and what its prediction is.

    options: the first response token of every option, the right one's at `right`: the prediction is the likeliest of
    them. None: it is the likeliest token of the vocabulary.
    """

    rendered: Rendered
    options: tuple[int, ...] | None = None
    right: int = 0

    @property
    def correct(self) -> int:
        """The correct token."""
        return self.rendered.input_ids[self.rendered.start]


def question(options: Sequence[Rendered], right: int) -> Question:
    """A multiple-choice item from its options, each rendered as the answer to the same prompt.

    Raises:
        ConfigError: `right` is none of them; their prompts differ; two of them begin with the same token, so that
            the first token cannot tell them apart.
    """
    if not 0 <= right < len(options):
        raise ConfigError(f"a test item has {len(options)} options, and number {right} is said to be right")
    prompts = {tuple(r.input_ids[: r.start]) for r in options}
    if len(prompts) != 1:
        raise ConfigError("the options of a test item follow different prompts; render each with the same turns")
    first = [r.input_ids[r.start] for r in options]
    if len(set(first)) < len(first):
        raise ConfigError(
            "two options of a test item begin with the same token; ask for the option's letter instead of its text"
        )
    return Question(options[right], tuple(first), right)


@torch.no_grad()
def faithfulness(
    model: PreTrainedModel,
    sae: SAE,
    items: Sequence[Question | Rendered],
    orders: Mapping[str, Sequence[Order]],
    ks: Sequence[int] = KS,
    token_budget: int = 4096,
) -> Faithfulness:
    """Necessity and sufficiency of each of `orders`, which hold one order for each item.

    Args:
        ks: how many latents; more than the SAE has are all of it.
        token_budget: tokens of a batch of masks.

    Raises:
        ConfigError: no items, a k below 0; an order for each is missing; an order is too short for the largest k,
            repeats a latent or names one that the SAE lacks; an item without a prompt.
        ModelError: logits under a mask are not finite.
    """
    asked = [q if isinstance(q, Question) else Question(q) for q in items]
    ks = tuple(ks)
    if not asked:
        raise ConfigError("there are no test items, so faithfulness cannot be measured; give at least one")
    if not ks or min(ks) < 0:
        raise ConfigError(f"the numbers of latents to mask are {list(ks)}; give at least one, none below 0")
    checked = {m: [_check(o, m, i, max(ks), sae) for i, o in enumerate(of)] for m, of in orders.items()}
    for method, of in checked.items():
        if len(of) != len(asked):
            raise ConfigError(f"{method!r} orders the latents of {len(of)} items, but there are {len(asked)}")
    tap = LayerTap(model, [sae.layer])
    values: dict[tuple[str, Mode], dict[str, np.ndarray]] = {
        (m, mode): {measure: np.empty((len(ks), len(asked))) for measure in MEASURES} for m in checked for mode in MODES
    }
    base = {name: np.empty(len(asked)) for name in BASE}
    for i, q in enumerate(asked):
        state, sparse = active_latents(tap, sae, q.rendered, i)
        cells = [(m, mode, j) for m in checked for mode in MODES for j in range(len(ks))]
        tops = [[drawn[: ks[j]] for drawn in checked[m][i]] for m, _, j in cells]
        keep = _keep_masks(tops, [mode for _, mode, _ in cells], sae.latents)
        outcomes = _masked(model, sae, q, sparse, keep, token_budget)
        plain = _outcomes(model, q, downstream(model, sae.layer, state[None]))[0]
        spliced = outcomes[-1]
        if not (np.isfinite(outcomes).all() and np.isfinite(plain).all()):
            raise ModelError(
                f"logits of test item {i} are not finite with the SAE {sae.name!r} in layer {sae.layer}: its weights "
                f"are too large for the model's states, or the model's precision is too low"
            )
        for name, value in zip(BASE, [*plain[:3], *spliced[:3], plain[3] == spliced[3]], strict=True):
            base[name][i] = value
        at = 0
        for (m, mode, j), drawn in zip(cells, tops, strict=True):
            right, logit, nll, said = outcomes[at : at + len(drawn)].T
            at += len(drawn)
            flip = said != spliced[3]
            found = (logit - spliced[1], nll - spliced[2], flip, ~flip, right, logit, nll)
            for measure, of_draws in zip(MEASURES, found, strict=True):
                values[m, mode][measure][j, i] = of_draws.mean()
    return Faithfulness(ks, tuple(checked), values, base)


@torch.no_grad()
def active_latents(
    tap: LayerTap, sae: SAE, rendered: Rendered, item: int = 0
) -> tuple[Float[Tensor, "tokens d"], Sparse]:
    """The SAE's layer and its latents at every token of the prompt; `item` names it in an error.

    Raises:
        ConfigError: there is no prompt or no answer.
    """
    ids = rendered.input_ids[: rendered.start]
    if not ids or len(rendered.input_ids) <= rendered.start:
        raise ConfigError(f"test item {item} has no prompt or no answer; an answer is predicted from a prompt")
    state = tap(torch.tensor([ids], device=tap.model.device))[sae.layer][0]
    return state, encode(sae, state)


def _check(order: Order, method: str, item: int, most: int, sae: SAE) -> Int[np.ndarray, "draws m"]:
    drawn = np.atleast_2d(np.asarray(order, dtype=np.int64))
    least = min(most, sae.latents)
    if not len(drawn) or drawn.shape[1] < least:
        raise ConfigError(f"{method!r} orders {drawn.shape[1]} latents of item {item}; k goes up to {least}")
    if drawn.size and (drawn.min() < 0 or drawn.max() >= sae.latents):
        raise ConfigError(f"{method!r} names a latent of item {item} that is not in 0..{sae.latents - 1}")
    if any(len(np.unique(row)) < len(row) for row in drawn):
        raise ConfigError(f"{method!r} names a latent of item {item} twice; an order holds each latent once")
    return drawn


def _keep_masks(
    tops: Sequence[Sequence[np.ndarray]], modes: Sequence[Mode], latents: int
) -> Bool[np.ndarray, "masks h"]:
    """True where a latent stays, a row for each draw of each top; one more that keeps everything."""
    out = []
    for draws, mode in zip(tops, modes, strict=True):
        for top in draws:
            row = np.full(latents, mode == "necessity")
            row[top] = mode == "sufficiency"
            out.append(row)
    return np.stack([*out, np.ones(latents, dtype=bool)])


def _masked(
    model: PreTrainedModel, sae: SAE, q: Question, sparse: Sparse, keep: Bool[np.ndarray, "m h"], token_budget: int
) -> Float[np.ndarray, "m 4"]:
    """(right, logit, nll, prediction) under each mask. Masks that agree on the active latents are computed once."""
    active = np.unique(sparse.indices[sparse.active].cpu().numpy())
    _, first, which = np.unique(keep[:, active], axis=0, return_index=True, return_inverse=True)
    distinct = torch.from_numpy(keep[first]).to(sparse.values.device)
    tokens, size = sparse.values.shape
    out = []
    for masks in distinct.split(max(1, token_budget // tokens)):
        kept = torch.where(masks[:, sparse.indices], sparse.values, 0.0).reshape(-1, size)
        x = decode(sae, replace(_again(sparse, len(masks)), values=kept)).reshape(len(masks), tokens, -1)
        out.append(_outcomes(model, q, downstream(model, sae.layer, x.to(model.dtype))))
    return np.concatenate(out)[which.reshape(-1)]


def _again(sparse: Sparse, times: int) -> Sparse:
    """The same states `times` times, one after the other."""

    def again(t: Tensor) -> Tensor:
        return t.repeat(times, 1)

    mean, gain = (None if t is None else again(t) for t in (sparse.mean, sparse.gain))
    return Sparse(again(sparse.values), again(sparse.indices), mean, gain)


def _outcomes(model: PreTrainedModel, q: Question, last: Float[Tensor, "m tokens d"]) -> Float[np.ndarray, "m 4"]:
    logits = head_logits(model, last[:, -1]).double()
    logit = logits[:, q.correct]
    nll = logits.logsumexp(-1) - logit
    if q.options is None:
        said, answer = logits.argmax(-1), q.correct
    else:
        said, answer = logits[:, list(q.options)].argmax(-1), q.right
    return torch.stack([(said == answer).double(), logit, nll, said.double()], dim=1).cpu().numpy()
