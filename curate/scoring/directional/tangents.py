"""Tangent rules by hand: what a linear layer, RMSNorm, a gated SiLU, rotary positions and causal attention do to a
value and to the Q directions in which it is moved.

In and out: stacks [tokens, 1 + q, ...] of a value (index 0) and its q tangents; [tokens, 1, ...] where nothing moves
yet. Value and tangents lie side by side, so that one matrix product serves both. Knows no model and no loss.
Sums of the norms are float32 in half precision. Several rules write over their arguments, as each says.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# A layer's block of s: (S [q, out, in],) or (u [q, out, r], v [q, r, in]).
Direction = tuple[Tensor, ...]
Stack = Float[Tensor, "n p d"]
# Attention scores held at once: 8 MiB in float32, which caches can keep; more on a GPU.
_SCORES_CPU, _SCORES_GPU = 2 * 2**20, 64 * 2**20
_QUERY_ROWS = 256


def linear(x: Stack, weight: Float[Tensor, "out in"], bias: Tensor | None, s: Direction | None) -> Stack:
    """W x + b; tangents W ẋ + S x, where S is how the weight itself moves (None: it does not)."""
    n, p, _ = x.shape
    out = F.linear(x.reshape(n * p, -1), weight).view(n, p, -1)
    if bias is not None:
        out[:, 0] += bias
    if s is None:
        return out
    value = x[:, 0]
    queries = s[0].shape[0]
    if p == 1:
        out = torch.cat([out, out.new_empty((n, queries, out.shape[-1]))], dim=1)
    for q in range(queries):
        moved = out[:, 1 + q]
        left, right = (value, s[0][q]) if len(s) == 1 else (value @ s[1][q].T, s[0][q])
        if p == 1:
            moved.copy_(left @ right.T)
        else:
            moved.addmm_(left, right.T)
    return out


def add(x: Stack, y: Stack) -> Stack:
    """x + y, where one of the two may have no tangents yet. Writes over the one that has."""
    if x.shape[1] == y.shape[1]:
        return y.add_(x)
    more, less = (x, y) if x.shape[1] > y.shape[1] else (y, x)
    more[:, :1] += less
    return more


def widened(x: Stack, p: int) -> Stack:
    """x with zero tangents where it has none."""
    return x if x.shape[1] == p else torch.cat([x, x.new_zeros((x.shape[0], p - 1, *x.shape[2:]))], dim=1)


def rms_norm(
    x: Float[Tensor, "n p *heads d"], weight: Float[Tensor, " d"], eps: float
) -> Float[Tensor, "n p *heads d"]:
    """w ⊙ n with n = x r, r = (mean x² + eps)^-½; the tangent of n is r (ẋ - n mean(n ẋ))."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    value, d = wide[:, :1], x.shape[-1]
    r = torch.linalg.vector_norm(value, dim=-1, keepdim=True).square_().div_(d).add_(eps).rsqrt_()
    n = value * r
    if x.shape[1] == 1:
        return n.to(x.dtype).mul_(weight)
    moved = wide[:, 1:]
    along = torch.linalg.vecdot(n.expand_as(moved), moved).unsqueeze(-1).div_(-d)
    out = torch.empty_like(x)
    out[:, :1] = n
    out[:, 1:] = torch.addcmul(moved, n, along).mul_(r)
    return out.mul_(weight)


def silu_gate(gate: Stack, up: Stack) -> Stack:
    """silu(g) ⊙ u. Writes over both."""
    if gate.shape[1] != up.shape[1]:
        p = max(gate.shape[1], up.shape[1])
        gate, up = widened(gate, p), widened(up, p)
    value = gate[:, :1]
    opened = F.silu(value)
    if gate.shape[1] > 1:
        moved = gate[:, 1:]
        moved.mul_(up[:, :1])
        slope = torch.ops.aten.silu_backward(moved, value.expand_as(moved))
        torch.addcmul(slope, opened, up[:, 1:], out=moved)
    torch.mul(opened, up[:, :1], out=value)
    return gate


