"""Find the SAE latents that tell two sets of rows apart; a table, a page, and the latents as concepts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from connectors import storage
from connectors.packages import expand
from curate.concepts import concept as concept_files
from curate.concepts.latent import decoder_concept
from curate.concepts.latent_file import file_facts
from curate.concepts.latent_rows import LatentRows
from curate.corpus.units import Manifest
from curate.errors import ConfigError, near
from curate.evaluation.separating import NEGATIVE, OTHER, POSITIVE, Separation, separate
from curate.reports.latents import LatentsPage, SeparatingLatent, build
from curate.reports.passages import Passage
from curate.runtime.latent_activations import LatentTable
from curate.runtime.latent_contexts import latent_contexts
from curate.runtime.manifest import SourceSpec, build_manifest
from curate.runtime.reader import ReaderSpec
from jobs.app import entry
from jobs.latent_rows import LatentActivations

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline

_ALPHA = 0.05


@dataclass(frozen=True)
class _Part:
    """Rows of one source: their activations, and the class of each (see `separate`)."""

    table: LatentTable
    classes: np.ndarray
    manifest: Manifest
    reader: ReaderSpec


def stages(pipeline: Pipeline) -> None:
    print(Separating(pipeline).run())


class Separating:
    """Of one run."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.settings = pipeline.config.latents
        self.activations = LatentActivations(pipeline)

    def run(self) -> str:
        """Writes concepts, <sink>/latents.{parquet,json,html}; what is printed.

        Raises:
            ConfigError: one of the sets is empty, or no latent fires often enough. ConceptError: the SAE.
        """
        sae, s = self.activations.sae, self.settings
        names, parts = self._sets()
        classes = np.concatenate([part.classes for part in parts])
        starts = np.cumsum([0, *(part.table.rows for part in parts)])

        def blocks() -> Iterator[LatentRows]:
            for start, part in zip(starts, parts, strict=False):
                for block in part.table.blocks():
                    yield replace(block, rows=block.rows + start)

        found = separate(blocks, classes, sae.latents, s.min_rows)
        order = found.order(s.direction)
        top = [int(j) for j in order[: s.top]]
        concepts = self._write_concepts(top, found, names)
        passages = self._passages(parts, top)
        listed = [_listed(found, j, concepts[j], passages[j]) for j in top]
        page = LatentsPage(
            self.pipeline.config.report.title,
            ((names[0], found.positives), (names[1], found.negatives)),
            s.statistic,
            int(found.tested.sum()),
            int((found.q[order] <= _ALPHA).sum()),
            listed,
            storage.join(self.pipeline.sink, "concepts"),
            self._facts(),
        )
        return self._write(page, found, order)

    def _sets(self) -> tuple[tuple[str, str], list[_Part]]:
        """The names of the two sets, and the rows with their classes."""
        s, p = self.settings, self.pipeline
        mine = self.activations.table(s.statistic)
        if s.against is None:
            wanted = s.positive_label if s.positive_label is not None else p.config.source.positive_label
            if wanted is None:
                raise ConfigError(
                    "two sets of rows are needed: give the label of the one (latents.positive_label, with "
                    "source.columns.label) or the source of the other (latents.against)"
                )
            labels = mine.texts("label")
            known = {x for x in labels.tolist() if x is not None}
            if wanted not in known:
                hint = near(wanted, known) if known else "; no row has a label: name the column, source.columns.label=…"
                raise ConfigError(f"no row has the label {wanted!r} (latents.positive_label){hint}")
            classes = np.where(labels == wanted, POSITIVE, np.where(labels == None, OTHER, NEGATIVE))  # noqa: E711
            rest = known - {wanted}
            return (wanted, rest.pop() if len(rest) == 1 else f"other than {wanted}"), [
                _Part(mine, classes, p.manifest, self.activations.reader)
            ]
        urls = [s.against] if isinstance(s.against, str) else list(s.against)
        urls = [expand(u) for u in urls]
        c = p.config.source
        spec = SourceSpec(urls if len(urls) > 1 else urls[0], c.format, c.columns, c.unit_rows, c.skip_broken_shards)
        whole, _, columns = build_manifest(spec, storage.join(p.sink, "against"))
        manifest = whole.head(c.max_rows)
        reader = replace(self.activations.reader, format=whole.format, columns=columns)
        corpus = {"digest": whole.digest, "columns": columns.facts()}
        theirs = self.activations.of(manifest, corpus, reader, s.statistic)
        both = ((mine, POSITIVE, p.manifest, self.activations.reader), (theirs, NEGATIVE, manifest, reader))
        return (c.name, urls[0] if len(urls) == 1 else f"{len(urls)} sources"), [
            _Part(table, _present(table, which), m, r) for table, which, m, r in both
        ]

    def _write_concepts(self, top: list[int], found: Separation, names: tuple[str, str]) -> dict[int, str]:
        """The decoder rows of `top` as concept files; their names."""
        out = {}
        file = file_facts(self.activations.url)
        for j in top:
            meta = {
                **file,
                "latent": j,
                "separates": list(names),
                "auc": float(found.auc[j]),
                "q": float(found.q[j]),
                "rates": [float(found.rate_positive[j]), float(found.rate_negative[j])],
            }
            made = decoder_concept(self.activations.sae, j, self.pipeline.identity["layers"], meta)
            concept_files.save(made, storage.join(self.pipeline.sink, "concepts", made.name))
            out[j] = made.name
        return out

    def _passages(self, parts: list[_Part], top: list[int]) -> dict[int, tuple[Passage, ...]]:
        s = self.settings
        out: dict[int, list[Passage]] = {j: [] for j in top}
        for part in parts:
            shown = latent_contexts(part.table, top, s.contexts, s.around, part.manifest, part.reader)
            spans = part.table.spans
            for j, passages in zip(top, shown, strict=True):
                for x in passages:
                    which = int(part.classes[spans[x.source][0] + x.row])
                    name = {POSITIVE: "positive", NEGATIVE: "negative"}.get(which, "")
                    out[j].append(replace(x, set=name))
        return {j: tuple(sorted(xs, key=lambda x: -x.activation)[: s.contexts]) for j, xs in out.items()}

    def _facts(self) -> tuple[tuple[str, str], ...]:
        sae, s = self.activations.sae, self.settings
        return (
            ("SAE", f"{sae.name}: layer {sae.layer}, {sae.latents:,} latents, {sae.activation}"),
            ("model", str(self.activations.model[1]["name"])),
            ("tokens", "of the response" if s.tokens == "response" else "of prompt and response"),
            ("activation of a row", f"the {s.statistic} over these tokens"),
            ("tested", f"latents that fire on at least {s.min_rows} rows of the two sets"),
            ("direction", {"both": "either way"}.get(s.direction, f"stronger on {s.direction} rows")),
        )

    def _write(self, page: LatentsPage, found: Separation, order: np.ndarray) -> str:
        sink = self.pipeline.sink
        url = storage.join(sink, "latents")
        per_latent = {k: v for k, v in vars(found).items() if isinstance(v, np.ndarray)}
        tested = np.flatnonzero(found.tested)
        table = pa.table({"latent": tested, **{k: pa.array(v[tested]) for k, v in per_latent.items()}})
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd")
        storage.write_atomic(f"{url}.parquet", buffer.getvalue().to_pybytes())
        storage.write_atomic(f"{url}.html", build(page).encode())
        body: dict[str, Any] = {**asdict(page), "order": [int(j) for j in order[:1000]]}
        storage.write_atomic(f"{url}.json", json.dumps(body, indent=2, ensure_ascii=False) + "\n")
        lines = [f"{x.concept}: AUC {x.auc:.3f}, q {x.q:.2g}, fires on {x.rate_positive:.1%} of the positive and "
                 f"{x.rate_negative:.1%} of the negative rows" for x in page.latents[:10]]  # fmt: skip
        if page.latents:
            first = storage.join(page.concepts, page.latents[0].concept)
            lines.append(
                f"{len(page.latents)} concepts: {page.concepts} (use one: concept=[file] concept.file.path={first})"
            )
        else:
            lines.append(f"no latent separates the sets in the direction latents.direction={self.settings.direction}")
        told = f"{page.significant} of {page.tested} latents separate the sets (q <= {_ALPHA:g})"
        return "\n".join([told, *lines, f"report: {url}.html", f"numbers: {url}.json, {url}.parquet"])


def _present(table: LatentTable, which: int) -> np.ndarray:
    """The class of each row that has activations; bad rows count for nothing."""
    out = np.full(table.rows, OTHER)
    for rows, _ in table.tables([]):
        out[rows] = which
    return out


def _listed(found: Separation, j: int, concept: str, passages: tuple[Passage, ...]) -> SeparatingLatent:
    values = {k: float(getattr(found, k)[j]) for k in SeparatingLatent.__dataclass_fields__ if hasattr(found, k)}
    return SeparatingLatent(latent=j, concept=concept, passages=passages, **values)


main = entry("latents", stages)

if __name__ == "__main__":
    main()
