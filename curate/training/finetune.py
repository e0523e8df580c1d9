"""One fine-tune by Hugging Face's Trainer, in this process or as one of several workers.

In: a model, rows, a TrainingSpec and a URL. Out, below the URL: checkpoints/ while it runs, log.jsonl, adapter/ or
model/, and done.json last. A run that finds a whole checkpoint there goes on from it. The Trainer works in a temporary
folder and reports to nobody. Knows no corpus and no cluster: a worker's rank stands in its environment, as
torch.distributed has it.
"""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from connectors import storage
from curate.errors import TrainingError, WorkerError
from curate.models import adapter as lora
from curate.models.load import DTYPES, ModelSpec, load_tokenizer, resolve_device
from curate.models.peak import device_peak
from curate.training import checkpoints
from curate.training.adapt import causal_lm, load_for_training, seeded
from curate.training.batches import BatchRows, StepPlan, make_batch
from curate.training.flops import TrainingCost, training_cost
from curate.training.log import TrainingLog
from curate.training.loss import sum_response_loss
from curate.training.rows import row_lengths, row_losses
from curate.training.scratch import scratch
from curate.training.spec import TrainingSpec

if TYPE_CHECKING:
    from datasets import Dataset

DONE = "done.json"
CHECKPOINTS = "checkpoints"
# A constant rate warms up too.
_SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
_LEAVE = ("README.md",)  # PEFT's empty model card

Report = Callable[[dict[str, Any]], None]


def finetune(
    training: TrainingSpec,
    model: ModelSpec,
    rows: Dataset,
    url: str,
    report: Report = lambda line: None,
    base: Mapping[str, Any] | None = None,
    peak_tflops: float | None = None,
) -> dict[str, Any]:
    """Train, or go on training. The loss of a step is the mean cross-entropy of all its response tokens (nats).

    Deterministic in `training.seed` on one kind of machine, whatever the number of workers or resumes (to rounding).

    Args:
        report: called by every worker at every line of the log; the same line for all.
        base: what the model is (models.load.identity), to be written beside an adapter, so that no other is put under
            it.
        peak_tflops: what a worker's device can do (10¹² FLOP/s); None: measured on a GPU.

    Returns:
        What done.json holds: steps, rows (of an epoch), tokens (seen in all), flops, seconds, first_loss, final_loss,
        device, peak (FLOP/s that the workers' devices can do together, None: not known), result (the URL of the adapter
        or model).

    Raises:
        TrainingError: no rows, or a loss that is no number; names the step.
        ConfigError: targets that match nothing. WorkerError: the device's memory does not suffice.
    """
    if not len(rows):
        raise TrainingError("there are no rows to train on")
    run = _Run(training, model, rows, url, report, base, peak_tflops)
    with seeded(training.seed), scratch("checkpoints") as folder:
        try:
            return run.go(folder)
        except torch.OutOfMemoryError as error:
            raise WorkerError(
                f"the training does not fit the device's memory ({str(error).split('. ')[0]}). Lower "
                f"training.micro_batch or source.max_tokens, or set training.gradient_checkpointing=true"
            ) from error
        finally:
            gc.collect()  # the Trainer's circles hold model and optimizer, where the next training wants the memory
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


