"""The fit: curvature factors of the tracked layers, from a sample of the corpus, by a crew of differentiating actors.

Shards of the sample are summed by the actors themselves, each into one file; then every covariance is reduced and
decomposed, the largest first; a second pass over the same shards corrects the eigenvalues; one file a layer is what
stays, below <store>/factors/<digest of the recipe>:

    recipe.json                      what the factors are made from
    work/survey.json                 tracked layers and coverage                            (until the fit is finished)
    work/<plan>/covariance/<shard>   sums of one shard, and likewise correction/<shard>
    work/<plan>/eigen/<A|B>/<layer>  one eigenbasis
    layers/…, inputs/…, factors.json see curate/curvature/files.py

A run that is killed goes on at the shard or layer that is missing. <plan> names the way in which the sample was cut.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from torch import Tensor

from connectors import storage
from curate.concepts.sae import encode_flops
from curate.corpus.recipe import Recipe
from curate.corpus.render import Rendered
from curate.corpus.spread import Piece, count, cut, plan_digest, spread
from curate.corpus.units import Manifest
from curate.curvature.covariance import Covariances, accumulate_covariances
from curate.curvature.ekfac import Bases, Corrections, Eigenbasis, accumulate_corrections, eigenbasis, make_factor
from curate.curvature.files import INDEX, FactorIndex, load_index, save_factor, save_index
from curate.curvature.fisher import CurvatureKind, CurvatureSpec
from curate.curvature.flops import correction_flops, covariance_flops, fisher_flops, squares
from curate.errors import ConfigError, CorpusError, CurvatureError
from curate.models.tracked import Coverage, TrackedLayer
from curate.runtime import partials
from curate.runtime.crew import Crew
from curate.runtime.differentiator import Differentiator
from curate.runtime.events import say
from curate.runtime.memory import free_bytes
from curate.runtime.output import claim
from curate.runtime.progress import Done, Progress
from curate.runtime.reader import ReaderSpec, read_pieces
from curate.runtime.run_note import StageNote, begin
from curate.runtime.stage import StageResult

PARTIAL_BYTES = 16 << 30  # of all shards' sums together; large models get larger shards
Job = TypeVar("Job")


@dataclass(frozen=True)
class FitSpec:
    """`url`: the folder of the factors. `reader` cuts long rows; `shard_rows` is what a kill can cost, per actor; of
    the sample's rows `max_bad_fraction` may be unusable."""

    url: str
    reader: ReaderSpec
    curvature: CurvatureSpec
    shard_rows: int
    max_bad_fraction: float = 1.0


@dataclass(frozen=True)
class _Shard:
    """One shard's sums, to be written to `url`; `bases` is the folder of eigenbases for a correction."""

    url: str
    pieces: Sequence[Piece]
    spec: FitSpec
    bases: str | None


@dataclass(frozen=True)
class _Basis:
    """One covariance, to be summed over `shards` and decomposed into `url`."""

    url: str
    name: str
    side: Literal["A", "B"]
    size: int
    shards: list[str]


@dataclass(frozen=True)
class _Layer:
    """One layer's factor, to be put together."""

    url: str
    layer: TrackedLayer
    kind: Literal["ekfac", "kfac", "diagonal", "identity"]
    bases: str
    corrections: list[str]


