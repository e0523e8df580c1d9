"""What a sweep is worth: trainings at once, a training against a plain loop, adapters swapped in a warm engine.

Three series, on rows of the embedded corpus:
- arms/hour: trainings one after another as `curate train` runs them (Ray Train's start for each), one after another in
  an actor that is kept, and with the cluster filled as a sweep does;
- tokens/s of one training (Hugging Face's Trainer) against `bench.finetune`'s plain loop on the same rows, and
- tokens/s of generated answers by N adapters in one engine, against an engine that is loaded anew for each of them,
  its start counted, as that is what is saved.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench import demo_rows
from bench.common import emit, machine
from curate.corpus.example import ColumnMap
from curate.corpus.render import Renderer
from curate.models.engines import GenerationSpec
from curate.models.load import ModelSpec, identity, load_tokenizer
from curate.runtime.cluster import ClusterSpec
from curate.runtime.manifest import SourceSpec, build_manifest
from curate.runtime.reader import ReaderSpec
from curate.runtime.session import session
from curate.runtime.sweep import run_trainings
from curate.runtime.tokens import make_tokens
from curate.runtime.train import TrainSpec, train
from curate.training.spec import LoraSpec, TrainingSpec

BENCH = "sweep"


def _training(args: argparse.Namespace, seed: int = 0) -> TrainingSpec:
    lora = LoraSpec(args.r, 2.0 * args.r, rslora=False, targets="attention")
    return TrainingSpec(
        lora=lora, learning_rate=5e-4, batch_size=8, micro_batch=8, dtype=args.dtype, seed=seed, save_every=10_000
    )


def arms(args: argparse.Namespace, folder: Path) -> list[str]:
    """Trainings an hour, at once and one after another; the adapters that they made."""
    corpus = folder / "corpus.jsonl"
    rows = demo_rows.spread(demo_rows.corpus_rows(), args.rows)
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = ModelSpec(args.model, dtype=args.dtype, device="cpu")
    found: dict[str, float] = {}
    results: list[str] = []
    with session(ClusterSpec(cpus=args.cpus, workers=args.cpus)) as running:
        manifest, _, columns = build_manifest(
            SourceSpec(str(corpus), "auto", ColumnMap(), 512, False), str(folder), lambda done, of: None
        )
        reader = ReaderSpec(manifest.format, columns, model, args.max_tokens, "truncate")
        tokens, _ = make_tokens(str(folder / "store"), {"digest": manifest.digest}, reader, manifest, running, 1.0)
        for at, name in enumerate(("one_by_one", "kept", "at_once")):
            specs = {}
            for i in range(args.arms):
                seed = args.arms * at + i  # another one, so that nothing is found done
                keep = np.random.default_rng(i).random(tokens.rows) < 0.5
                training = _training(args, seed)
                specs[str(seed)] = TrainSpec(str(folder / "store"), training, model, identity(model), tokens, keep)
            began = time.perf_counter()
            if name == "one_by_one":
                results = [str(train(spec, running)["result"]) for spec in specs.values()]
            else:
                outcomes = run_trainings(specs, running, 1 if name == "kept" else None)
                if failed := [o.failed for o in outcomes.values() if o.failed]:
                    raise RuntimeError(f"{len(failed)} trainings failed: {failed[0]}")
            found[name] = 3600 * args.arms / (time.perf_counter() - began)
    emit(BENCH, "arms_per_hour", found, "1/h", found["at_once"] / found["one_by_one"], "one_by_one", _settings(args))
    return results


def trained(args: argparse.Namespace) -> None:
    """Tokens/s of the Trainer's steps and of the plain loop's, each in a process of its own; loading is not counted.
    In turns, the best of each: what else the machine does can only slow one down."""
    found = {"plain": 0.0, "trainer": 0.0}
    for _ in range(args.rounds):
        found = {how: max(best, _child(how, args)) for how, best in found.items()}
    ratio = found["trainer"] / found["plain"]
    emit(BENCH, "training_tokens_per_second", found, "tokens/s", ratio, "plain", _settings(args))


def swapped(args: argparse.Namespace, adapters: Sequence[str]) -> None:
    """Tokens/s of answers: one engine that wears each adapter in turn, and an engine for each."""
    swap = _timed("swapped", args, adapters)
    anew = [_timed("anew", args, [a]) for a in adapters]
    found = {
        "swapped": swap["tokens"] / swap["whole"],
        "anew": sum(a["tokens"] for a in anew) / sum(a["whole"] for a in anew),
        "swapped_without_start": swap["tokens"] / swap["answering"],
    }
    settings = {**_settings(args), "adapters": len(adapters), "answers": args.answers, "engine": args.engine}
    emit(BENCH, "answer_tokens_per_second", found, "tokens/s", found["swapped"] / found["anew"], "anew", settings)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "rows", "arms", "dtype", "cpus", "r")
    return {**{name: getattr(args, name) for name in names}, **machine()}


def _child(how: str, args: argparse.Namespace, adapters: Sequence[str] = ()) -> Any:
    """Run one measurement in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="bench-sweep-") as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "bench.sweep", "--child", how, "--result", str(result)]
        for name in ("model", "rows", "dtype", "r", "max_tokens", "threads", "answers", "new_tokens", "engine"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        subprocess.run([*command, "--adapters", *adapters], check=True, stdout=sys.stderr)
        return json.loads(result.read_text(encoding="utf-8"))


def _timed(how: str, args: argparse.Namespace, adapters: Sequence[str]) -> dict[str, float]:
    began = time.perf_counter()
    found: dict[str, float] = _child(how, args, adapters)
    return {**found, "whole": time.perf_counter() - began}


def _plain(args: argparse.Namespace) -> float:
    from bench import finetune as plain

    model, training = ModelSpec(args.model, dtype=args.dtype, device="cpu"), _training(args)
    rows = _rendered(args, model)
    lora = plain.LoraSpec(args.r, 2 * args.r, training.learning_rate, 1, training.batch_size, token_budget=8192)
    stamps: list[float] = []
    step = plain.torch.nn.utils.clip_grad_norm_

    def stamped(*given: Any, **named: Any) -> Any:
        stamps.append(time.perf_counter())  # once a step
        return step(*given, **named)

    plain.torch.nn.utils.clip_grad_norm_ = stamped
    plain.finetune(model, rows, lora)
    order = random.Random(lora.seed).sample(rows, len(rows))  # the loop's; the first step is not counted
    return float(sum(r.end for r in order[lora.batch :]) / (stamps[-1] - stamps[0]))


def _trainer(args: argparse.Namespace) -> float:
    import pyarrow as pa
    from datasets import Dataset

    from curate.training.finetune import finetune
    from curate.training.log import read_log
    from curate.training.rows import TOKENS

    model, training = ModelSpec(args.model, dtype=args.dtype, device="cpu"), replace(_training(args), log_every=1)
    rows = _rendered(args, model)
    ids = pa.array([list(r.input_ids[: r.end]) for r in rows], TOKENS)
    table = pa.table({"input_ids": ids, "start": pa.array([r.start for r in rows], pa.int32())})
    with tempfile.TemporaryDirectory(prefix="bench-sweep-") as folder:
        finetune(training, model, Dataset(table), str(Path(folder) / "training"))
        lines = read_log(str(Path(folder) / "training"))
    tokens, seconds = (lines[-1][name] - lines[0][name] for name in ("tokens", "seconds"))
    return float(tokens / seconds)


def _rendered(args: argparse.Namespace, model: ModelSpec) -> list[Any]:
    from bench.finetune import render

    rows = demo_rows.spread(demo_rows.corpus_rows(), args.rows)
    return render(Renderer(load_tokenizer(model), args.max_tokens), demo_rows.examples(rows))


def _answers(args: argparse.Namespace, swap: bool) -> dict[str, float]:
    from curate.models.engines import make_engine

    spec = GenerationSpec(
        max_new_tokens=args.new_tokens, temperature=0.0, engine=args.engine, dtype=args.dtype, max_model_len=512
    )
    model = ModelSpec(args.model, dtype=args.dtype, device="cpu")
    renderer = Renderer(load_tokenizer(model), args.max_tokens)
    rows = demo_rows.examples(demo_rows.spread(demo_rows.corpus_rows(), args.answers))
    prompts = [renderer.prompt_ids(row) for row in rows]
    seeds = list(range(len(prompts)))
    if swap:
        engine = make_engine(model, spec, lora_rank=args.r)
        began = time.perf_counter()
        found = [g for adapter in args.adapters for g in engine.generate(prompts, seeds, adapter=adapter)]
    else:
        engine = make_engine(replace(model, adapter=args.adapters[0]), spec)
        began = time.perf_counter()
        found = list(engine.generate(prompts, seeds))
    return {"tokens": float(sum(len(g.token_ids) for g in found)), "answering": time.perf_counter() - began}


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.sweep", description=__doc__.split("\n")[0] if __doc__ else None)
    p.add_argument("--series", nargs="*", default=["arms", "training", "answers"])
    p.add_argument("--model", default=demo_rows.MODEL, help="any path that model.path takes")
    p.add_argument("--arms", type=int, default=6)
    p.add_argument("--rows", type=int, default=64, help="rows of the corpus; an arm trains on about half of them")
    p.add_argument("--max-tokens", type=int, default=256)
    p.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    p.add_argument("--r", type=int, default=8, help="rank of the adapters")
    p.add_argument("--cpus", type=int, default=2, help="cores of the embedded Ray: trainings at once")
    p.add_argument("--threads", type=int, default=1, help="of the measurements without Ray")
    p.add_argument("--rounds", type=int, default=2, help="of the training series, of which the best counts")
    p.add_argument("--answers", type=int, default=16, help="prompts of each adapter")
    p.add_argument("--new-tokens", type=int, default=32)
    p.add_argument("--engine", default="vllm", choices=("vllm", "transformers"))
    p.add_argument("--child", default=None, help=argparse.SUPPRESS)
    p.add_argument("--result", type=Path, default=None, help=argparse.SUPPRESS)
    p.add_argument("--adapters", nargs="*", default=[], help="PEFT folders for the answers; default: those of the arms")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    if args.child is not None:
        import torch

        torch.set_num_threads(args.threads)
        measured: dict[str, Any] = {"plain": _plain, "trainer": _trainer}
        how = args.child
        found = measured[how](args) if how in measured else _answers(args, how == "swapped")
        args.result.write_text(json.dumps(found), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory(prefix="bench-sweep-") as folder:
        adapters = list(args.adapters)
        if "arms" in args.series or ("answers" in args.series and not adapters):
            adapters = arms(args, Path(folder))
        if "training" in args.series:
            trained(args)
        if "answers" in args.series:
            swapped(args, adapters)


if __name__ == "__main__":
    main()