class _Trainer(Trainer):
    """The Trainer with our batches and loss. A loss that is no number ends the training before it spoils weights."""

    loss_is_scaled_for_ga = True

    def __init__(self, plan: StepPlan, rows: Dataset, **named: Any) -> None:
        super().__init__(train_dataset=BatchRows(rows), **named)  # type: ignore[arg-type]
        self.model_accepts_loss_kwargs = True  # so that it counts the labels of a step, over all workers
        self.plan = plan
        self.step_loss: Tensor | float = 0.0

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this worker, all epochs in one pass; never sharded again."""
        return DataLoader(self.train_dataset, batch_sampler=self.plan, collate_fn=make_batch)  # type: ignore[arg-type]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # Gradients are averaged over workers, and this worker's sum is a part of the step's.
        return model(**inputs).loss * (self.accelerator.num_processes / num_items_in_batch)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Weights and configuration alone: no pickled arguments, and no question to a hub about the base model."""
        adapter = {"save_embedding_layers": False} if hasattr(self.model, "peft_config") else {}
        model: Any = self.accelerator.unwrap_model(self.model)  # type: ignore[arg-type]
        model.save_pretrained(output_dir, state_dict=state_dict, **adapter)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.step_loss = self.step_loss + loss
        if self.accelerator.sync_gradients:
            if not math.isfinite(float(self.step_loss)):
                raise TrainingError(
                    f"the loss of step {self.state.global_step + 1} of {self.state.max_steps} is "
                    f"{float(self.step_loss)}: the training diverged, or the model overflows in this precision. Lower "
                    f"training.learning_rate, raise training.warmup_steps, or set training.dtype=float32"
                )
            self.step_loss = 0.0
        return loss


