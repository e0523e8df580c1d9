"""Partial sums: one safetensors file a shard below a folder, and sums of chosen tensors over all of them.

A shard that was summed twice overwrites its own file, so nothing counts twice. Of a file only the wanted tensors are
read: a reducer of one layer does not pull the whole model's sums through the network.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable

import safetensors.torch
import torch
from torch import Tensor

from connectors import storage
from curate.errors import StorageError

_DTYPES = {"F32": torch.float32, "F64": torch.float64, "I64": torch.int64}


def save(url: str, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    storage.write_atomic(url, safetensors.torch.save(plain))


def read(url: str, wanted: Callable[[str], bool] = lambda key: True) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose keys are `wanted`; only these are read.

    Raises:
        StorageError: it cannot be read, or is broken.
    """
    out: dict[str, Tensor] = {}
    with storage.open_read(url) as f:
        try:
            (size,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(size))
            for key, entry in header.items():
                if key == "__metadata__" or not wanted(key):
                    continue
                first, last = entry["data_offsets"]
                f.seek(8 + size + first)
                data = bytearray(f.read(last - first))
                dtype = _DTYPES[entry["dtype"]]
                flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
                out[key] = flat.reshape(entry["shape"])
        except (struct.error, ValueError, KeyError, RuntimeError) as e:
            raise StorageError(f"{url} is broken ({e}); remove it and run again") from None
    return out


def names(folder: str) -> set[str]:
    """What is there: names of files relative to `folder`, without their suffix."""
    return {f.name.removesuffix(".safetensors") for f in storage.list_files(folder)}


def total(urls: list[str], wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Σ over files of their wanted tensors, by key, in the order of `urls`; a file may lack some."""
    sums: dict[str, Tensor] = {}
    for url in urls:
        for key, tensor in read(url, wanted).items():
            sums[key] = sums[key].add_(tensor) if key in sums else tensor
    return sums


def remove(folder: str) -> None:
    """Remove every file below `folder`."""
    for f in storage.list_files(folder):
        storage.remove(f.url)
