"""Products with adapters' matrices, row by row against the slot that each row names."""

from __future__ import annotations

import pytest
import torch

from curate.models.vllm_lora_cpu import products


@pytest.mark.parametrize("slots", [[0] * 5, [1] * 5, [-1] * 5, [0, -1, 1, -1, 0], [-1, 1, 1, -1, 1]])
@pytest.mark.parametrize("one", [False, True])
def test_each_row_has_its_own_slot_and_none_is_zero(slots, one):
    torch.manual_seed(0)
    inputs, weights = torch.randn(5, 7), torch.randn(2, 3, 7)
    found = products(inputs, weights[:, None] if one else weights, torch.tensor(slots), torch.float64)
    assert found.dtype == torch.float64
    for row, slot, got in zip(inputs.double(), slots, found, strict=True):
        torch.testing.assert_close(got, weights[slot].double() @ row if slot >= 0 else torch.zeros(3).double())
