"""GGUF models: dequantised once into the cache, as float32 safetensors that transformers and vLLM both read."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from curate.errors import ModelError
from curate.models.cache import cached_folder
from curate.models.digest import file_digest

log = logging.getLogger(__name__)


def dequantise(path: Path) -> Path:
    """Folder in Hugging Face layout (model and tokenizer) that holds the weights of the GGUF file `path`.

    float32, as the block formats multiply a scale by an integer: no 16-bit type holds the products exactly.

    Raises:
        ModelError: not a GGUF file, cut off, or an architecture that transformers cannot read.
        StorageError: the cache cannot be written.
    """
    with path.open("rb") as f:
        if f.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file (it does not begin with 'GGUF')")

    def build(target: Path) -> None:
        log.info("dequantising %s (%.0f MB), once", path.name, path.stat().st_size / 1e6)
        where = {"gguf_file": path.name, "local_files_only": True}
        try:
            model = AutoModelForCausalLM.from_pretrained(
                path.parent, quantization_config=GgufConfig(dequantize=True), dtype="float32", **where
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
        except (OSError, ValueError, KeyError, IndexError, RuntimeError, NotImplementedError, ImportError) as error:
            raise ModelError(f"the GGUF file {path} cannot be read: {error}") from error
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)

    return cached_folder(f"gguf-{file_digest(path)}", build)
