"""Every command in the manifests is a job of ours with options that it has, and survives the shells on its way."""

from __future__ import annotations

import re
import shlex

import pytest

from conf.schema import settings
from jobs.app import compose_config
from jobs.cli import JOBS as KNOWN
from tests.deploy.rendered import JOBS, KUBERNETES, OVERLAYS, objects, one

SEARCH = "hydra.searchpath=[file:///etc/curate]"


def entrypoints(folder: str) -> list[str]:
    specs = [o["spec"] for o in objects(folder) if o["kind"] == "RayJob"]
    specs += [o["spec"]["jobTemplate"] for o in objects(folder) if o["kind"] == "RayCronJob"]
    return [s["entrypoint"] for s in specs]


FOLDERS = [*(f"overlays/{o}" for o in OVERLAYS if not o.endswith("-cluster")), *(f"jobs/{j}" for j in JOBS)]


@pytest.mark.parametrize("folder", FOLDERS)
def test_command_is_a_job_with_its_options(folder, tmp_path):
    # A ConfigMap mounted at /etc/curate/experiment, laid out as Kubernetes does.
    (tmp_path / "experiment").mkdir()
    for name, text in one(folder, "ConfigMap", "curate-settings")["data"].items():
        (tmp_path / "experiment" / name).write_text(text)
    (command,) = entrypoints(folder)
    program, job, *options = shlex.split(command)
    assert program == "curate"
    assert job in KNOWN
    assert options[:2] == [SEARCH, "experiment=site"]
    found = settings(compose_config(job, [f"hydra.searchpath=[file://{tmp_path}]", *options[1:]]))
    assert found.source.name == "sft"
    for place in (found.sink.url, found.sink.store, found.source.url):
        assert str(place).startswith("s3://")
    if folder.startswith("jobs/"):
        assert job == folder.removeprefix("jobs/")
        assert one(folder, "RayJob")["metadata"]["name"] == f"curate-{job}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_command_has_nothing_that_a_shell_reads(folder):
    """KubeRay writes it into a shell's command line, and Ray gives it to a shell again."""
    (command,) = entrypoints(folder)
    assert re.fullmatch(r"[\w \[\]=:/.,-]+", command)


def test_settings_are_mounted_where_commands_look():
    for pod in one("overlays/gpu", "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        mounts = {m["name"]: m["mountPath"] for m in pod["template"]["spec"]["containers"][0]["volumeMounts"]}
        assert mounts["settings"] == "/etc/curate/experiment"
    head = one("overlays/gpu", "RayJob")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert {"name": "settings", "configMap": {"name": "curate-settings"}} in head["volumes"]
    assert SEARCH in (KUBERNETES / "schedule/ray-job.yaml").read_text()
