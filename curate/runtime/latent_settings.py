"""What `curate latents` and `curate groups` may be told: the SAE, what it reads, how rows are told apart or grouped.

Settings alone: nothing here loads, reads or computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from curate.concepts.latent_rows import Statistic, Tokens
from curate.errors import ConfigError
from curate.evaluation.separating import Direction
from curate.selection.groups import Aggregate, GroupMode


@dataclass(frozen=True)
class LatentSettings:
    """See conf/latents/default.yaml for what each setting does.

    Raises:
        ConfigError: on construction, for a number out of its range.
    """

    sae: str | None = None
    allow_other_model: bool = False
    model: Literal["auto", "base", "tuned"] = "auto"
    tokens: Tokens = "response"
    positive_label: str | None = None
    against: str | list[str] | None = None
    statistic: Statistic = "max"
    direction: Direction = "positive"
    min_rows: int = 5
    top: int = 20
    contexts: int = 4
    around: int = 24

    def __post_init__(self) -> None:
        for name, smallest in {"min_rows": 1, "top": 1, "contexts": 0, "around": 0}.items():
            if getattr(self, name) < smallest:
                raise ConfigError(f"latents.{name} is {getattr(self, name)}; it must be at least {smallest}")


@dataclass(frozen=True)
class GroupSettings:
    """See conf/groups/default.yaml for what each setting does; `GroupRule` checks those that it takes.

    Raises:
        ConfigError: on construction, for a number out of its range.
    """

    column: str | None = None
    threshold: float = 0.1
    aggregate: Aggregate = "mean"
    mode: GroupMode = "remove_most"
    fraction: float = 0.1
    min_members: int = 5
    max_share: float = 0.5
    write: bool = True
    random_orders: int = 20
    shown: int = 25

    def __post_init__(self) -> None:
        for name, smallest in {"random_orders": 0, "shown": 1}.items():
            if getattr(self, name) < smallest:
                raise ConfigError(f"groups.{name} is {getattr(self, name)}; it must be at least {smallest}")
