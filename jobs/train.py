"""Fine-tune the configured model on the rows of the source; the adapter (or model) lands in the sink."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.app import entry
from jobs.training import Training

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline


def stages(pipeline: Pipeline) -> None:
    training = Training(pipeline)
    done, place = training.train()
    print(
        f"{done['rows']:,} rows, {done['steps']:,} steps, {done['tokens']:,} tokens in {done['seconds']:.0f} s: "
        f"loss {done['first_loss']:.4f} → {done['final_loss']:.4f}\n{training.spec.product}: {place}"
    )


main = entry("train", stages)

if __name__ == "__main__":
    main()
