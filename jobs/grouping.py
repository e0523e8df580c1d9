"""From settings to groups of rows: scores and latent activations joined, whole groups taken, what was found told.

Writes <sink>/groups.{parquet,json,html} and, unless groups.write=false, <sink>/groups/curated and <sink>/groups/ledger.
Holds no mathematics.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from connectors import storage
from curate.corpus.recipe import Recipe
from curate.errors import ConfigError, near
from curate.reports.group_plots import thinned
from curate.reports.groups import GroupsPage, GroupView, build
from curate.runtime.latent_activations import LatentTable
from curate.runtime.latent_contexts import latent_contexts
from curate.runtime.select import Scores, SelectSpec, load_scores, score_columns, select
from curate.selection.groups import (
    Curve,
    GroupRule,
    Removal,
    Tally,
    coverage_curve,
    filter_groups,
    random_orders,
    row_curve,
    taken_at,
    tally,
)
from jobs.latent_rows import LatentActivations

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline

LABELS = 50  # that are told apart, the commonest
OTHER = "(other labels)"


class Grouping:
    """Of one run. What its steps share is computed once."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.settings = s = pipeline.config.groups
        self.rule = GroupRule(s.threshold, s.aggregate, s.mode, s.fraction, s.min_members, s.max_share)
        self.activations = LatentActivations(pipeline)

    def run(self) -> str:
        """Everything; what is printed.

        Raises:
            ConfigError: no scores, an unknown column, scores of another corpus; no group has members, or all of them
                together have too few. RecipeError: <sink>/groups holds what another rule removed.
        """
        sae, scores, bad = self.activations.sae, self.scores, self._bad  # can be wrong before anything is computed
        values, column = scores.columns[self.column], self.column
        names, labels = self._labels
        table, h = self.activations.table("max"), sae.latents
        found = tally(table.blocks, values, labels, names, h, self.rule)
        order = found.order(self.rule.mode)
        drawn = random_orders(len(order), self.settings.random_orders, self.pipeline.config.seed)
        first = taken_at(table.blocks, found, [order, *drawn], self.rule.threshold, len(values), h)
        removal = filter_groups(first[0], len(order), values, self.rule)
        if self.settings.write:
            self._write_shards(removal)
        scored = np.isfinite(values)
        curves = [coverage_curve(row, len(order), scored, bad) for row in first]
        baseline = row_curve(values, self.rule.mode == "remove_most", bad)
        return self._write(self._page(table, found, order, removal, curves, baseline, column), found, order)

    @cached_property
    def column(self) -> str:
        """The score column that ranks.

        Raises:
            ConfigError: there are no scores, or no such column.
        """
        place, wanted = self.pipeline.scores_place, self.settings.column or self.pipeline.config.selector.column
        columns = score_columns(place.parts())
        if not columns:
            raise ConfigError(f"there are no scores at {place.url}; run `curate score` with this sink first")
        if wanted is not None and wanted not in columns:
            raise ConfigError(f"groups.column is {wanted!r}, which was not scored{near(wanted, columns)}")
        return wanted or columns[0]

    @cached_property
    def scores(self) -> Scores:
        """The scores of the run's rows.

        Raises:
            ConfigError: they are of another corpus.
        """
        place, column = self.pipeline.scores_place, self.column
        stored = place.recipe()
        theirs = stored.fields.get("corpus", {}).get("digest") if stored else None
        mine = self.pipeline.corpus["digest"]
        if theirs != mine:
            raise ConfigError(
                f"the scores at {place.url} are of another corpus (digest {theirs}) than the source "
                f"{self.pipeline.config.source.name!r} (digest {mine}); give the source that was scored, or other "
                f"scores with sink.scores=…"
            )
        return load_scores(place, self.pipeline.manifest, [column], labels=True)

    @cached_property
    def _labels(self) -> tuple[list[str], np.ndarray]:
        """Names of the labels, commonest first, and each row's as an index into them (-1 = none)."""
        assert self.scores.labels is not None
        texts = self.scores.labels.to_pylist()
        counts = Counter(x for x in texts if x is not None)
        names = [name for name, _ in counts.most_common(LABELS)]
        positive = self.pipeline.config.source.positive_label
        if positive is not None and positive in counts and positive not in names:
            names[-1] = positive
        place = {name: i for i, name in enumerate(names)}
        rest = len(names) if len(counts) > len(names) else -1
        labels = np.array([-1 if x is None else place.get(x, rest) for x in texts], dtype=np.int64)
        return [*names, OTHER] if rest >= 0 else names, labels

    @cached_property
    def _bad(self) -> np.ndarray | None:
        """Which rows have source.positive_label; None where none is set.

        Raises:
            ConfigError: no row has it.
        """
        positive = self.pipeline.config.source.positive_label
        names, labels = self._labels
        if positive is None:
            return None
        if positive not in names:
            hint = near(positive, names) if names else "; no row has a label: name the column, source.columns.label=…"
            raise ConfigError(f"no row has the label {positive!r} (source.positive_label){hint}")
        return labels == names.index(positive)

    def _write_shards(self, removal: Removal) -> None:
        p, place = self.pipeline, storage.join(self.pipeline.sink, "groups")
        stored = p.scores_place.recipe()
        fields = {
            "scores": stored.digest if stored else None,
            "rows": p.manifest.rows,
            "column": self.column,
            "latents": self.activations.recipe(p.corpus, self.activations.reader).digest,
            "rule": asdict(self.rule),
        }
        shards, ledger = storage.join(place, "curated"), storage.join(place, "ledger")
        format_, root = p.manifest.format, p.source_urls[0]
        spec = SelectSpec(p.scores_place, format_, root, shards, ledger, self.column, self.rule.text())
        select(removal.decision, spec, Recipe("group_selection", fields), p.manifest, self.scores)

    def _page(
        self,
        table: LatentTable,
        found: Tally,
        order: np.ndarray,
        removal: Removal,
        curves: list[Curve],
        baseline: Curve,
        column: str,
    ) -> GroupsPage:
        p, s, sae = self.pipeline, self.settings, self.activations.sae
        shown = order[: s.shown]
        given = p.config.latents
        latents = [int(found.latents[g]) for g in shown]
        passages = latent_contexts(table, latents, given.contexts, given.around, p.manifest, self.activations.reader)
        new = np.diff(np.round(curves[0].covered * found.rows).astype(int), prepend=0)
        listed = []
        for k, g in enumerate(shown):
            mix = sorted(zip(found.names, found.by_label[g].tolist(), strict=True), key=lambda x: -x[1])
            mix = [(name, n) for name, n in mix if n]
            influence, members = float(found.influence[g]), int(found.members[g])
            taken = k < removal.taken
            listed.append(
                GroupView(latents[k], k + 1, influence, members, int(new[k]), taken, tuple(mix), tuple(passages[k]))
            )
        bad, removed = self._bad, np.isfinite(self.scores.columns[column]) & ~removal.decision.keep
        scored = np.isfinite(self.scores.columns[column])
        return GroupsPage(
            title=p.config.report.title,
            column=column,
            rule=self.rule.text(),
            threshold=self.rule.threshold,
            aggregate=self.rule.aggregate,
            most=self.rule.mode == "remove_most",
            fraction=self.rule.fraction,
            rows=found.rows,
            groups=len(order),
            removed_groups=removal.taken,
            removed_rows=removal.decision.n_dropped,
            removed_bad=None if bad is None else int((bad & removed).sum()),
            bad_label=p.config.source.positive_label,
            bad_rows=None if bad is None else int((bad & scored).sum()),
            base_rate=None if bad is None else float(bad[scored].mean()),
            labels=tuple(found.names),
            influence=curves[0],
            rows_curve=baseline,
            random=curves[1:],
            listed=listed,
            written=storage.join(p.sink, "groups") if s.write else None,
            facts=(
                ("SAE", f"{sae.name}: layer {sae.layer}, {sae.latents:,} latents, {sae.activation}"),
                ("model", str(self.activations.model[1]["name"])),
                ("tokens", "of the response" if given.tokens == "response" else "of prompt and response"),
                ("members", f"rows on which the latent's maximum is above {self.rule.threshold:g}"),
                ("left out", f"groups of fewer than {s.min_members} rows, or of more than {s.max_share:.0%} of them"),
            ),
        )

    def _write(self, page: GroupsPage, found: Tally, order: np.ndarray) -> str:
        url = storage.join(self.pipeline.sink, "groups")
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(1, len(order) + 1)
        columns: dict[str, Any] = {
            "latent": found.latents,
            "influence": found.influence,
            "members": found.members,
            "share": found.members / found.rows,
            "place": place,
            "removed": place <= page.removed_groups,
        }
        columns |= {f"members.{name}": found.by_label[:, c] for c, name in enumerate(found.names)}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({k: v[order] for k, v in columns.items()}), sink, compression="zstd")
        storage.write_atomic(f"{url}.parquet", sink.getvalue().to_pybytes())
        storage.write_atomic(f"{url}.html", build(page).encode())
        storage.write_atomic(f"{url}.json", json.dumps(_numbers(page), indent=2, ensure_ascii=False) + "\n")
        bad = "" if page.removed_bad is None else f", {page.removed_bad:,} of them {page.bad_label!r}"
        lines = [
            f"{page.groups:,} groups; the first {page.removed_groups} have {page.removed_rows:,} of {page.rows:,} "
            f"scored rows ({page.removed_rows / page.rows:.1%}){bad}"
        ]
        lines += [
            f"  latent {g.latent}: influence {g.influence:.4g}, {g.members} members"
            + "".join(f", {name} {n / g.members:.0%}" for name, n in g.labels[:3])
            for g in page.listed[:10]
        ]
        if page.written:
            lines.append(f"curated shards and ledger: {page.written}")
        return "\n".join([*lines, f"report: {url}.html", f"numbers: {url}.json, {url}.parquet"])


def _numbers(page: GroupsPage) -> dict[str, Any]:
    """As JSON values: curves at some hundred places, the mean of the random ones; NaN is null."""
    body = {k: v for k, v in vars(page).items() if k not in ("influence", "rows_curve", "random", "listed")}
    body["groups_shown"] = [asdict(g) for g in page.listed]
    body["curves"] = {"influence": _curve(page.influence), "rows": _curve(page.rows_curve)}
    if page.random:
        body["curves"]["random"] = [_curve(c) for c in page.random]
    return body


def _curve(curve: Curve) -> dict[str, list[float | None]]:
    at = thinned(len(curve.taken))
    return {name: [float(x) if np.isfinite(x) else None for x in value[at]] for name, value in vars(curve).items()}
