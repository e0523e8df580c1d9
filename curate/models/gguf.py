"""GGUF models: dequantised once into the cache, as float32 safetensors that transformers and vLLM both read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from curate.errors import ModelError
from curate.models.cache import cached_folder
from curate.models.complete import check_complete
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
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # seconds; once in a model's life

        log.info("dequantising %s (%.0f MB), once", path.name, path.stat().st_size / 1e6)
        where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path.parent,
                quantization_config=GgufConfig(dequantize=True),
                dtype="float32",
                output_loading_info=True,
                **where,
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
        except Exception as error:  # every kind, from a parser that meets a broken file
            raise ModelError(f"the GGUF file {path} cannot be read (is it whole?): {error}") from error
        model, info = loaded
        check_complete(info, str(path))
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)

    return cached_folder(f"gguf-{file_digest(path)}", build)
