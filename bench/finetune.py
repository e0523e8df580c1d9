"""A short LoRA fine-tune by a plain loop: rows in, a PEFT adapter (safetensors) and the loss of held-out rows out.

The loss is what the influence scores differentiate: of each row the mean cross-entropy of its response tokens, end of
turn included; the mean of that over a step's rows. For benchmarks and demonstrations that need a fine-tuned model; it
knows no cluster and no checkpoints.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from bench import demo_rows
from bench.common import emit, machine
from curate.corpus.example import Example
from curate.corpus.render import Rendered, Renderer
from curate.errors import BadRow, ConfigError
from curate.models.batching import collate, token_batches
from curate.models.load import ModelSpec, load_model, load_tokenizer
from curate.models.response_loss import loss_counts, summed_response_loss
from curate.models.tracked import LayerChoice, tracked_layers

BENCH = "finetune"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraSpec:
    """How to fine-tune. `alpha`/`r` scales the update; `token_budget` bounds the memory and does not change the result
    (to rounding): a step is always `batch` rows, cut into batches of so many tokens whose gradients are added up.

    Layers are adapted as `layers` chooses them; the learning rate rises over `warmup` steps and falls linearly to 0.
    """

    r: int = 8
    alpha: int = 16
    learning_rate: float = 5e-4
    epochs: int = 1
    batch: int = 8
    warmup: int = 5
    token_budget: int = 512
    seed: int = 0
    layers: LayerChoice = field(default_factory=LayerChoice)

    def __post_init__(self) -> None:
        for name in ("r", "epochs", "batch", "token_budget"):
            if getattr(self, name) < 1:
                raise ConfigError(f"the fine-tune's {name} is {getattr(self, name)}; it must be at least 1")
        if not self.learning_rate > 0:
            raise ConfigError(f"the fine-tune's learning rate is {self.learning_rate}; it must be positive")


def _batches(rows: Sequence[Rendered], budget: int) -> Iterator[tuple[list[Rendered], Tensor]]:
    for batch in token_batches([r.end for r in rows], budget):
        some = [rows[i] for i in batch]
        # What follows the end of turn carries no loss; causal attention lets padding on the right do without a mask.
        yield some, collate([r.input_ids[: r.end] for r in some], 0)[0]


def _losses(model: Any, rows: Sequence[Rendered], ids: Tensor) -> Tensor:
    """Mean response loss of each row, [batch]; autograd can go through."""
    ids = ids.to(model.device)
    last = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    found = []
    for i, row in enumerate(rows):
        total = summed_response_loss(model, last[i : i + 1], ids[i : i + 1], [row.start], [row.end])
        found.append(total / loss_counts([row.start], [row.end])[0])
    return torch.stack(found)


def mean_loss(model: Any, rows: Sequence[Rendered], budget: int = 2048) -> float:
    """Mean over `rows` of their response losses (nats a token)."""
    with torch.no_grad():
        total = sum(_losses(model, some, ids).double().sum().item() for some, ids in _batches(rows, budget))
    return total / len(rows)


def finetune(spec: ModelSpec, rows: Sequence[Rendered], lora: LoraSpec) -> tuple[PeftModel, list[float]]:
    """The model with a trained adapter (not merged), and the mean training loss of every step.

    Deterministic in `lora.seed` on one machine. The adapter is float32 whatever the model's dtype.

    Raises:
        ConfigError: no rows, or layers that match nothing.
    """
    if not rows:
        raise ConfigError("there are no rows to fine-tune on")
    model = load_model(spec)
    chosen, _ = tracked_layers(model, lora.layers)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        target_modules=[layer.name for layer in chosen],
        bias="none",
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(lora.seed)
        tuned = get_peft_model(model, config, autocast_adapter_dtype=True)
    tuned.peft_config["default"].base_model_name_or_path = spec.path
    inner: Any = tuned.get_base_model()
    weights = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lora.learning_rate, weight_decay=0.0)
    steps = lora.epochs * -(-len(rows) // lora.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / max(1, lora.warmup), (steps - n) / max(1, steps - lora.warmup), 1.0)
    )
    order = random.Random(lora.seed)
    history: list[float] = []
    for _ in range(lora.epochs):
        shuffled = order.sample(list(rows), len(rows))
        for at in range(0, len(shuffled), lora.batch):
            step = shuffled[at : at + lora.batch]
            mean = 0.0
            for some, ids in _batches(step, lora.token_budget):
                loss = _losses(inner, some, ids).sum() / len(step)
                loss.backward()
                mean += loss.item()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            history.append(mean)
            log.info("step %d of %d: loss %.4f", len(history), steps, mean)
    return tuned, history


def save(tuned: PeftModel, folder: Path) -> None:
    """Write the adapter (adapter_config.json, adapter_model.safetensors) to `folder`: whole or not at all.

    Raises:
        ConfigError: `folder` is there and not empty.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"the folder {folder} is not empty; give another --out, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        tuned.save_pretrained(str(temp), safe_serialization=True, save_embedding_layers=False)
        (temp / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        temp.chmod(0o755)  # temporary folders are 0700 and weights 0600; an adapter is to be read by others
        for path in temp.iterdir():
            path.chmod(0o644)
        temp.rename(folder)
    finally:
        shutil.rmtree(temp, ignore_errors=True)  # gone after the rename


def render(renderer: Renderer, examples: Sequence[Example]) -> list[Rendered]:
    """The rows that can be rendered; what is left out is said."""
    found = []
    for example in examples:
        try:
            found.append(renderer.render(example))
        except BadRow as error:
            log.warning("row %s is left out: %s", example.id, error)
    return found


def split(rows: Sequence[Any], held_out: int) -> tuple[list[Any], list[Any]]:
    """(training rows, `held_out` rows taken evenly from all)."""
    held = {i * len(rows) // held_out for i in range(held_out)} if held_out else set()
    return [r for i, r in enumerate(rows) if i not in held], [rows[i] for i in sorted(held)]


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.finetune", description=__doc__)
    p.add_argument("--rows", type=Path, default=None, help="JSON Lines; default: the embedded demo corpus")
    p.add_argument("--out", type=Path, required=True, help="folder of the adapter; must not hold anything yet")
    p.add_argument("--limit", type=int, default=0, help="rows taken evenly from all; 0: all")
    p.add_argument("--held-out", type=int, default=24, help="rows that are not trained on, for the loss")
    p.add_argument("--model", default=demo_rows.MODEL, help="any path that model.path takes")
    p.add_argument("--max-tokens", type=int, default=1024, help="longest row; longer ones are left out")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--kind", default="attention", choices=("attention", "mlp", "all"), help="linear layers to adapt")
    p.add_argument("--first", type=int, default=None, help="first block to adapt; those below cost a forward only")
    for name in ("r", "alpha", "epochs", "batch", "warmup", "token_budget", "seed"):
        p.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(LoraSpec, name))
    p.add_argument("--lr", type=float, default=LoraSpec.learning_rate, help="learning rate")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    lora = LoraSpec(
        args.r, args.alpha, args.lr, args.epochs, args.batch, args.warmup, args.token_budget, args.seed,
        LayerChoice(args.kind, first=args.first),
    )  # fmt: skip
    spec = ModelSpec(args.model, dtype=args.dtype, device=args.device)
    if args.rows is None:
        raw = demo_rows.corpus_rows()
    else:
        raw = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").split("\n") if line]
    raw = demo_rows.spread(raw, args.limit) if args.limit else raw
    rows = render(Renderer(load_tokenizer(spec), args.max_tokens), demo_rows.examples(raw))
    train, held = split(rows, args.held_out)
    settings = {**asdict(lora), "model": args.model, "rows": len(train), "held_out": len(held), **machine()}
    before = mean_loss(load_model(spec), held, lora.token_budget) if held else None
    began, cpu = time.perf_counter(), time.process_time()
    tuned, history = finetune(spec, train, lora)
    taken = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - began}
    save(tuned, args.out)
    emit(BENCH, "seconds", taken, "s", settings=settings)
    tenth = max(1, len(history) // 10)
    ends = {"first": sum(history[:tenth]) / tenth, "last": sum(history[-tenth:]) / tenth}
    emit(BENCH, "training_loss", ends, "nats/token", settings=settings)
    if before is not None:
        after = mean_loss(tuned.get_base_model(), held, lora.token_budget)
        emit(BENCH, "held_out_loss", {"before": before, "after": after}, "nats/token", settings=settings)


if __name__ == "__main__":
    main()
