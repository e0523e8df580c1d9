"""What `curate trace` may be told: the SAE, the candidates, and how much of what is found is kept and shown.

Settings alone: nothing here loads, reads or computes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from curate.errors import ConfigError

KS = [10, 25, 50, 75, 100, 125, 150, 175, 200]


@dataclass(frozen=True)
class TraceSettings:
    """See conf/trace/default.yaml for what each setting does.

    Raises:
        ConfigError: on construction, for a number out of its range.
    """

    sae: str | None = None
    layer: int | None = None
    scale: float | None = None
    allow_other_model: bool = False
    items: int | None = None
    keep: float | None = 0.1
    min_cosine: float | None = None
    backend: str = "reverse_over_forward"
    sign: Literal["ours", "paper"] = "ours"
    token_latents: int | None = 8
    rows: int = 5
    latents: int = 12
    contexts: int = 4
    ks: list[int] = field(default_factory=lambda: list(KS))
    orthogonality_rows: int = 128

    def __post_init__(self) -> None:
        least = {"items": 1, "token_latents": 1, "rows": 1, "latents": 1, "contexts": 0, "orthogonality_rows": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ConfigError(f"trace.{name} is {value}; it must be at least {smallest}")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ConfigError(
                f"trace.keep is {self.keep}; it is a share above 0, up to 1 (null: all rows, no pre-filter)"
            )
        if self.min_cosine is not None and not -1 <= self.min_cosine <= 1:
            raise ConfigError(f"trace.min_cosine is {self.min_cosine}; a cosine lies between -1 and 1")
        if self.min_cosine is not None and self.keep is None:
            raise ConfigError(
                "trace.min_cosine needs the pre-filter, which trace.keep=null leaves out; set trace.keep=1"
            )
        if any(k < 1 for k in self.ks):
            raise ConfigError(f"trace.ks holds {min(self.ks)}; each is a number of latents, at least 1")