def fit(
    spec: FitSpec, recipe: Recipe, manifest: Manifest, model: Mapping[str, Any], crew: Crew
) -> tuple[FactorIndex, StageResult | None]:
    """The factors of `recipe`: found, or fitted now (or gone on with). `model` is the tuned model's identity.

    Returns the index, and what was done now (None: nothing).

    Raises:
        RecipeError: the folder holds the product of another recipe.
        CurvatureError: the factors there are of another model; the sums need more memory than an actor's device has; no
            row of the sample can be used; gradients or a covariance that are not finite; a covariance without an
            eigendecomposition.
        CorpusError: more than `max_bad_fraction` of the sampled rows cannot be used.
        ConfigError: no layer matches the choice; the curvature is the identity, for which there is nothing to fit.
    """
    if spec.curvature.kind == "identity":
        raise ConfigError("curvature=identity is H = I: there is nothing to fit; choose ekfac, kfac or diagonal")
    if storage.exists(storage.join(spec.url, INDEX)):
        index = load_index(spec.url, model)
        partials.remove(storage.join(spec.url, "work"))  # of a run that was killed between the index and this
        say(f"factors: found at {spec.url}", rows=index.rows)
        say_coverage(index.coverage)
        return index, None
    claim(storage.join(spec.url, "recipe.json"), recipe, spec.url)
    layers, coverage = _surveyed(spec, crew)
    say_coverage(coverage)
    began = time.monotonic()
    begin(StageNote("fit", 1, "fits", places={"factors": spec.url}, marker=INDEX))
    shards = _shards(spec, manifest, layers)
    work = storage.join(spec.url, "work", plan_digest(shards))
    kind = spec.curvature.kind
    facts: dict[str, int] = {}
    bases = storage.join(work, "eigen")
    if kind != "diagonal":
        sums = _sum_shards(crew, spec, shards, work, "covariance", None)
        facts = _counts(sums)
        _refuse_bad(facts, spec)
        _decompose(crew, layers, sums, bases)
    corrections: list[str] = []
    if kind != "kfac":
        corrections = _sum_shards(crew, spec, shards, work, "correction", bases if kind == "ekfac" else None)
        facts = facts or _counts(corrections)
        _refuse_bad(facts, spec)
    _put_together(crew, spec, layers, work, corrections)
    rows, bad, tokens = facts["examples"], facts.get("left_out", 0), facts.get("seen", 0)
    index = FactorIndex(recipe.digest, dict(model), spec.curvature, tuple(layers), coverage, rows, tokens)
    save_index(spec.url, index)
    partials.remove(storage.join(spec.url, "work"))
    storage.remove_stale_temps(spec.url)  # of actors that were killed and replaced
    if bad:
        say(f"fit: {bad} of {rows + bad} sampled rows cannot be used and are left out")
    say(f"factors: fitted and kept at {spec.url}", rows=rows, tokens=tokens, seconds=f"{time.monotonic() - began:.1f}")
    return index, StageResult(rows, 0, bad, tokens, time.monotonic() - began)


def say_coverage(coverage: Coverage) -> None:
    """Tell how much of the model is tracked, and what influence does not see."""
    say(f"influence: {coverage}")
    for warning in coverage.warnings:
        say(f"WARNING: {warning}")


def _survey(state: Differentiator, spec: FitSpec) -> str:
    """Names the layers, and refuses at once what would run out of memory after hours."""
    need, free = _held(state.layers, spec.curvature.kind), free_bytes(state.device)
    if need > free:
        raise CurvatureError(
            f"the curvature of {len(state.layers)} layers (covariances, eigenvectors, eigenvalues) takes {need:,} "
            f"bytes, and {state.device} has {free:,} free beside the model; track fewer layers with "
            f"curvature.layers.kind, curvature.layers.first, curvature.layers.last or curvature.layers.stride, or use "
            f"a larger device"
        )
    body = json.dumps({"layers": [asdict(layer) for layer in state.layers], "coverage": asdict(state.coverage)})
    storage.write_atomic(_survey_url(spec), body)
    return body


def _survey_url(spec: FitSpec) -> str:
    return storage.join(spec.url, "work", "survey.json")


def _held(layers: Sequence[TrackedLayer], kind: CurvatureKind) -> int:
    """Bytes that an actor holds in the pass that needs the most: each matrix of A, B (or Q_A, Q_B), each layer's Λ."""
    both = 0 if kind == "diagonal" else squares(layers)
    return 4 * (both + (0 if kind == "kfac" else sum(layer.size for layer in layers)))


def _surveyed(spec: FitSpec, crew: Crew) -> tuple[list[TrackedLayer], Coverage]:
    """What an actor that has the model says of its layers; kept, so that a resumed run need not ask again."""
    url = _survey_url(spec)
    text = storage.read_text(url) if storage.exists(url) else next(iter(crew.map(_survey, [spec])))
    body = json.loads(text)
    coverage = Coverage(**{**body["coverage"], "warnings": tuple(body["coverage"]["warnings"])})
    return [TrackedLayer(**layer) for layer in body["layers"]], coverage


