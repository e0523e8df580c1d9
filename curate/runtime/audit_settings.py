"""What `curate audit` may be told: the baseline, what is compared by which rules, who is told, what is kept.

Settings alone: nothing here loads, reads or computes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import date
from typing import Literal

from curate.errors import ConfigError
from curate.evaluation.audit_rules import Rule

DAY_GROUPS = ("year", "month", "day")


@dataclass(frozen=True)
class WebhookSettings:
    """See conf/audit/default.yaml. The secret and, with `url_env`, the URL come from the environment: a URL may be a
    secret too, and settings are printed and shipped."""

    url: str | None = None
    url_env: str | None = None
    secret_env: str = "CURATE_WEBHOOK_SECRET"
    told_of: Literal["fail", "warn", "always"] = "fail"
    allowed_hosts: list[str] = field(default_factory=list)
    private_hosts: list[str] = field(default_factory=list)
    timeout: float = 10.0
    attempts: int = 5

    def __post_init__(self) -> None:
        if self.url is not None and self.url_env is not None:
            raise ConfigError("audit.webhook.url and audit.webhook.url_env are both set; give one of them")
        if self.timeout <= 0 or self.attempts < 1:
            raise ConfigError(
                f"audit.webhook.timeout={self.timeout} and audit.webhook.attempts={self.attempts} must be above 0"
            )


@dataclass(frozen=True)
class AuditSettings:
    """See conf/audit/default.yaml for what each setting does.

    Raises:
        ConfigError: on construction, for a value out of its range.
    """

    baseline: str | int = "first"
    threshold: float | None = None
    threshold_quantile: float = 0.95
    column: str | None = None
    worst: Literal["highest", "lowest"] = "highest"
    worst_rows: int = 10
    by: Literal["folder", "file", "group", "none"] = "folder"
    day: str = r"(?P<year>20\d\d)[-_/]?(?P<month>[01]\d)[-_/]?(?P<day>[0-3]\d)"
    bins: int = 10
    languages: int = 2000
    new_share: float = 0.01
    rules: list[Rule] = field(default_factory=list)
    backfill: list[str] | None = None
    keep: int = 30
    lease_seconds: float = 300.0
    locked: Literal["fail", "skip", "wait"] = "fail"
    nothing_new: Literal["fine", "repeat"] = "fine"
    webhook: WebhookSettings = field(default_factory=WebhookSettings)

    def __post_init__(self) -> None:
        for name, least in (("worst_rows", 0), ("bins", 2), ("languages", 0), ("keep", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"audit.{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 < self.threshold_quantile < 1:
            raise ConfigError(f"audit.threshold_quantile is {self.threshold_quantile}; it must lie between 0 and 1")
        if not 0 <= self.new_share < 1:
            raise ConfigError(f"audit.new_share is {self.new_share}; it is a share from 0 to less than 1")
        if self.lease_seconds < 1:
            raise ConfigError(f"audit.lease_seconds is {self.lease_seconds}; it must be at least 1")
        try:
            groups = set(re.compile(self.day).groupindex)
        except re.error as e:
            raise ConfigError(f"audit.day is no regular expression: {e}") from None
        if not groups.issuperset(DAY_GROUPS):
            raise ConfigError(f"audit.day needs the groups {', '.join(DAY_GROUPS)}: (?P<year>…)(?P<month>…)(?P<day>…)")
        self.days  # noqa: B018  (raises where the range is none)

    @property
    def days(self) -> tuple[date, date] | None:
        """First and last day of a backfill.

        Raises:
            ConfigError: not two dates in order.
        """
        if self.backfill is None:
            return None
        try:
            first, last = (date.fromisoformat(d) for d in self.backfill)
        except (ValueError, TypeError):
            raise ConfigError(
                f"audit.backfill is {self.backfill!r}; give the first and the last day: "
                f"audit.backfill=[2026-11-01,2026-11-30]"
            ) from None
        if first > last:
            raise ConfigError(f"audit.backfill ends ({last}) before it begins ({first})")
        return first, last
