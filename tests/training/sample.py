"""Rows of random tokens for trainings, and a plain loop to compare with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from datasets import Dataset

from curate.training.rows import TOKENS, TokenPart, load_rows

Row = tuple[list[int], int, int]


def make_rows(n: int, seed: int = 0) -> list[Row]:
    """(token ids, start, end) of rows of 6 to 25 tokens; some end before their last token."""
    draw = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        length = int(draw.integers(6, 26))
        start = int(draw.integers(0, length - 3))
        rows.append((draw.integers(4, 300, length).tolist(), start, length - int(draw.integers(0, 2))))
    return rows


def part_table(rows: list[Row], first: int = 0) -> pa.Table:
    """A token part."""
    return pa.table(
        {
            "row": pa.array(range(first, first + len(rows)), pa.int64()),
            "input_ids": pa.array([r[0] for r in rows], TOKENS),
            "start": pa.array([r[1] for r in rows], pa.int32()),
            "end": pa.array([r[2] for r in rows], pa.int32()),
        }
    )


def dataset(rows: list[Row], folder: Path) -> Dataset:
    folder.mkdir(parents=True, exist_ok=True)
    return load_rows([TokenPart("part", 0, len(rows))], None, folder, lambda urls: [part_table(rows)])


def plain_loop(
    model: torch.nn.Module, rows: list[Row], steps: list[list[int]], rate: float, warmup: int, clip: float
) -> list[float]:
    """Train `model` by hand: every row alone, all logits, AdamW, a rate that rises over `warmup` steps and falls
    linearly to 0. Returns the loss of every step: the mean over all response tokens of its rows."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0)
    history = []
    model.train()
    for n, step in enumerate(steps):
        scale = n / warmup if n < warmup else (len(steps) - n) / (len(steps) - warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        total, tokens = torch.zeros(()), 0
        for i in step:
            ids, start, end = rows[i]
            logits = model(input_ids=torch.tensor([ids])).logits[0]
            first = max(start, 1)
            total = total + F.cross_entropy(logits[first - 1 : end - 1], torch.tensor(ids[first:end]), reduction="sum")
            tokens += end - first
        loss = total / tokens
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, clip)
        optimizer.step()
        history.append(loss.item())
    return history


def shuffled_steps(n: int, batch: int, epochs: int, seed: int) -> list[list[int]]:
    """Row numbers of every step, as the training's documentation says: shuffled by (seed, epoch), cut in order."""
    found = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(n).tolist()
        found += [order[at : at + batch] for at in range(0, n, batch)]
    return found
