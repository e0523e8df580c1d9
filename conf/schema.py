"""Settings as frozen dataclasses: what the YAML files beside this one may hold.

Hydra's DictConfig ends here: `settings()` turns it into these and rejects what is unknown or of the wrong type.
A comment on what a field does stands in the YAML file where a user meets it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError

from connectors.redaction import check_no_secret
from curate.corpus.example import ColumnMap
from curate.errors import ConfigError, StorageError
from curate.evaluation.audit_rules import Rule
from curate.models.spec import GenerationSpec, LayerChoice, ModelSpec
from curate.runtime.audit_settings import AuditSettings, WebhookSettings
from curate.runtime.cluster import ClusterSpec
from curate.runtime.latent_settings import GroupSettings, LatentSettings
from curate.runtime.trace_spec import TraceSettings
from curate.training.arms import SweepSpec
from curate.training.sae_settings import SaeSettings
from curate.training.spec import LoraSpec, TrainingSpec

_STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


@dataclass(frozen=True)
class Source:
    url: str | list[str]
    name: str
    format: str = "auto"
    columns: ColumnMap = field(default_factory=ColumnMap)
    max_rows: int | None = None
    generate_rows: int | None = None
    unit_rows: int = 512
    max_tokens: int = 2048
    overlong: Literal["quarantine", "truncate"] = "quarantine"
    max_bad_fraction: float = 0.1
    skip_broken_shards: bool = False
    positive_label: str | None = None


@dataclass(frozen=True)
class Sink:
    url: str
    store: str
    scores: str | None = None


@dataclass(frozen=True)
class Selector:
    mode: Literal["remove_most", "remove_least", "keep_most", "keep_least"]
    fraction: float | None = None
    count: int | None = None
    threshold: float | None = None
    column: str | None = None
    per_group: bool = False


@dataclass(frozen=True)
class ConceptSettings:
    kind: Literal["persona", "probe", "file", "sae"]
    path: str | list[str] | None = None
    method: Literal["teacher_forced", "rollouts"] = "teacher_forced"
    rollouts: int = 10
    max_new_tokens: int = 256
    with_instruction: bool = False
    trait_threshold: float = 50.0
    coherence_threshold: float = 50.0
    format: str = "auto"
    columns: ColumnMap = field(default_factory=ColumnMap)
    positive_label: str | None = None
    name: str | None = None
    key: str | None = None
    layer: int | None = None
    max_rows: int = 5000
    allow_other_model: bool = False
    latents: list[int] = field(default_factory=list)
    scale: float | None = None


@dataclass(frozen=True)
class Tuned:
    path: str | None = None
    adapter: str | None = None
    merge: bool = True


@dataclass(frozen=True)
class Query:
    kind: Literal["trait", "file", "on_policy"]
    path: str | None = None
    max_queries: int | None = None
    columns: ColumnMap = field(default_factory=ColumnMap)
    positive: str = "positive"
    negative: str = "negative"
    wrong_option: bool = False
    questions: Literal["extract", "evaluate"] = "evaluate"
    samples: int = 4
    max_new_tokens: int = 256
    keep: int = 5
    coherence_threshold: float = 50.0


@dataclass(frozen=True)
class Curvature:
    kind: Literal["ekfac", "kfac", "diagonal", "identity", "cg"] = "ekfac"
    examples: int = 5000
    max_tokens: int = 1536
    fisher: Literal["sampled", "empirical"] = "sampled"
    tokens: Literal["loss", "all"] = "all"
    reduction: Literal["mean", "sum"] = "mean"
    seed: int = 0
    layers: LayerChoice = field(default_factory=LayerChoice)
    damping: float = 0.1
    damping_kind: Literal["relative", "absolute"] = "relative"
    rank: int | None = None
    shard_rows: int = 64
    product: Literal["gauss_newton", "hessian"] = "gauss_newton"
    rows: int = 64
    iterations: int = 20
    tolerance: float = 1e-4
    block: int = 4
    save_every: int = 5


@dataclass(frozen=True)
class Judge:
    kind: Literal["none", "openai", "vllm", "classifier", "probe"] = "none"
    base_url: str | None = None
    model: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    timeout: float = 60.0
    attempts: int = 6
    requests_per_minute: int | None = None
    path: str | None = None
    chat_template: str | None = None
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_tokens: int = 2048
    label: str | int | None = None
    reads: Literal["answer", "pair"] = "answer"
    rows: str | list[str] | None = None
    format: str = "auto"
    columns: ColumnMap = field(default_factory=ColumnMap)
    positive_label: str | int | bool | None = None
    layer: int | None = None
    max_rows: int = 5000


@dataclass(frozen=True)
class Report:
    title: str
    examples: int = 8
    tokens: bool = False
    bootstrap: int = 1000


@dataclass(frozen=True)
class Study:
    rows: int = 512
    max_stride: int | None = None
    level: float = 0.9


@dataclass(frozen=True)
class EvaluationSettings:
    base: bool = True
    adapters: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """Everything a job may be told."""

    source: Source
    model: ModelSpec
    selector: Selector
    sink: Sink
    generation: GenerationSpec
    judge: Judge
    tuned: Tuned
    query: Query
    curvature: Curvature
    cluster: ClusterSpec
    report: Report
    study: Study
    training: TrainingSpec
    sweep: SweepSpec
    evaluation: EvaluationSettings
    sae: SaeSettings
    trace: TraceSettings
    latents: LatentSettings
    groups: GroupSettings
    audit: AuditSettings
    # An empty list of choices leaves the key out.
    concept: dict[str, ConceptSettings] | None = None
    scorer: dict[str, dict[str, Any] | None] | None = None
    evaluator: dict[str, dict[str, Any] | None] | None = None
    seed: int = 0
    plan: bool = False


for _cls in (
    ColumnMap,
    ModelSpec,
    GenerationSpec,
    Source,
    Sink,
    Selector,
    ConceptSettings,
    Judge,
    Tuned,
    Query,
    Curvature,
    LayerChoice,
    ClusterSpec,
    Report,
    Study,
    LoraSpec,
    TrainingSpec,
    SweepSpec,
    EvaluationSettings,
    SaeSettings,
    TraceSettings,
    LatentSettings,
    GroupSettings,
    Rule,
    WebhookSettings,
    AuditSettings,
    Settings,
):
    setattr(_cls, "__pydantic_config__", _STRICT)  # noqa: B010  (pydantic reads it; stdlib dataclasses do not declare it)


def _no_secrets(value: Any, where: str) -> None:
    """
    Raises:
        ConfigError: a text is a URL with credentials or a signature in it, which would end up in logs and recipes.
    """
    if isinstance(value, Mapping):
        for name, inner in value.items():
            _no_secrets(inner, f"{where}.{name}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            _no_secrets(inner, where)
    elif isinstance(value, str):
        try:
            check_no_secret(value)
        except StorageError as e:
            raise ConfigError(f"{where}: {e}") from None


def settings(config: DictConfig) -> Settings:
    """Frozen settings from a composed config.

    Raises:
        ConfigError: a missing, unknown or wrongly typed value; names the field, the value and what is allowed.
    """
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as e:
        raise ConfigError(f"{e.full_key} is not set; give it on the command line: {e.full_key}=…") from None
    except OmegaConfBaseException as e:
        raise ConfigError(f"the configuration cannot be resolved: {e}") from None
    _no_secrets(plain, "")
    try:
        return TypeAdapter(Settings).validate_python(plain)
    except ValidationError as e:
        lines = []
        for err in e.errors()[:8]:
            where = ".".join(str(p) for p in err["loc"] if not str(p).startswith(("list[", "str", "int")))
            if err["type"] == "unexpected_keyword_argument":  # without the value: a key may stand where none belongs
                lines.append(f"  {where}: there is no such option")
                continue
            shown = repr(err["input"])
            lines.append(f"  {where} = {shown if len(shown) < 120 else shown[:119] + '…'}: {err['msg']}")
        raise ConfigError("these settings do not fit:\n" + "\n".join(lines)) from None
