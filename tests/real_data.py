"""The public data sets that some tests read: in CURATE_RAW_DATA, or in shared/data beside the project; else skipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("CURATE_RAW_DATA") or Path(__file__).parents[2] / "shared" / "data")


def real(name: str) -> str:
    """Path of one of their files; the test is skipped where it is absent."""
    path = DATA / name
    if not path.exists():
        pytest.skip(f"needs {name} of the public data sets; CURATE_RAW_DATA names their folder (now {DATA})")
    return str(path)
