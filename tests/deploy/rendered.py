"""Deployment files as objects: what kustomize makes of a folder of deploy/kubernetes."""

from __future__ import annotations

import functools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy/kubernetes"
OVERLAYS = tuple(sorted(p.name for p in (KUBERNETES / "overlays").iterdir()))
JOBS = tuple(sorted(p.name for p in (KUBERNETES / "jobs").iterdir()))
# Everything that a person applies.
APPLIED = (*(f"overlays/{o}" for o in OVERLAYS), *(f"jobs/{j}" for j in JOBS), "monitoring")


def _builder() -> list[str] | None:
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    return ["kubectl", "kustomize"] if shutil.which("kubectl") else None


@functools.cache
def _built(folder: Path) -> list[dict[str, Any]]:
    command = _builder()
    if command is None:
        pytest.skip("neither kustomize nor kubectl is installed")
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def objects(folder: str | Path) -> list[dict[str, Any]]:
    """What `kubectl apply -k deploy/kubernetes/<folder>` sends."""
    return _built(KUBERNETES / folder)


def one(folder: str | Path, kind: str, name: str | None = None) -> dict[str, Any]:
    """The only object of a kind (and name)."""
    found = [o for o in objects(folder) if o["kind"] == kind and name in (None, o["metadata"]["name"])]
    assert len(found) == 1, [o["metadata"]["name"] for o in found]
    return found[0]


def ray_spec(o: dict[str, Any]) -> dict[str, Any] | None:
    """The Ray cluster in an object, or None."""
    spec = o.get("spec", {})
    where = {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec"), "RayCronJob": spec.get("jobTemplate", {})}
    found = where.get(o["kind"])
    return found.get("rayClusterSpec") if o["kind"] == "RayCronJob" and found else found


def pods(o: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates' specs in an object."""
    out = []
    cluster = ray_spec(o)
    if cluster is not None:
        out += [cluster["headGroupSpec"]["template"], *(g["template"] for g in cluster["workerGroupSpecs"])]
    job = o["spec"]["jobTemplate"] if o["kind"] == "RayCronJob" else o.get("spec", {})
    if "submitterPodTemplate" in job:
        out.append(job["submitterPodTemplate"])
    if o["kind"] == "CronJob":
        out.append(o["spec"]["jobTemplate"]["spec"]["template"])
    return [p["spec"] for p in out]
