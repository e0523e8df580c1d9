"""Test vectors side by side: the queries of several methods, scored in one pass.

In: test vectors of one model. Out: layer by layer, the blocks of all queries as a backend's device wants them, filled
straight from the arrays that the test vectors came in: no copy of all of them is made on the way, and none at all of a
single test vector that is where and what it should be. Knows no row and no loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from curate.curvature.blocks import Block, Dense, join, squared
from curate.curvature.test_vector import TestVector
from curate.errors import CurvatureError
from curate.models.tracked import weight_of
from curate.scoring.directional.tangents import Direction


class Stacked:
    """`names`: the queries of `vectors`, one after the other. `every`: all of their layers in the order of the blocks;
    `layers`: the same but for those that are zero for every query (above the layer that a concept reads).

    Raises:
        CurvatureError: there is no test vector.
    """

    def __init__(self, vectors: Sequence[TestVector]) -> None:
        if not vectors:
            raise CurvatureError("there is no test vector to take derivatives along")
        self.names = tuple(name for vector in vectors for name in vector.names)
        known = {layer.name: layer for vector in vectors for layer in vector.layers}
        self._parts = {name: [(len(v.names), v.blocks.get(name)) for v in vectors] for name in known}
        some = {name for name, parts in self._parts.items() if any(b is not None and _some(b) for _, b in parts)}
        kept = [layer for layer in known.values() if layer.name in some] or list(known.values())
        # Stable: the order within a block stays.
        self.layers = tuple(sorted(kept, key=lambda layer: layer.block))
        self.every = tuple(sorted(known.values(), key=lambda layer: layer.block))

    def norm(self) -> Float[Tensor, " q"]:
        """‖s‖ of every query over all layers, float64."""
        total = torch.zeros(len(self.names), dtype=torch.float64)
        for layer in self.layers:
            end = 0
            for q, block in self._parts[layer.name]:
                at, end = slice(end, end + q), end + q
                if block is not None:
                    total[at] += squared(block)
        return total.sqrt()

    def directions(self, model: PreTrainedModel) -> tuple[dict[str, Direction], Float[Tensor, " q"]]:
        """({layer name: its block}, what each query's derivatives are to be multiplied by), like the layer's weight.

        A layer's weight says the precision, not the model: an adapter's is float32 in a half-precision model too. The
        blocks are s itself; where the model is in float16, s / ‖s‖, as half of s could vanish or overflow there.
        """
        units, scale = torch.ones(len(self.names), dtype=torch.float64), None
        if model.dtype == torch.float16:
            units = self.norm()
            scale = torch.where(units > 0, 1.0 / units, 0.0)
        found: dict[str, Direction] = {}
        for layer in self.layers:
            weight = weight_of(model.get_submodule(layer.name))
            block = join(self._parts[layer.name], layer.out, layer.width, weight.device, weight.dtype, scale)
            found[layer.name] = (block.values,) if isinstance(block, Dense) else (block.u, block.v)
        return found, units

    def one(self, name: str, query: int) -> Float[Tensor, "out in"]:
        """The block of one layer for one query, in the precision and the place that it came in."""
        rows = [(block, row) for q, block in self._parts[name] for row in range(q)]
        block, row = rows[query]
        if block is None:
            layer = next(layer for layer in self.layers if layer.name == name)
            return torch.zeros((layer.out, layer.width))
        return block.values[row] if isinstance(block, Dense) else block.u[row] @ block.v[row]


def _some(block: Block) -> bool:
    parts = (block.values,) if isinstance(block, Dense) else (block.u, block.v)
    return all(bool(part.any()) for part in parts)
