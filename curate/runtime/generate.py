"""The generation stage: the base model's own response to every prompt, by vLLM actors, kept as an artifact of its own.

The artifact is keyed by corpus, model and sampling, not by concept or number of rows: every later concept uses it, and
a run over more rows adds to it. Each row has its own seed, made of the run's seed and the row's id.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pyarrow as pa

from connectors import storage
from curate.corpus.chunk import Chunk, Quarantined
from curate.corpus.coverage import Part
from curate.corpus.recipe import Recipe
from curate.corpus.render import tokenizer_digest
from curate.corpus.units import Manifest
from curate.errors import ModelError
from curate.models.engines import GenerationSpec, make_engine, row_seed
from curate.models.flops import ForwardCost, cost_of
from curate.models.load import ModelSpec, load_tokenizer, resolve_device, resolve_dtype
from curate.models.peak import device_peak
from curate.runtime.events import say
from curate.runtime.output import Output
from curate.runtime.reader import ReaderSpec, read_chunks
from curate.runtime.session import Session
from curate.runtime.stage import StageResult, committed, run_units

PART_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("row", pa.int64()),
        ("response", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
    ]
)


@dataclass(frozen=True)
class GenerateSpec:
    """What the actors of a generation stage need."""

    reader: ReaderSpec
    generation: GenerationSpec
    output: Output


def sampling_facts(spec: GenerationSpec) -> dict[str, Any]:
    """What decides a sampled response, for recipes. Sizes of batches and memory are left out: they change a response
    only in precisions in which rows are not reproducible anyway."""
    names = ("max_new_tokens", "temperature", "top_p", "seed", "engine", "dtype", "max_model_len")
    return {name: getattr(spec, name) for name in names}


def generation_recipe(
    corpus: dict[str, Any], reader: ReaderSpec, model: dict[str, Any], spec: GenerationSpec
) -> Recipe:
    """What the responses to a corpus' prompts are made from; its digest names the artifact in the store."""
    fields = {
        "corpus": corpus,
        "model": model,
        "tokenizer": tokenizer_digest(load_tokenizer(reader.model)),
        "max_tokens": reader.max_tokens,
        "overlong": reader.overlong,
        "generation": sampling_facts(spec),
    }
    return Recipe("generations", fields)


class GenerateWorker:
    """One actor: a vLLM (or transformers) engine; a chunk of prompts in, a committed part of responses out."""

    def __init__(self, spec: GenerateSpec, threads: int, peak_tflops: float | None) -> None:
        os.environ["OMP_NUM_THREADS"] = str(max(1, threads))
        self.spec = spec
        self.engine = make_engine(spec.reader.model, spec.generation)
        model, generation = spec.reader.model, spec.generation
        self.cost = _cost(model)
        device = resolve_device(model.device)
        peak = device_peak(device, resolve_dtype(generation.dtype, device), peak_tflops)
        self.peak = None if peak is None else peak * generation.tensor_parallel

    def __call__(self, item: bytes) -> bytes:
        began = time.perf_counter()
        chunk = Chunk.from_bytes(item)
        prompts = [r.input_ids for r in chunk.rendered]
        seeds = [row_seed(self.spec.generation.seed, e.id) for e in chunk.examples]
        made = self.engine.generate(prompts, seeds)
        bad, rows = list(chunk.bad), []
        for example, answer in zip(chunk.examples, made, strict=True):
            if answer.error is not None:
                text = example.messages[-2].content[:200]
                bad.append(Quarantined(example.row, answer.error, example.id, text))
            else:
                rows.append(
                    {
                        "id": example.id,
                        "row": example.row,
                        "response": answer.text,
                        "token_ids": answer.token_ids,
                        "finish_reason": answer.finish_reason,
                    }
                )
        table = pa.Table.from_pylist(rows, schema=PART_SCHEMA)
        self.spec.output.commit(Part(chunk.key, chunk.start, chunk.stop), table, bad)
        lengths = [len(a.token_ids) for a in made]
        read = [0 if a.error is not None else len(p) for p, a in zip(prompts, made, strict=True)]
        return committed(
            chunk,
            bad,
            sum(lengths),
            began,
            self.cost.generation_flops(read, lengths) if self.cost else 0.0,
            self.peak if self.cost else None,
            engine=self.engine.name,
            row_reproducible=self.engine.row_reproducible,
        )


def _cost(model: ModelSpec) -> ForwardCost | None:
    """None for what an engine can serve though it is no causal language model that transformers knows."""
    try:
        return cost_of(model)
    except (ModelError, ValueError, AttributeError, KeyError) as e:
        say(f"generate: FLOPs are not counted, as the model's shape is not known ({e})")
        return None


def generate(
    spec: GenerateSpec, recipe: Recipe, manifest: Manifest, session: Session, max_bad_fraction: float
) -> StageResult:
    """Generate a response for every row of `manifest` that has none yet.

    Writes `artifact.json` beside the parts: the engine, and whether a row's response is independent of its batch.

    Raises:
        CorpusError: more than `max_bad_fraction` of the prompts cannot be used.
    """
    reader = replace(spec.reader, generations=None, prompts_only=True)
    threads = max(1, round(session.engines.cpus))
    make = partial(GenerateWorker, replace(spec, reader=reader), threads, session.peak_tflops)
    where = storage.join(spec.output.url, "artifact.json")

    def told(answer: dict[str, Any]) -> None:
        facts = {"engine": answer["engine"], "row_reproducible": answer["row_reproducible"]}
        if facts not in written:
            written.append(facts)
            storage.write_atomic(where, json.dumps(facts, indent=2))

    written: list[dict[str, Any]] = []
    read = partial(read_chunks, spec=reader)
    return run_units(
        "generate", spec.output, recipe, manifest, make, session.engines, read, session.readers, max_bad_fraction, told
    )