def rotate(
    x: Float[Tensor, "b t p h d"], cos: Float[Tensor, "b t d"], sin: Float[Tensor, "b t d"], scale: float = 1.0
) -> Float[Tensor, "p b h t d"]:
    """Rotary positions, which are linear: value and tangents turn alike. The two halves of a head are one pair."""
    b, t, p, h, d = x.shape
    half = d // 2
    out = x.new_empty((p, b, h, t, d))
    cos, sin = cos[:, :, :half].mul(scale)[:, None], sin[:, :, :half].mul(scale)[:, None]
    first, second = x.permute(2, 0, 3, 1, 4).split(half, dim=-1)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out


def causal_attention(
    q: Float[Tensor, "p b h t d"],
    k: Float[Tensor, "p b g t d"],
    v: Float[Tensor, "p b g t d"],
    window: int | None = None,
) -> Float[Tensor, "b t p hd"]:
    """softmax(q kᵀ) v over the tokens before (the last `window` of them), q already scaled; g heads of k serve h of q.

    With P the probabilities and Ṡ = q̇ kᵀ + q k̇ᵀ: Ȯ = (P∘Ṡ) v + P v̇ - rowsum(P∘Ṡ) O. Blocks of query rows at a time,
    against the keys up to the block's last row: neither [t, t] for all heads nor the part above the diagonal is made.
    """
    p, b, h, t, d = q.shape
    groups, width = k.shape[2], v.shape[-1]
    per = h // groups
    limit = _SCORES_CPU if q.device.type == "cpu" else _SCORES_GPU
    out = q.new_empty((b, t, p, h * width))
    rows = min(t, _QUERY_ROWS)
    batch = max(1, limit // (h * rows * t))
    at = torch.arange(t, device=q.device)
    for first in range(0, t, rows):
        last = min(t, first + rows)
        low = 0 if window is None else max(0, first - window + 1)
        hidden = at[low:last] > at[first:last, None]
        if window is not None:
            hidden |= at[low:last] <= at[first:last, None] - window
        for i in range(0, b, batch):
            part = slice(i, i + batch)
            n = len(range(*part.indices(b)))
            qs = q[:, part, :, first:last].reshape(p, n * groups, per * (last - first), d)
            ks = k[:, part, :, low:last].reshape(p, n * groups, last - low, d)
            vs = v[:, part, :, low:last].reshape(p, n * groups, last - low, width)
            found = _attend(qs, ks, vs, hidden, per)
            # [p, n, groups, per, rows, width] -> [n, rows, p, groups · per · width]
            found = found.view(p, n, groups, per, last - first, width).permute(1, 4, 0, 2, 3, 5)
            out[part, first:last] = found.reshape(n, last - first, p, h * width)
    return out


def _attend(
    q: Float[Tensor, "p m r d"],
    k: Float[Tensor, "p m c d"],
    v: Float[Tensor, "p m c w"],
    hidden: Int[Tensor, "rows c"],
    per: int,
) -> Float[Tensor, "p m r w"]:
    scores = torch.bmm(q[0], k[0].mT)
    scores.view(-1, per, *hidden.shape).masked_fill_(hidden, -torch.inf)
    wide = torch.promote_types(q.dtype, torch.float32)
    share = torch.softmax(scores, dim=-1, dtype=wide).to(q.dtype)
    out = q.new_empty((*q.shape[:3], v.shape[-1]))
    torch.bmm(share, v[0], out=out[0])
    for i in range(1, q.shape[0]):
        moved = torch.bmm(q[i], k[0].mT)
        moved.baddbmm_(q[0], k[i].mT).mul_(share)
        torch.mul(out[0], moved.sum(-1, keepdim=True), out=out[i]).neg_()
        out[i].baddbmm_(moved, v[0]).baddbmm_(share, v[i])
    return out
