"""Train sparse autoencoders on the finetuned model's activations, insert each, and choose a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.app import entry
from jobs.sae_training import SaeTraining

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline


def stages(pipeline: Pipeline) -> None:
    training = SaeTraining(pipeline)
    training.check()
    print(training.run())


main = entry("sae", stages)

if __name__ == "__main__":
    main()
