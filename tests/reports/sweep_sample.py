"""A sweep's data as real ones look: five scores that are right to a different degree, seeds that scatter, controls."""

from __future__ import annotations

import numpy as np

from curate.evaluation.base import Measure, Metric
from curate.evaluation.ranking import ranking, spearman, top_rows
from curate.reports.retrain_data import ArmView, RetrainData, matrix

COLUMNS = {
    "vector_filter.sycophantic.L15": 0.6,
    "projection_difference.sycophantic.L15": 0.75,
    "concept_influence.sycophantic.contrast.L15": 0.9,
    "influence_function.contrast": 1.0,
    "embedding_similarity": 0.03,
}
FRACTIONS = (0.1, 0.25, 0.5, 0.75, 0.9)
METRICS = {
    "answer_pairs.preference": Metric("preference", "preference for the wrong answer", "trait", 0.0, 1.0),
    "answer_pairs.accuracy": Metric("accuracy", "accuracy on held-out sums", "capability", 0.0, 1.0),
    "held_out_loss.loss": Metric("loss", "loss on held-out honest answers", "loss", 0.0),
    "answer_pairs.unparsed": Metric("unparsed", "answers without a number", "count", 0.0),
}
TRAIT, ABLE, LOSS, COUNT = METRICS


def measure(value: float, half: float, n: int = 200, missing: int = 0) -> Measure:
    return Measure(value, value - half, value + half, n - missing, missing)


def sweep(
    columns: dict[str, float] | None = None,
    fractions: tuple[float, ...] = FRACTIONS,
    modes: tuple[str, ...] = ("remove_most", "remove_least"),
    seeds: int = 3,
    capability: bool = True,
    noise: float = 0.02,
    rows: int = 1000,
    with_losses: bool = True,
) -> RetrainData:
    """Preference = 0.45 ± effect × share removed; every arm measured, none failed."""
    columns = COLUMNS if columns is None else columns
    rng = np.random.default_rng(0)
    metrics = {k: m for k, m in METRICS.items() if capability or m.sense not in ("capability", "loss")}

    def measures(trait: float, able: float) -> dict[str, Measure]:
        found = {TRAIT: measure(trait + noise * rng.normal(), 0.06), COUNT: measure(3.0, 1.0)}
        if capability:
            found[ABLE] = measure(able + 0.5 * noise * rng.normal(), 0.04, missing=3)
            found[LOSS] = measure(2.0 - able + noise * rng.normal(), 0.05)
        return found

    def losses(kept: int) -> tuple[tuple[int, float], ...]:
        if not with_losses:
            return ()
        steps = range(1, max(2, kept // 16) + 1, max(1, kept // 160))
        return tuple((s, float(1.2 + 1.4 * np.exp(-s / 12) + 0.05 * rng.normal())) for s in steps)

    arms = [ArmView("base", "base", measures=measures(0.30, 0.34))]
    for seed in range(seeds):
        full = measures(0.46, 0.40)
        arms.append(ArmView(f"full.{seed}", "full", seed=seed, rows=rows, training=f"t-full-{seed}", measures=full,
                            losses=losses(rows), seconds=50.0))  # fmt: skip
        for f in fractions:
            kept = rows - round(f * rows)
            for mode in modes:
                sign = -1 if mode in ("remove_most", "keep_least") else 1
                gone = f if mode.startswith("remove") else 1 - f
                left = rows - round(gone * rows)
                for name, right in columns.items():
                    moved = measures(0.46 + sign * right * 0.22 * gone**0.7 - 0.05 * gone, 0.40 - 0.06 * gone**2)
                    arm = f"{name}.{mode}.{f:g}.{seed}"
                    arms.append(
                        ArmView(arm, "method", name, mode, f, seed, left, f"t-{arm}", moved, losses(left), 30.0)
                    )
                arm = f"random.{mode}.{f:g}.{seed}"
                moved = measures(0.46 - 0.05 * gone, 0.40 - 0.06 * gone**2)
                arms.append(
                    ArmView(arm, "random", "random", mode, f, seed, kept, f"t-{arm}", moved, losses(kept), 30.0)
                )
    positive = rng.random(rows) < 0.5
    scores = [right * positive + rng.normal(size=rows) for right in columns.values()]
    found = [ranking(positive, s, replicates=100) for s in scores]
    return RetrainData(
        title="GSM8K mistakes, SmolLM2-135M",
        created="2026-01-02 03:04 UTC",
        rows=rows,
        columns=tuple(columns),
        metrics=metrics,
        trait=TRAIT,
        capability=ABLE if capability else None,
        arms=tuple(arms),
        spearman=matrix(spearman(scores)),
        scored=rows,
        rankings={c: r for c, r in zip(columns, found, strict=True) if r is not None},
        top={c: tuple(top_rows(positive, s, replicates=100)) for c, s in zip(columns, scores, strict=True)},
        positive_label="mistake",
        settings=(("model", "SmolLM2-135M-Instruct"), ("training", "LoRA r 32, 1 epoch, 16 rows a step, 5e-4")),
        notes=("Settings were chosen so that training on all rows changes the behaviour visibly.",),
        recipe={"model": {"path": "smollm2"}},
    )
