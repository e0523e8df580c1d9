"""The training stage with its settings: tokens of the source's rows, one fine-tune, its result in the sink."""

from __future__ import annotations

import shutil
from functools import cached_property
from typing import TYPE_CHECKING, Any

from connectors import storage
from curate.runtime.events import say
from curate.runtime.output import claim, read_recipe
from curate.runtime.tokens import TokenRows, make_tokens
from curate.runtime.train import TrainSpec, resolved, train
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
        done = train(spec, p.session, say_line)
        claim(recipe, spec.recipe, place)  # not before: settings that fail must not bar the place to better ones
        for file in storage.list_files(done["result"]):
            with storage.open_read(file.url) as source, storage.atomic_writer(storage.join(place, file.name)) as target:
                shutil.copyfileobj(source, target, 1 << 20)
        return done, place


def say_line(line: dict[str, Any]) -> None:
    """A line of the log of a training, for a person."""
    rate = line["tokens"] / max(line["seconds"], 1e-9)
    left = line["seconds"] / line["step"] * (line["of"] - line["step"])
    say(
        f"train: {line['step']:,}/{line['of']:,} steps",
        loss=f"{line['loss']:.4f}",
        rate=f"{rate:.0f} tokens/s",
        left=f"{left:.0f}s",
    )
