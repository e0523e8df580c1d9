"""A judge that is a named classifier: 100 × the probability that it gives one of its labels.

In: a sequence classifier in Hugging Face layout (safetensors), the label to read, pairs. Out: JudgeScores. Knows no
cluster, no cache and no trait: the template says nothing to it, it has the one question that it was trained for.
Softmax over the labels; sigmoid where the classifier has one label or was trained for several at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from transformers import AutoConfig, PretrainedConfig

from curate.errors import ConfigError, ModelError, near
from curate.evaluation.judge import JudgeScore
from curate.models.batching import token_batches
from curate.models.complete import check_complete
from curate.models.load import ModelSpec, load_tokenizer, resolve, resolve_device, resolve_dtype


@dataclass(frozen=True)
class ClassifierSpec:
    """`label`: name or index; None where the classifier has only one. `reads`: the answer alone, or the question and
    the answer as two texts. What is longer than `max_tokens` is cut, and the score says so."""

    model: ModelSpec
    label: str | None = None
    reads: Literal["answer", "pair"] = "answer"
    max_tokens: int = 512


def label_index(config: PretrainedConfig, label: str | None, path: str) -> int:
    """Which output `label` names.

    Raises:
        ConfigError: there is no such label, or none is named and there are several.
    """
    names = [str(name) for _, name in sorted((int(i), name) for i, name in (config.id2label or {}).items())]
    if label is None:
        if len(names) == 1:
            return 0
        raise ConfigError(f"judge.label is not set; the classifier {path!r} has the labels {', '.join(names)}")
    if label in names:
        return names.index(label)
    if label.isascii() and label.isdigit() and int(label) < len(names):
        return int(label)
    raise ConfigError(f"judge.label is {label!r}: the classifier {path!r} has no such label{near(label, names)}")


def classifier_config(spec: ClassifierSpec) -> PretrainedConfig:
    """The classifier's config, its label checked. Loads no weights.

    Raises:
        ModelError: nothing there, or a config that cannot be read. ConfigError: see `label_index`.
    """
    folder = resolve(spec.model)
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise ModelError(f"the config of the classifier {spec.model.path!r} cannot be read: {error}") from error
    label_index(config, spec.label, spec.model.path)
    return config


class ClassifierJudge:
    """See the module's docstring. `token_budget`: padded tokens of a batch."""

    reads_template: ClassVar[bool] = False

    def __init__(self, spec: ClassifierSpec, token_budget: int) -> None:
        """
        Raises:
            ModelError: the classifier cannot be loaded, or has weights that are in no file of it.
            ConfigError: the label.
        """
        config = classifier_config(spec)
        self.spec, self.budget = spec, token_budget
        self.device = resolve_device(spec.model.device)
        self.tokenizer = load_tokenizer(spec.model)
        self.model = _load(resolve(spec.model), spec.model, self.device)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.model.config.pad_token_id is None:  # heads on decoders look for the last token that is no padding
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.index = label_index(config, spec.label, spec.model.path)
        self.single = config.num_labels == 1 or config.problem_type == "multi_label_classification"
        room = getattr(config, "max_position_embeddings", None) or spec.max_tokens
        pad = self.tokenizer.pad_token_id or 0  # RoBERTa's positions begin behind the padding's
        self.longest = min(spec.max_tokens, room - (pad + 1 if "roberta" in config.model_type else 0))

    @torch.no_grad()
    def __call__(self, pairs: Sequence[tuple[str, str]], prompt_template: str = "") -> list[JudgeScore]:
        """One JudgeScore a pair, in order; an empty answer has none."""
        out: list[JudgeScore] = [JudgeScore(None, reason="the answer is empty")] * len(pairs)
        rows = [i for i, (_, answer) in enumerate(pairs) if answer.strip()]
        encoded = [self._encode(*pairs[i]) for i in rows]
        for batch in token_batches([len(e["input_ids"]) for e, _ in encoded], self.budget):
            inputs = self.tokenizer.pad([encoded[k][0] for k in batch], return_tensors="pt").to(self.device)
            logits = self.model(**inputs).logits.float()
            p = logits.sigmoid() if self.single else logits.softmax(-1)
            for k, value in zip(batch, p[:, self.index].tolist(), strict=True):
                out[rows[k]] = JudgeScore(100.0 * value, reason=encoded[k][1])
        return out

    def _encode(self, question: str, answer: str) -> tuple[dict[str, Any], str | None]:
        texts = (question, answer) if self.spec.reads == "pair" else (answer,)
        whole = len(self.tokenizer(*texts, verbose=False)["input_ids"])
        if whole <= self.longest:
            return dict(self.tokenizer(*texts)), None
        cut = dict(self.tokenizer(*texts, truncation=True, max_length=self.longest))
        return cut, f"only {self.longest} of {whole} tokens were read"


def _load(folder: Path, spec: ModelSpec, device: torch.device) -> Any:
    from transformers import AutoModelForSequenceClassification  # seconds, which a driver should not pay

    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"the folder of the classifier {spec.path!r} holds no .safetensors weights. Pickled weights (.bin) are not "
            f"read: they can run code. Load it where you trust it and call save_pretrained."
        )
    try:
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            folder,
            dtype=resolve_dtype(spec.dtype, device),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise ModelError(f"the classifier {spec.path!r} cannot be loaded: {error}") from error
    model, info = loaded
    check_complete(info, spec.path, "sequence classifier")
    return model.to(device).eval().requires_grad_(False)
