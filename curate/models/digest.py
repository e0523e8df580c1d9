"""Digests of model files: what a model is, wherever it lies. Reads a little of large files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

_WHOLE = 64 * 2**20
_HEAD, _BLOCK, _BLOCKS = 2**20, 4096, 256
# Written by whoever saved the model last; the same weights may carry any of them.
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def file_digest(path: Path) -> str:
    """Hash of a file up to 64 MiB; of a larger one its size, its first MiB and 256 blocks spread over it.

    Training moves every weight, so two models of one shape differ in the blocks; their headers are the same.
    """
    size = path.stat().st_size
    h = hashlib.blake2b(str(size).encode(), digest_size=16)
    with path.open("rb") as f:
        if size <= _WHOLE:
            while chunk := f.read(2**20):
                h.update(chunk)
        else:
            h.update(f.read(_HEAD))
            for i in range(_BLOCKS):
                f.seek(_HEAD + (size - _HEAD - _BLOCK) * i // (_BLOCKS - 1))
                h.update(f.read(_BLOCK))
    return h.hexdigest()


def folder_digest(folder: Path, config: str = "config.json") -> str:
    """Digest of a model or adapter folder: its config, less what does not change the model, and its weights."""
    body = json.loads((folder / config).read_text(encoding="utf-8"))
    for key in (*_VOLATILE, "base_model_name_or_path"):
        body.pop(key, None)
    files = [[f.name, file_digest(f)] for f in sorted(folder.glob("*.safetensors"))]
    return hashlib.blake2b(json.dumps([body, files], sort_keys=True).encode(), digest_size=16).hexdigest()
