"""Conjugate gradients: s = (H + λI)⁻¹∇f for several ∇f at once, from products with H alone (METHODS §5).

In: right-hand sides by layer name [q, out, in], and a function that multiplies such vectors with H. Out: solutions of
the same form and a Report. Knows no model and no file; a State can be stored after any step and gone on with.

Each of the q systems has step sizes of its own, and one product a step serves all that still run. One ends when its
residual ‖b − (H + λI)x‖ is at most `tolerance` · ‖b‖, or where a direction of negative curvature shows that H + λI is
not positive definite: x then stays what it was before that step, and the report says so. Dot products are float64.
The residual is CG's own, carried from step to step; in float32 it loses touch with the true one below about 1e-6.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from curate.curvature.products import Product, Vectors
from curate.errors import ConfigError, CurvatureError, near

log = logging.getLogger(__name__)

Multiply = Callable[[Mapping[str, Tensor]], Vectors]
FACT = "fact/"
_PARTS = ("x", "r", "p")
_FACTS = ("size", "residuals", "iterations", "negative", "stopped")
_PROBES = 8


@dataclass(frozen=True)
class CGSpec:
    """How test vectors are solved for by conjugate gradients. Damping is not part of it.

    product: Gauss–Newton (positive semi-definite, stable) or the full Hessian.
    rows: of the corpus, drawn by `seed`, whose mean loss H is of. max_tokens: longer ones are cut.
    iterations: at most. tolerance: of the residual, relative to the gradient.
    block: gradients solved side by side in one worker, whose memory holds 6 vectors of each.
    save_every: steps after which the state is stored, which is what a kill can cost.

    Raises:
        ConfigError: on construction, for an unknown product or a number out of range.
    """

    product: Product = "gauss_newton"
    rows: int = 64
    iterations: int = 20
    tolerance: float = 1e-4
    block: int = 4
    save_every: int = 5
    max_tokens: int = 1536
    seed: int = 0

    def __post_init__(self) -> None:
        if self.product not in get_args(Product):
            raise ConfigError(f"curvature.product is {self.product!r}{near(self.product, get_args(Product))}")
        for name in ("rows", "iterations", "block", "save_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"curvature.{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.tolerance < 1:
            raise ConfigError(f"curvature.tolerance is {self.tolerance}; it must lie between 0 and 1")
        if self.max_tokens < 2:
            raise ConfigError(f"curvature.max_tokens is {self.max_tokens}; it must be at least 2")


@dataclass(frozen=True)
class Report:
    """How a solve went, item by item.

    iterations: steps that each item took. residuals [steps + 1][q]: ‖r‖/‖b‖ before the first step and after each one
    (an item that has ended keeps its last). converged: the tolerance was reached. negative: steps at which the
    direction's own curvature pᵀHp was below 0, damping not counted (always 0 for Gauss–Newton, but for rounding).
    stopped: ended by pᵀ(H + λI)p ≤ 0. damping: λ itself.
    """

    names: tuple[str, ...]
    iterations: tuple[int, ...]
    residuals: tuple[tuple[float, ...], ...]
    converged: tuple[bool, ...]
    negative: tuple[int, ...]
    stopped: tuple[bool, ...]
    damping: float

    @property
    def last(self) -> tuple[float, ...]:
        """The residual that each item ended with."""
        return self.residuals[-1]

    def __str__(self) -> str:
        done, worst = sum(self.converged), max(range(len(self.names)), key=lambda i: self.last[i])
        text = (
            f"{done} of {len(self.names)} converged after at most {max(self.iterations)} steps, largest residual "
            f"{self.last[worst]:.2g} ({self.names[worst]})"
        )
        if met := sum(n > 0 for n in self.negative):
            text += f"; negative curvature met by {met}, which ended {sum(self.stopped)}"
        return text

    def warnings(self, tolerance: float) -> list[str]:
        """What a user has to know: items that have not converged, and those that negative curvature ended."""
        found = []
        for i, name in enumerate(self.names):
            if self.stopped[i]:
                found.append(
                    f"the curvature is not positive definite for {name!r}: its solve ended at step "
                    f"{self.iterations[i] + 1} with the residual {self.last[i]:.3g}; use "
                    f"curvature.product=gauss_newton, or raise the damping ({self.damping:.3g})"
                )
            elif not self.converged[i]:
                found.append(
                    f"the solve of {name!r} has not converged: residual {self.last[i]:.3g} after {self.iterations[i]} "
                    f"steps, wanted {tolerance:.3g}; raise curvature.iterations or the damping ({self.damping:.3g})"
                )
        return found

    def body(self) -> dict[str, Any]:
        """As JSON values, by item."""
        course = [list(values) for values in zip(*self.residuals, strict=True)]
        values = zip(self.iterations, course, self.converged, self.negative, self.stopped, strict=True)
        keys = ("iterations", "residuals", "converged", "negative", "stopped")
        return {name: dict(zip(keys, v, strict=True)) for name, v in zip(self.names, values, strict=True)}

    @staticmethod
    def join(reports: Sequence[Report]) -> Report:
        """Of several solves side by side, as one."""
        steps = max(len(r.residuals) for r in reports)
        rows = [[r.residuals[min(k, len(r.residuals) - 1)] for r in reports] for k in range(steps)]

        def all_of(attribute: str) -> tuple[Any, ...]:
            return tuple(v for r in reports for v in getattr(r, attribute))

        return Report(
            all_of("names"),
            all_of("iterations"),
            tuple(tuple(v for part in row for v in part) for row in rows),
            all_of("converged"),
            all_of("negative"),
            all_of("stopped"),
            reports[0].damping,
        )


@dataclass(eq=False)
class State:
    """A solve between two steps: x, r, p by layer [q, out, in], and what is told of each item [q]."""

    x: Vectors
    r: Vectors
    p: Vectors
    size: Float[Tensor, " q"]  # ‖b‖
    residuals: Float[Tensor, "steps q"]
    iterations: Int[Tensor, " q"]
    negative: Int[Tensor, " q"]
    stopped: Int[Tensor, " q"]  # 0 or 1

    @property
    def steps(self) -> int:
        return len(self.residuals) - 1

    def running(self, tolerance: float) -> Tensor:
        """Which items have steps to take [q]."""
        return ~self.stopped.bool() & (self.residuals[-1] > tolerance)

    def tensors(self) -> dict[str, Tensor]:
        """Everything, for safetensors."""
        vectors = {f"{part}/{name}": v for part in _PARTS for name, v in getattr(self, part).items()}
        return {**vectors, **{FACT + name: getattr(self, name) for name in _FACTS}}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], device: torch.device | str = "cpu") -> Self:
        """What `tensors` gave, again; of those whose keys begin with FACT alone, a state without vectors, to report."""

        def part(name: str) -> Vectors:
            return {k.removeprefix(f"{name}/"): v.to(device) for k, v in tensors.items() if k.startswith(f"{name}/")}

        facts = [tensors[FACT + name] for name in _FACTS]
        return cls(part("x"), part("r"), part("p"), *facts)


def start(b: Mapping[str, Float[Tensor, "q out in"]], names: Sequence[str]) -> State:
    """The state before the first step, x = 0.

    Raises:
        CurvatureError: a right-hand side that is zero or not finite; names the item.
    """
    size = _dot(b, b).sqrt()
    for name, value in zip(names, size.tolist(), strict=True):
        if not 0 < value < float("inf"):
            what = "zero" if value == 0 else "not finite"
            raise CurvatureError(f"the gradient of {name!r} is {what}: there is nothing to solve for")
    q = len(size)
    zeros = torch.zeros(q, dtype=torch.int64)
    x = {name: torch.zeros_like(v) for name, v in b.items()}
    r, p = ({name: v.clone() for name, v in b.items()} for _ in range(2))
    return State(x, r, p, size, torch.ones((1, q), dtype=torch.float64), zeros, zeros.clone(), zeros.clone())


def advance(
    state: State, multiply: Multiply, damping: float, until: int, tolerance: float, names: Sequence[str]
) -> State:
    """Go on, in place, until `until` steps are done in all, or no item has one to take. Returns `state`.

    Raises:
        CurvatureError: a step that is not finite; names the item.
    """
    while state.steps < until and bool((live := state.running(tolerance)).any()):
        at = live.nonzero()[:, 0]
        p = {name: v[at] for name, v in state.p.items()}
        hp = multiply(p)
        plain, square = _dot(p, hp), _dot(p, p)
        curved = plain + damping * square
        for i, value in zip(at.tolist(), curved.tolist(), strict=True):
            if value != value or abs(value) == float("inf"):
                raise CurvatureError(
                    f"step {state.steps + 1} of the solve of {names[i]!r} is not finite; run the model in float32, or "
                    f"raise the damping ({damping:.3g})"
                )
        state.negative[at] += plain < 0
        good = curved > 0
        state.stopped[at[~good]] = 1
        residual = state.residuals[-1].clone()
        if bool(good.any()):
            residual[at[good]] = _step(state, at[good], _rows(p, good), _rows(hp, good), curved[good], damping)
            state.iterations[at[good]] += 1
        state.residuals = torch.cat([state.residuals, residual[None]])
    return state


def finish(state: State, damping: float, tolerance: float, names: Sequence[str]) -> Report:
    """What came of it; of `state` nothing but what it tells of the items is read.

    Raises:
        CurvatureError: an item that did not move: its first direction already had negative curvature.
    """
    for i, name in enumerate(names):
        if int(state.iterations[i]) == 0:
            raise CurvatureError(
                f"the solve of {name!r} did not take a step: along its own gradient the curvature is negative by more "
                f"than the damping ({damping:.3g}). Use curvature.product=gauss_newton, or raise curvature.damping"
            )
    return Report(
        tuple(names),
        tuple(state.iterations.tolist()),
        tuple(tuple(row) for row in state.residuals.tolist()),
        tuple((state.residuals[-1] <= tolerance).tolist()),
        tuple(state.negative.tolist()),
        tuple(bool(v) for v in state.stopped.tolist()),
        damping,
    )


def conjugate_gradient(
    multiply: Multiply,
    b: Mapping[str, Float[Tensor, "q out in"]],
    damping: float,
    iterations: int = 20,
    tolerance: float = 1e-4,
    names: Sequence[str] | None = None,
) -> tuple[Vectors, Report]:
    """x with (H + damping · I) x ≈ b, in one go; `multiply` gives H p. What a user has to know is logged as a warning.

    Raises:
        CurvatureError: see `start`, `advance`, `finish`.
    """
    names = names or [str(i) for i in range(len(next(iter(b.values()))))]
    state = advance(start(b, names), multiply, damping, iterations, tolerance, names)
    report = finish(state, damping, tolerance, names)
    for warning in report.warnings(tolerance):
        log.warning("conjugate gradient: %s", warning)
    return state.x, report


def mean_eigenvalue(multiply: Multiply, like: Mapping[str, Tensor], seed: int = 0) -> float:
    """tr(H)/n over all weights, n their number, by Hutchinson's estimate: the mean of zᵀHz/n over 8 vectors of random
    signs. `like`: any vectors of the weights' form.

    Raises:
        CurvatureError: it is not above 0: then no damping is relative to it.
    """
    maker = torch.Generator().manual_seed(seed)
    probes = {
        name: torch.randint(0, 2, (_PROBES, *v.shape[1:]), generator=maker).mul_(2).sub_(1).to(v)
        for name, v in like.items()
    }
    mean = float(_dot(probes, multiply(probes)).mean()) / sum(v.shape[1] * v.shape[2] for v in like.values())
    if not 0 < mean < float("inf"):
        raise CurvatureError(
            f"the mean eigenvalue of the curvature is about {mean:.3g}: a damping cannot be relative to it. Set "
            f"curvature.damping_kind=absolute, or use curvature.product=gauss_newton"
        )
    return mean


def _step(
    state: State, at: Tensor, p: Vectors, hp: Vectors, curved: Float[Tensor, " n"], damping: float
) -> Float[Tensor, " n"]:
    """One step of the items `at`, in place; their relative residuals."""
    before = (state.residuals[-1][at] * state.size[at]).square()
    along = before / curved
    for name in p:
        alpha = along.to(p[name])[:, None, None]
        state.x[name][at] += alpha * p[name]
        state.r[name][at] -= alpha * (hp[name].to(p[name]) + damping * p[name])
    r = _rows(state.r, at)
    after = _dot(r, r)
    for name in p:
        beta = (after / before).to(p[name])[:, None, None]
        state.p[name][at] = r[name] + beta * p[name]
    return after.sqrt() / state.size[at]


def _rows(vectors: Mapping[str, Tensor], at: Tensor) -> Vectors:
    return {name: v[at] for name, v in vectors.items()}


def _dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Float[Tensor, " q"]:
    """⟨a, b⟩ of every item over all layers, float64, on the CPU."""
    parts = [torch.linalg.vecdot(v.flatten(1).double(), b[name].flatten(1).double()).cpu() for name, v in a.items()]
    return torch.stack(parts).sum(0)
