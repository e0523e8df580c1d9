"""The training stage with its settings: tokens of the source's rows, one fine-tune, its result in the sink."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from connectors import storage
from curate.runtime import metrics
from curate.runtime.events import say
from curate.runtime.output import claim, read_recipe
from curate.runtime.tokens import TokenRows, make_tokens
from curate.runtime.train import TrainSpec, resolved, train
from curate.training.log import read_log, share_of_peak
from curate.training.spec import TrainingSpec

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline


class Training:
    """Fine-tunes of a pipeline's model on its source's rows."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline

    @cached_property
    def spec(self) -> TrainingSpec:
        return resolved(self.pipeline.config.training, self.pipeline.session)

    @cached_property
    def tokens(self) -> TokenRows:
        """The tokenised rows of this run."""
        p = self.pipeline
        bad = p.config.source.max_bad_fraction
        rows, result = make_tokens(p.store, p.corpus, p.reader, p.manifest, p.session, bad)
        p.timed("tokens", result)
        return rows

    def train(self) -> tuple[dict[str, Any], str]:
        """Fine-tune on all rows of the run; returns what done.json holds, and the place of the result in the sink.

        Raises:
            RecipeError: the sink holds the result of another training.
        """
        p = self.pipeline
        spec = TrainSpec(p.store, self.spec, p.model, p.identity, self.tokens)
        place = storage.join(p.sink, self.spec.product)
        recipe = storage.join(place, "recipe.json")
        if (stored := read_recipe(recipe, place)) is not None:
            spec.recipe.refuse_other(stored, place)
        storage.check_writable(place)
        lines = _Lines(read_log(spec.url))
        done = train(spec, p.session, lines)
        lines.count(read_log(spec.url)[-1])
        claim(recipe, spec.recipe, place)  # not before: settings that fail must not bar the place to better ones
        for file in storage.list_files(done["result"]):
            with storage.open_read(file.url) as source, storage.atomic_writer(storage.join(place, file.name)) as target:
                shutil.copyfileobj(source, target, 1 << 20)
        return done, place


class _Lines:
    """Lines of the log of a training: said to a person, and what is new since the last one counted for the metrics.
    `before`: those that were there already."""

    def __init__(self, before: Sequence[Mapping[str, Any]]) -> None:
        self._counted: Mapping[str, Any] = before[-1] if before else {"rows": 0, "tokens": 0, "flops": 0.0}

    def __call__(self, line: Mapping[str, Any]) -> None:
        self.count(line)
        rate = line["tokens"] / max(line["seconds"], 1e-9)
        left = line["seconds"] / line["step"] * (line["of"] - line["step"])
        say(
            f"train: {line['step']:,}/{line['of']:,} steps",
            loss=f"{line['loss']:.4f}",
            rate=f"{rate:.0f} tokens/s",
            left=f"{left:.0f}s",
            **share_of_peak([line]),
        )

    def count(self, line: Mapping[str, Any]) -> None:
        for name in ("rows", "tokens", "flops"):
            metrics.count(f"curate_{name}", line[name] - self._counted[name], "train")
        if line["peak"] is not None:
            metrics.level("curate_share_of_peak", line["flops"] / max(line["seconds"], 1e-9) / line["peak"], "train")
        self._counted = line