def _shards(spec: FitSpec, manifest: Manifest, layers: Sequence[TrackedLayer]) -> list[list[Piece]]:
    pieces = spread(manifest, spec.curvature.examples)
    one = 4 * max(squares(layers), sum(layer.size for layer in layers))
    return cut(pieces, max(spec.shard_rows, -(-count(pieces) * one // PARTIAL_BYTES)))


def _round(
    crew: Crew, act: Callable[[Differentiator, Job], Done], jobs: Mapping[str, Job], done: set[str], progress: Progress
) -> None:
    """Do what is not in `done`; `act` answers what to add to `progress`."""
    for answer in crew.map(act, [job for name, job in jobs.items() if name not in done]):
        progress.add(*answer)
    progress.close()


# the two passes over shards


def _sum_shards(
    crew: Crew, spec: FitSpec, shards: Sequence[Sequence[Piece]], work: str, what: str, bases: str | None
) -> list[str]:
    folder = storage.join(work, what)
    jobs = {
        f"{i:05d}": _Shard(storage.join(folder, f"{i:05d}.safetensors"), shard, spec, bases)
        for i, shard in enumerate(shards)
    }
    done = partials.names(folder) & set(jobs)
    rows = {name: count(job.pieces) for name, job in jobs.items()}
    progress = Progress(f"fit: {what}", sum(rows.values()), sum(rows[name] for name in done))
    _round(crew, _covariance if what == "covariance" else _correction, jobs, done, progress)
    return [job.url for job in jobs.values()]


def _rows(shard: _Shard) -> tuple[list[Rendered], list[str], int]:
    """Tokens, ids, and how many rows cannot be used."""
    rendered: list[Rendered] = []
    ids: list[str] = []
    bad = 0
    for chunk in read_pieces(shard.pieces, shard.spec.reader):
        bad += len(chunk.bad)
        for example, row in zip(chunk.examples, chunk.rendered, strict=True):
            if row.end > max(row.start, 1):
                rendered.append(row)
                ids.append(example.id)
            else:
                bad += 1
    return rendered, ids, bad


def _finish(
    state: Differentiator,
    shard: _Shard,
    sums: Covariances | Corrections,
    rendered: Sequence[Rendered],
    bad: int,
    flops: Callable[[int], float],
    began: float,
) -> Done:
    """`flops`: of the sums, by the tokens that went through the model."""
    sums.count("examples", 0)
    sums.count("left_out", bad)
    sums.count("seen", sum(len(r.input_ids) for r in rendered))
    partials.save(shard.url, sums.state_dict())
    rows, busy = count(shard.pieces), time.perf_counter() - began
    if not rendered:
        return Done(rows)
    passes, tokens = fisher_flops(state.cost, state.layers, shard.spec.curvature, rendered)
    inserted = 0.0 if state.sae is None else encode_flops(state.sae, tokens)
    return Done(rows, tokens, 0, passes + inserted + flops(tokens), busy, state.peak)


def _covariance(state: Differentiator, shard: _Shard) -> Done:
    began = time.perf_counter()
    rendered, ids, bad = _rows(shard)
    sums = Covariances()
    if rendered:
        budget, spec = state.spec.token_budget, shard.spec.curvature
        with state.inserted():
            accumulate_covariances(state.model, state.layers, spec, rendered, ids, budget, state.pad_id, sums)
    return _finish(state, shard, sums, rendered, bad, partial(covariance_flops, state.layers), began)


def _correction(state: Differentiator, shard: _Shard) -> Done:
    began = time.perf_counter()
    rendered, ids, bad = _rows(shard)
    sums = Corrections()
    if rendered:
        folder = shard.bases
        bases = None if folder is None else state.kept(folder, lambda: _load_bases(state, folder))
        budget, spec = state.spec.token_budget, shard.spec.curvature
        with state.inserted():
            accumulate_corrections(state.model, state.layers, spec, bases, rendered, ids, budget, state.pad_id, sums)
    flops = partial(correction_flops, state.layers, rotated=shard.bases is not None)
    return _finish(state, shard, sums, rendered, bad, flops, began)


def _load_bases(state: Differentiator, folder: str) -> Bases:
    """Every eigenbasis, on the actor's device."""

    def one(side: str, name: str) -> Eigenbasis:
        found = partials.read(storage.join(folder, side, f"{name}.safetensors"))
        return Eigenbasis(found["vectors"].to(state.device), found["values"].to(state.device))

    inputs = {layer.reads: one("A", layer.reads) for layer in state.layers if layer.name == layer.reads}
    return Bases(inputs, {layer.name: one("B", layer.name) for layer in state.layers})


def _counts(urls: list[str]) -> dict[str, int]:
    sums = partials.total(urls, lambda key: key.startswith("count/"))
    return {key.removeprefix("count/"): int(n) for key, n in sums.items()}


def _refuse_bad(facts: Mapping[str, int], spec: FitSpec) -> None:
    good, bad = facts.get("examples", 0), facts.get("left_out", 0)
    if good < 1:
        raise CurvatureError(
            f"none of the {bad} sampled rows can be used for the curvature (no response token "
            f"within curvature.max_tokens={spec.reader.max_tokens}, or unreadable); raise it, or mend the corpus"
        )
    if bad > spec.max_bad_fraction * (good + bad):
        raise CorpusError(
            f"{bad} of {good + bad} rows sampled for the curvature are bad, more than source.max_bad_fraction="
            f"{spec.max_bad_fraction:g} allows: unreadable, or without a response token within curvature.max_tokens="
            f"{spec.reader.max_tokens}. Mend the source or raise the limit and run again; `curate score` with a scorer "
            f"that needs no fit lists its bad rows with reasons."
        )


# what is done layer by layer


def _decompose(crew: Crew, layers: Sequence[TrackedLayer], sums: list[str], folder: str) -> None:
    jobs: dict[str, _Basis] = {}
    for layer in layers:
        for side, name, size in (("A", layer.reads, layer.width), ("B", layer.name, layer.out)):
            url = storage.join(folder, side, f"{name}.safetensors")
            jobs[f"{side}/{name}"] = _Basis(url, name, "A" if side == "A" else "B", size, sums)
    ordered = dict(sorted(jobs.items(), key=lambda item: -item[1].size))  # the last to end should be a small one
    done = partials.names(folder) & set(jobs)
    _round(crew, _eigen, ordered, done, Progress("fit: eigenvectors", len(jobs), len(done), "matrices"))


def _eigen(state: Differentiator, job: _Basis) -> Done:
    key = f"{job.side}/{job.name}"
    sums = Covariances.from_state(partials.total(job.shards, lambda k: k == key or k.startswith("count/")))
    matrix = sums.input_factor(job.name) if job.side == "A" else sums.output_factor(job.name)
    basis = eigenbasis(matrix.to(state.device), job.name)
    tensors: dict[str, Tensor] = {"vectors": basis.vectors, "values": basis.values}
    partials.save(job.url, tensors)
    return Done(1)


def _put_together(crew: Crew, spec: FitSpec, layers: Sequence[TrackedLayer], work: str, corrections: list[str]) -> None:
    kind, bases = spec.curvature.kind, storage.join(work, "eigen")
    begun = storage.join(spec.url, "work", "layers.txt")
    if not storage.exists(begun) or storage.read_text(begun) != work:
        for folder in ("layers", "inputs"):  # of a sample that was cut otherwise: other eigenvectors
            partials.remove(storage.join(spec.url, folder))
        storage.write_atomic(begun, work)
    jobs = {layer.name: _Layer(spec.url, layer, kind, bases, corrections) for layer in layers}
    done = partials.names(storage.join(spec.url, "layers"))
    if kind != "diagonal":  # written after the layer's own file
        shared = partials.names(storage.join(spec.url, "inputs"))
        done = {layer.name for layer in layers if layer.name in done and layer.reads in shared}
    _round(crew, _factor, jobs, done & set(jobs), Progress("fit: factors", len(jobs), len(done & set(jobs)), "layers"))


def _factor(state: Differentiator, job: _Layer) -> Done:
    layer, q_in, q_out, corrected = job.layer, None, None, None
    if job.corrections:
        sums = partials.total(job.corrections, lambda key: key == layer.name or key.startswith("count/"))
        corrected = Corrections.from_state(sums).eigenvalues(layer.name)
    if job.kind != "diagonal":
        q_in, q_out = (
            Eigenbasis(**partials.read(storage.join(job.bases, side, f"{name}.safetensors")))
            for side, name in (("A", layer.reads), ("B", layer.name))
        )
    save_factor(job.url, make_factor(layer, job.kind, q_in, q_out, corrected))
    return Done(1)
