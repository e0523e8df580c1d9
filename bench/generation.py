"""vLLM against `generate` of transformers at batch 32: tokens/s, each engine and precision in a process of its own.

Prompts are those of the embedded corpus. Tokens are the real ones: a response that ends early counts for what it has,
with its end of turn. At temperature 0, the default, both engines answer alike in float32, so both are given the same
work. Loading is not part of tokens/s; each engine answers one prompt before the clock starts.
`--engines transformers` adds the library's own fallback (a row's sample there does not depend on its batch).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import demo_rows
from bench.common import GIB, emit, machine

BENCH = "generation"
ENGINES = ("vllm", "generate", "transformers")
DTYPES = ("bfloat16", "float32")

Answer = Callable[[Sequence[list[int]]], list[list[int]]]


def _engine(args: argparse.Namespace) -> Answer:
    """An engine of the library, as the generation stage makes it."""
    from curate.models.engines import GenerationSpec, make_engine
    from curate.models.load import ModelSpec

    spec = GenerationSpec(
        max_new_tokens=args.new_tokens,
        temperature=args.temperature,
        engine=args.engine,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        max_batch=args.batch,
        kv_cache_gb=args.kv_cache_gb,
    )
    engine = make_engine(ModelSpec(args.model, dtype=args.dtype, device="cpu"), spec)

    def answer(prompts: Sequence[list[int]]) -> list[list[int]]:
        found = engine.generate(prompts, list(range(len(prompts))))
        if failed := [g.error for g in found if g.error]:
            raise RuntimeError(f"{len(failed)} prompts failed: {failed[0]}")
        return [g.token_ids for g in found]

    return answer


def _generate(args: argparse.Namespace) -> Answer:
    """`model.generate` on batches padded on the left, in the order they come."""
    import torch

    from curate.models.batching import collate
    from curate.models.engines import stop_ids
    from curate.models.load import ModelSpec, load_model, load_tokenizer, pad_id

    spec = ModelSpec(args.model, dtype=args.dtype, device="cpu")
    model, tokenizer = load_model(spec), load_tokenizer(spec)
    assert model.generation_config is not None
    stops, pad = stop_ids(tokenizer, model.generation_config.eos_token_id), pad_id(tokenizer)
    sampling: dict[str, Any] = {"do_sample": False}
    if args.temperature:
        sampling = {"do_sample": True, "temperature": args.temperature, "top_p": 1.0, "top_k": 0}

    def answer(prompts: Sequence[list[int]]) -> list[list[int]]:
        out = []
        for at in range(0, len(prompts), args.batch):
            ids, mask = collate(prompts[at : at + args.batch], pad, side="left")
            torch.manual_seed(at)
            made = model.generate(  # type: ignore[operator]  # declared in a mix-in that torch's stubs hide
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=args.new_tokens,
                eos_token_id=stops,
                pad_token_id=pad,
                **sampling,
            )
            for row in made[:, ids.shape[1] :].tolist():
                ends = [i for i, token in enumerate(row) if token in stops]
                out.append(row[: ends[0] + 1] if ends else row)
        return out

    return answer


def _child(args: argparse.Namespace) -> None:
    """One engine in one precision; writes what it measured to args.result."""
    from curate.corpus.render import Renderer
    from curate.models.load import ModelSpec, load_tokenizer

    renderer = Renderer(load_tokenizer(ModelSpec(args.model)), args.max_model_len)
    rows = demo_rows.spread(demo_rows.corpus_rows(), args.prompts)
    prompts = [renderer.prompt_ids(e) for e in demo_rows.examples(rows)]
    began = time.perf_counter()
    answer = _generate(args) if args.engine == "generate" else _engine(args)
    loaded = time.perf_counter()
    answer(prompts[:1])
    ready = time.perf_counter()
    answers = answer(prompts)
    seconds = time.perf_counter() - ready
    measured = {
        "seconds": seconds,
        "start": loaded - began,
        "tokens": sum(len(a) for a in answers),
        "prompt_tokens": sum(len(p) for p in prompts),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "answers": answers,
    }
    Path(args.result).write_text(json.dumps(measured), encoding="utf-8")


def _measure(engine: str, dtype: str, args: argparse.Namespace, result: Path) -> dict[str, Any]:
    names = ("model", "prompts", "new_tokens", "batch", "temperature", "max_model_len", "kv_cache_gb")
    options = [f"--{n.replace('_', '-')}={getattr(args, n)}" for n in names]
    command = [sys.executable, "-m", "bench.generation", *options, f"--engine={engine}", f"--dtype={dtype}"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    # Engines print to stdout as they please; ours is for JSON lines.
    subprocess.run([*command, f"--result={result}"], env=environment, stdout=sys.stderr, check=True)
    return json.loads(result.read_text(encoding="utf-8"))


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.generation", description=__doc__)
    p.add_argument("--engines", nargs="+", default=["vllm", "generate"], choices=ENGINES)
    p.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    p.add_argument("--prompts", type=int, default=32, help="prompts taken evenly from the embedded corpus")
    p.add_argument("--new-tokens", type=int, default=64, help="longest response")
    p.add_argument("--batch", type=int, default=32, help="prompts that are answered at a time")
    p.add_argument("--temperature", type=float, default=0.0)
    p.add_argument("--model", default=demo_rows.MODEL, help="any path that model.path takes")
    p.add_argument("--max-model-len", type=int, default=1024, help="tokens of prompt and response")
    p.add_argument("--kv-cache-gb", type=float, default=1.0)
    p.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of each process")
    # What the processes of single engines are called with.
    p.add_argument("--engine", default=None, help=argparse.SUPPRESS)
    p.add_argument("--dtype", default=None, help=argparse.SUPPRESS)
    p.add_argument("--result", default=None, help=argparse.SUPPRESS)
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    if args.result:
        _child(args)
        return
    common = {k: v for k, v in vars(args).items() if k not in ("engine", "dtype", "result", "engines", "dtypes")}
    common |= machine()
    with tempfile.TemporaryDirectory(prefix="curate-bench-") as temp:
        for dtype in args.dtypes:
            found = {e: _measure(e, dtype, args, Path(temp) / f"{e}-{dtype}.json") for e in args.engines}
            base = found.get("generate")
            for engine, m in found.items():
                settings = {**common, "engine": engine, "dtype": dtype, "prompt_tokens": m["prompt_tokens"]}
                rate, other = m["tokens"] / m["seconds"], base is not None and engine != "generate"
                ratio = rate * base["seconds"] / base["tokens"] if base is not None and other else None
                emit(BENCH, "tokens_per_second", rate, "tokens/s", ratio, "generate" if other else None, settings)
                emit(BENCH, "tokens", m["tokens"], "tokens", settings=settings)
                emit(BENCH, "start", m["start"], "s", settings=settings)
                emit(BENCH, "peak_memory", m["peak"] / GIB, "GiB", settings=settings)
                if base is not None and other and not args.temperature:
                    same = sum(a == b for a, b in zip(m["answers"], base["answers"], strict=True))
                    emit(BENCH, "same_answers", same, "responses", same / args.prompts, "generate", settings)


if __name__ == "__main__":
    main()
