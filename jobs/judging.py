"""From the `judge` settings to a judge. Holds no mathematics and no data."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch

from connectors import storage
from connectors.packages import expand
from curate.errors import ConfigError
from curate.evaluation.classifier_judge import ClassifierSpec, classifier_config
from curate.evaluation.judge import Judge
from curate.evaluation.openai_judge import OpenAIJudge
from curate.models.engines import vllm_serves
from curate.models.load import ModelSpec, identity
from curate.runtime.judge import DIGITS, PoolJudge, ProbeSpec, classifier_judge, engine_judge, probe_judge
from curate.runtime.labelled import labelled_rows

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline


def make_judge(pipeline: Pipeline) -> Judge | None:
    """The configured judge, or None. Reads a probe's labelled rows, and loads no weights.

    Raises:
        ConfigError: a setting that the judge needs is missing or cannot be met; see also the judges themselves.
        ModelError: the judge's model is not there.
    """
    j = pipeline.config.judge
    match j.kind:
        case "none":
            return None
        case "openai":
            return OpenAIJudge(
                j.model or "",
                j.base_url,
                api_key_env=j.api_key_env,
                concurrency=j.concurrency,
                timeout=j.timeout,
                attempts=j.attempts,
                requests_per_minute=j.requests_per_minute,
                cache_url=storage.join(pipeline.store, "judge"),
            )
        case "vllm":
            return _engine(pipeline)
        case "classifier":
            label = None if j.label is None else str(j.label)  # 1 on the command line is a number
            spec = ClassifierSpec(_model(pipeline, "scorers"), label, j.reads, _longest(pipeline))
            classifier_config(spec)  # the label, before anything is loaded
            return classifier_judge(spec, identity(spec.model), pipeline.store, pipeline.session)
        case "probe":
            return _probe(pipeline)


def _model(pipeline: Pipeline, pool: Literal["scorers", "engines"]) -> ModelSpec:
    """The judge's own model, its precision decided."""
    j = pipeline.config.judge
    if not j.path:
        raise ConfigError(f"judge.path is not set; name the model of the {j.kind} judge")
    gpus = (pipeline.session.scorers if pool == "scorers" else pipeline.session.engines).gpus
    auto: Literal["bfloat16", "float32"] = "bfloat16" if gpus else "float32"
    dtype = auto if j.dtype == "auto" else j.dtype
    device = pipeline.config.model.device
    return ModelSpec(j.path, dtype=dtype, device=device, chat_template=j.chat_template)


def _longest(pipeline: Pipeline) -> int:
    longest = pipeline.config.judge.max_tokens
    if longest < 1:
        raise ConfigError(f"judge.max_tokens is {longest}; it must be at least 1")
    return longest


def _engine(pipeline: Pipeline) -> PoolJudge:
    model, longest, engine = _model(pipeline, "engines"), _longest(pipeline), pipeline.config.judge.engine
    if engine == "auto":
        served = vllm_serves(torch.device("cuda" if pipeline.session.engines.gpus else "cpu"))
        engine = "vllm" if served else "transformers"
    generation = replace(
        pipeline.config.generation,
        engine=engine,
        dtype=model.dtype,
        max_new_tokens=1,
        temperature=0.0,
        max_model_len=longest + DIGITS,
    )
    return engine_judge(model, identity(model), generation, longest, pipeline.store, pipeline.session)


def _probe(pipeline: Pipeline) -> PoolJudge:
    j = pipeline.config.judge
    if j.rows is None or j.positive_label is None:
        missing = "rows" if j.rows is None else "positive_label"
        raise ConfigError(
            f"judge.{missing} is not set; a probe is fitted on labelled rows, one label on the trait's side"
        )
    if j.path:
        model = _model(pipeline, "scorers")
    else:
        model = replace(pipeline.model, dtype=pipeline.model.dtype if j.dtype == "auto" else j.dtype, adapter=None)
    who = identity(model)
    if j.layer is not None and not 0 <= j.layer <= who["layers"]:
        raise ConfigError(f"judge.layer is {j.layer}, but the model has {who['layers']} layers")
    url = expand(j.rows) if isinstance(j.rows, str) else [expand(u) for u in j.rows]
    positive = str(j.positive_label)  # as the rows' labels are read: 1, true
    rows = labelled_rows(url, j.format, j.columns, positive, j.max_rows, "judge's probe", "judge")
    spec = ProbeSpec(model, who, rows, positive, j.layer, _longest(pipeline))
    recipe = {"files": rows.digests, "columns": j.columns.facts(), "max_rows": j.max_rows}
    return probe_judge(spec, recipe, pipeline.store, pipeline.session)
