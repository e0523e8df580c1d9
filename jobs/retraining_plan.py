"""The plan of a sweep: arms and trainings, what is done already, what the rest will cost."""

from __future__ import annotations

import numpy as np

from curate.runtime.plan import duration, sample_chunks
from curate.runtime.select import file_spans
from curate.runtime.sweep import slots
from curate.runtime.sweep_plan import Cost, asked, training_cost
from curate.runtime.train import finished
from curate.scoring.registry import make_scorers
from curate.training.arms import Table, make_table, ranking_columns
from jobs.retraining import Retraining


def plan(retraining: Retraining) -> str:
    """As text; trains for a few steps to see how fast that is, and makes nothing but concepts.

    Where the rows are scored, the arms are those that will be, and the trainings that are done are left out. Else the
    arms are made over random scores, which have as many rows; how many of them agree is then not known.
    """
    r, p = retraining, retraining.given
    place = p.scores_place
    scored = bool(place.parts()) and not place.remaining(p.manifest)
    table = r.table if scored else _stand_in(r)
    todo = [t for t in table.trainings.values() if not scored or finished(r.spec(t.keep, t.seed)) is None]
    room = slots(p.session, r.training.spec.workers, r.sweep.at_once)
    lines = [
        ("arms", f"{len(table.arms):,} of {len(table.columns)} score column(s): {', '.join(table.columns)}"),
        ("trainings", f"{len(table.trainings):,}, {len(table.trainings) - len(todo):,} of them done already"),
    ]
    if todo:
        sampled = sample_chunks(p.reader, p.manifest, p.config.seed)
        rows = [t.rows for t in todo]
        lines += _told(
            training_cost(p.model, r.training.spec, sampled, rows, p.session, room.at_once), room.accelerator
        )
    models = len(table.trainings) + int(r.sweep.base)
    for a in asked(r.evaluators):
        told = [f"{a.candidates:,} likelihoods"] if a.candidates else []
        told += [f"{a.prompts:,} answers of at most {a.new_tokens:,} tokens"] if a.prompts else []
        lines.append((a.label, f"{' and '.join(told) or 'nothing'} of each of {models:,} models"))
    width = max(len(name) for name, _ in lines)
    text = "\n".join(f"{name:<{width}}  {value}" for name, value in lines)
    return text if scored else f"{text}\nnot scored yet: `curate plan` says what the scores cost"


def _stand_in(r: Retraining) -> Table:
    """The arms over random scores of all rows."""
    p = r.given
    influence = p.influence.plan()
    headers = influence.headers() if influence else {}
    names = [c for s in make_scorers(p.scorer_options, p.concept_list, test_vectors=headers) for c in s.columns()]
    total = max((b for _, b in file_spans(p.manifest).values()), default=0)
    rng = np.random.default_rng(p.config.seed)
    return make_table({name: rng.random(total) for name in ranking_columns(names, r.sweep.columns)}, r.sweep)


def _told(cost: Cost, accelerator: str | None) -> list[tuple[str, str]]:
    where = f" on {accelerator}" if accelerator else ""
    return [
        ("rows", f"{cost.rows:,} in all trainings"),
        ("tokens", f"{cost.tokens:,.0f}, epochs counted"),
        ("FLOPs", f"{cost.flops:.3g}"),
        ("measured", f"{cost.step_rate:,.0f} tokens/s of one training{where}"),
        ("training", f"{duration(cost.seconds)} with {cost.at_once} at once, and what starting each takes"),
    ]
