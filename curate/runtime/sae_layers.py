"""SAEs inserted layer by layer: the model asked before and after, states of held-out rows, the sweep's numbers.

In: a model, the URLs of its SAEs by layer, evaluators, held-out rows. Out: a LayerSweep. What a model said with an SAE
in it is kept in the store as every evaluation is, so that a killed run goes on with the layers that are missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from curate.concepts import sae_files
from curate.corpus.example import Example
from curate.corpus.render import Rendered
from curate.corpus.units import Manifest, Unit
from curate.errors import ConfigError
from curate.evaluation.base import Evaluator, Measure
from curate.evaluation.judge import Judge
from curate.evaluation.sae_insertion import LayerResult, LayerSweep, Quality, QualitySums, choose, drop, pick_metric
from curate.models.batching import collate, token_batches
from curate.models.load import ModelSpec, load_model
from curate.models.pooling import span_mask
from curate.models.tap import LayerTap
from curate.runtime.activation_store import chance
from curate.runtime.crew import Crew
from curate.runtime.evaluate import EvaluatedModel, EvaluateSpec, evaluate, load_items
from curate.runtime.events import say
from curate.runtime.reader import ReaderSpec, read_pieces
from curate.runtime.session import Session
from curate.training.log import read_log
from curate.training.sae_settings import SaeSettings, middle_half

BEFORE = "before"
SAE_BYTES = 2 << 30  # of SAEs that are in an actor's memory at once


@dataclass(frozen=True)
class HeldOut:
    """Rows that no SAE has learnt from."""

    examples: tuple[Example, ...]
    rendered: tuple[Rendered, ...]


def held_out(reader: ReaderSpec, manifest: Manifest, settings: SaeSettings) -> HeldOut:
    """At most `held_out_rows` of the rows that were left out, by chance.

    Raises:
        ConfigError: none was left out, or none can be used.
    """
    found: list[tuple[float, int, int]] = []
    for number, unit in enumerate(manifest.units):
        rows = np.arange(unit.start, unit.stop)
        drawn = chance(unit.key, rows, settings.seed)
        found += [(float(drawn[i]), number, int(rows[i])) for i in np.flatnonzero(drawn < settings.held_out)]
        found = sorted(found)[: settings.held_out_rows]
    if not found:
        raise ConfigError(
            f"sae.held_out={settings.held_out:g} leaves out none of {manifest.rows} rows; raise it, or give more rows"
        )
    chosen: dict[int, list[int]] = {}
    for _, number, row in found:
        chosen.setdefault(number, []).append(row)
    pieces: list[tuple[Unit, list[tuple[int, int]]]] = [
        (manifest.units[number], [(row, row + 1) for row in sorted(chosen[number])]) for number in sorted(chosen)
    ]
    examples: list[Example] = []
    rendered: list[Rendered] = []
    for chunk in read_pieces(pieces, reader):
        examples += chunk.examples
        rendered += chunk.rendered
    if not examples:
        raise ConfigError(f"none of {len(found)} held-out rows can be used; raise sae.held_out or sae.held_out_rows")
    return HeldOut(tuple(examples), tuple(rendered))


def sweep_layers(
    spec: EvaluateSpec,
    model: ModelSpec,
    saes: Mapping[int, str],
    trained: Mapping[int, Mapping[str, Any]],
    evaluators: Mapping[str, Evaluator],
    judge: Judge | None,
    rows: HeldOut,
    settings: SaeSettings,
    blocks: int,
    facts: Mapping[str, Any],
    session: Session,
) -> LayerSweep:
    """The drop of the deciding metric at every layer, and the choice.

    Args:
        saes, trained: URL and done.json of each layer's SAE. facts: for the page.

    Raises:
        ConfigError: no metric to decide by, or no item that could be asked.
    """
    label, metric = pick_metric(evaluators, settings.metric)
    quality = measure(model, saes, rows, settings.tokens, session)
    asked = [EvaluatedModel(BEFORE, model=model)]
    asked += [EvaluatedModel(f"layer {layer}", model=model, sae=url) for layer, url in saes.items()]
    found = {(e.model, e.evaluator): e for e in evaluate(spec, asked, evaluators, judge, session)}
    first = found[BEFORE, label]
    before = load_items(first.url)
    results = []
    for layer, url in saes.items():
        one = found[f"layer {layer}", label]
        fall = drop(before, load_items(one.url), metric)
        curve = tuple((int(line["tokens"]), float(line["error"])) for line in read_log(url))
        at = metric.name
        results.append(
            LayerResult(layer, url, first.measures[at], one.measures[at], fall, quality[layer], trained[layer], curve)
        )
    middle = middle_half(blocks)
    chosen, best = choose(results, middle)
    if chosen not in middle:
        say(f"WARNING: none of the layers lies in the middle half {middle[0]}..{middle[-1]}; the best of all is chosen")
    return LayerSweep(label, metric, (middle[0], middle[-1]), tuple(results), chosen, best, facts)


def measure(
    model: ModelSpec, saes: Mapping[int, str], rows: HeldOut, tokens: str, session: Session
) -> dict[int, Quality]:
    """How much of held-out states each SAE keeps: one forward pass for as many layers as fit an actor's memory."""
    groups: list[dict[int, str]] = [{}]
    size = 0
    for layer, url in saes.items():
        sae = sae_files.load(url)
        own = 8 * sae.latents * sae.width
        if groups[-1] and size + own > SAE_BYTES:
            groups.append({})
            size = 0
        groups[-1][layer] = url
        size += own
    make = partial(_Measurer, model, session.token_budget, max(1, round(session.scorers.cpus)))
    items = [(group, rows.rendered, tokens) for group in groups]
    out: dict[int, Quality] = {}
    with Crew(make, session.scorers) as crew:
        for some in crew.map(_measure, items):
            out |= some
    return out


class _Measurer:
    """State of an actor: the model."""

    def __init__(self, model: ModelSpec, token_budget: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.model, self.token_budget = load_model(model), token_budget


def _measure(state: _Measurer, item: tuple[Mapping[int, str], Sequence[Rendered], str]) -> dict[int, Quality]:
    urls, rendered, tokens = item
    device = state.model.device
    sums = {layer: QualitySums(sae_files.load(url).to(device)) for layer, url in urls.items()}
    tap = LayerTap(state.model, list(urls))
    for batch in token_batches([len(r.input_ids) for r in rendered], state.token_budget):
        picked = [rendered[i] for i in batch]
        ids, mask = collate([r.input_ids for r in picked], 0, device=device)
        wanted = mask.bool()
        if tokens == "response":
            wanted = span_mask([r.start for r in picked], [r.stop for r in picked], ids.shape[1], device)
        for layer, states in tap(ids).items():
            sums[layer].add(states[wanted])
    return {layer: s.result() for layer, s in sums.items()}


def numbers(sweep: LayerSweep) -> dict[str, Any]:
    """The sweep as JSON values, without the curves, which stand in the SAEs' logs."""

    def plain(m: Measure) -> dict[str, Any]:
        return asdict(m)

    return {
        "evaluator": sweep.evaluator,
        "metric": asdict(sweep.metric),
        "middle": list(sweep.middle),
        "chosen": sweep.chosen,
        "best": sweep.best,
        **sweep.facts,
        "layers": [
            {
                "layer": r.layer,
                "url": r.url,
                **asdict(r.quality),
                "before": plain(r.before),
                "after": plain(r.after),
                "drop": plain(r.drop),
                "trained": dict(r.trained),
            }
            for r in sweep.layers
        ],
    }
