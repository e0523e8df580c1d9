"""The modules of other projects that define their SAEs, without what their packages import for training.

A package's own `__init__` would bring wandb or nnsight; a bare package of the same path lets its modules be imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
import types
from typing import Any

import pytest


def module(name: str, distribution: str) -> Any:
    """The module `name`, or a skip of the test where the distribution is not installed."""
    package = name.partition(".")[0]
    if package not in sys.modules:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.submodule_search_locations is None:
            pytest.skip(f"{distribution} is not installed")
        bare = types.ModuleType(package)
        bare.__path__ = list(spec.submodule_search_locations)
        bare.__spec__ = spec
        bare.__version__ = importlib.metadata.version(distribution)  # type: ignore[attr-defined]
        bare.logger = logging.getLogger(package)  # type: ignore[attr-defined]
        sys.modules[package] = bare
    return importlib.import_module(name)