class _Run(TrainerCallback):
    """What one worker does and says: resume, log, checkpoints, the result."""

    def __init__(
        self,
        training: TrainingSpec,
        model: ModelSpec,
        rows: Dataset,
        url: str,
        report: Report,
        base: Mapping[str, Any] | None,
        peak_tflops: float | None,
    ) -> None:
        self.training, self.model, self.rows, self.url, self.report = training, model, rows, url, report
        self.base = base
        self.checkpoints = storage.join(url, CHECKPOINTS)
        self.rank = int(os.environ.get("RANK", 0))
        self.plan = StepPlan(row_lengths(rows), training, self.rank)
        self.seen = self.plan.sums(self.plan.lengths).cumsum()
        self.device = resolve_device(model.device)
        peak = device_peak(self.device, torch.bfloat16 if training.dtype == "bfloat16" else torch.float32, peak_tflops)
        self.peak = None if peak is None else peak * training.workers

    def go(self, folder: Path) -> dict[str, Any]:
        resumed = self._fetch(folder)
        self.log = TrainingLog(self.url, resumed or 0)
        self.before, self.began = self.log.seconds, time.perf_counter()
        model = load_for_training(self.model, self.training)
        self.flops = self._flops(training_cost(model))
        with sum_response_loss(causal_lm(model)):
            arguments = self._arguments(folder)
            trainer = _Trainer(self.plan, self.rows, model=model, args=arguments, callbacks=[self])
            trainer.remove_callback(PrinterCallback)  # which prints every line of the log once more
            trainer.train(resume_from_checkpoint=None if resumed is None else str(folder / f"checkpoint-{resumed}"))
        return self._finish(trainer, folder)

    def _flops(self, cost: TrainingCost) -> np.ndarray:
        """Since the beginning, at the end of each step."""
        lengths = self.plan.lengths
        counts = (self.plan.sums(n).astype(np.float64) for n in (lengths, lengths**2, row_losses(self.rows)))
        return cost.flops(*counts).cumsum()

    def _fetch(self, folder: Path) -> int | None:
        """Copy the newest whole checkpoint to where the Trainer looks for it; its step."""
        step = checkpoints.newest(self.checkpoints)
        if step is not None:
            checkpoints.download(checkpoints.step_url(self.checkpoints, step), folder / f"checkpoint-{step}")
        return step

    def _arguments(self, folder: Path) -> TrainingArguments:
        t, cuda = self.training, self.device.type == "cuda"
        micro, accumulation = t.accumulation
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=1,  # the plan holds all epochs
            learning_rate=t.learning_rate,
            lr_scheduler_type=_SCHEDULES[t.schedule],
            warmup_steps=t.warmup_steps,
            weight_decay=t.weight_decay,
            max_grad_norm=t.max_grad_norm,
            optim="adamw_torch_fused" if cuda else "adamw_torch",
            seed=t.seed,
            bf16=t.dtype == "bfloat16",
            use_cpu=not cuda,
            gradient_checkpointing=t.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            logging_strategy="steps",
            logging_steps=t.log_every,
            logging_first_step=True,
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=t.save_every,
            save_total_limit=1,
            average_tokens_across_devices=True,
            remove_unused_columns=False,
            disable_tqdm=True,
            report_to="none",
            ddp_find_unused_parameters=False,
            ddp_backend=("nccl" if cuda else "gloo") if t.workers > 1 else None,
            fsdp=True if t.strategy == "fsdp" and t.workers > 1 else None,  # type: ignore[arg-type]
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # never the Trainer's own threads over several GPUs
        return arguments

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any
    ) -> TrainerControl:
        if state.global_step >= state.max_steps:  # the result follows: a line of the log, and no checkpoint
            control.should_log, control.should_save = True, False
        return control

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **named: Any
    ) -> None:
        if "loss" not in logs:  # the Trainer's summary at the end
            return
        step = state.global_step
        line = {
            "step": step,
            "of": state.max_steps,
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": float(logs.get("grad_norm", math.nan)),
            "rows": self._rows_seen(step),
            "tokens": int(self.seen[step - 1]),
            "flops": float(self.flops[step - 1]),
            "peak": self.peak,
            "seconds": self.before + time.perf_counter() - self.began,
        }
        self.log.add(line) if self.rank == 0 else self.log.lines.append(line)
        self.report(line)

    def _rows_seen(self, step: int) -> int:
        epochs, rest = divmod(step, self.plan.per_epoch)
        return epochs * len(self.rows) + min(rest * self.training.batch_size, len(self.rows))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any) -> None:
        step = state.global_step
        folder = Path(str(args.output_dir)) / f"checkpoint-{step}"
        # Every worker holds its own random state; all else is the first one's.
        sizes = checkpoints.upload(folder, checkpoints.step_url(self.checkpoints, step), _LEAVE)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            found: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(found, sizes)
            sizes = {name: size for part in found for name, size in part.items()}
        if self.rank == 0:
            self.log.write()
            checkpoints.complete(self.checkpoints, step, sizes)

    def _finish(self, trainer: Trainer, folder: Path) -> dict[str, Any]:
        name = self.training.product
        result = storage.join(self.url, name)
        if name == "model" and not trainer.is_fsdp_enabled:
            trainer.model.to(DTYPES[self.training.dtype])  # type: ignore  # in the precision in which it computed
        trainer.save_model(str(folder / name))
        lines = self.log.lines
        done = {
            "steps": self.plan.steps,
            "rows": len(self.rows),
            "tokens": int(self.seen[-1]),
            "flops": float(self.flops[-1]),
            "seconds": round(lines[-1]["seconds"], 3),
            "first_loss": lines[0]["loss"],
            "final_loss": lines[-1]["loss"],
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "peak": self.peak,
            "result": result,
        }
        if self.rank == 0:
            if name == "model":
                load_tokenizer(self.model).save_pretrained(folder / name)
            else:
                _order_targets(folder / name / lora.CONFIG)
                if self.base is not None:
                    (folder / name / lora.BASE).write_text(json.dumps(dict(self.base), indent=2), encoding="utf-8")
            checkpoints.upload(folder / name, result, _LEAVE)
            self.log.write()
            storage.write_atomic(storage.join(self.url, DONE), json.dumps(done, indent=2) + "\n")
            checkpoints.remove(self.checkpoints)
        return done


def _order_targets(config: Path) -> None:
    """PEFT writes a set in an order of chance; one adapter is to have one digest."""
    body = json.loads(config.read_text(encoding="utf-8"))
    body["target_modules"] = sorted(body["target_modules"])
    config.write_text(json.dumps(body, indent=2, sort_keys=True), encoding="utf-8")
