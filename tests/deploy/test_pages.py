"""The operators' pages name files, folders, jobs and alerts that exist, and the Slurm script is a script."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess

import pytest

from conf.schema import settings
from jobs.app import compose_config
from jobs.cli import JOBS, TOOLS
from jobs.submit import VERBS
from tests.deploy.rendered import KUBERNETES, ROOT, one

PAGES = sorted((ROOT / "docs/operations").glob("*.md"))
SCRIPT = ROOT / "deploy/slurm/curate.sbatch"


def commands(page) -> list[str]:
    """The lines of a page's code blocks, joined where they go on."""
    blocks = re.findall(r"^\s*```\n(.*?)^\s*```", page.read_text(), re.M | re.S)
    return [line.strip() for b in blocks for line in re.sub(r"\\\n\s*", "", b).splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_paths_are_there(page):
    text = page.read_text()
    for path in re.findall(r"(?<![\w/])(deploy/[\w./-]+\w)", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / path).exists(), path
    for path in re.findall(r"`((?:sites|overlays|jobs|base|monitoring)/[\w./-]+)`", text):
        assert (KUBERNETES / path).exists() or path == "jobs/<job>", path


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_curate_commands_have_their_options(page):
    found = [c for c in commands(page) if re.match(r"curate (submit )?\w+ ", c)]
    assert found
    for command in found:
        _, *words = shlex.split(command)
        job = words[1] if words[0] == "submit" else words[0]
        if job in TOOLS or (words[0] == "submit" and job in VERBS):
            continue
        assert job in JOBS
        flag = next((i for i, w in enumerate(words) if w.startswith("--")), len(words))
        options = [w.replace("…", "x") for w in words[:flag] if "=" in w]
        options += [w.replace("…", "x") for w in words[flag:] if "=" in w and not w.startswith("--")]
        if not any(o.startswith("hydra.searchpath") for o in options):
            settings(compose_config(job, options))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_nothing_planned_is_described(page):
    named = set(re.findall(r"`curate (\w+)", page.read_text()))
    assert named <= {*JOBS, *TOOLS}


def test_every_alert_has_its_first_thing_to_do():
    text = (ROOT / "docs/operations/kubernetes.md").read_text()
    for rule in one("monitoring", "PrometheusRule")["spec"]["groups"][0]["rules"]:
        assert f"`{rule['alert']}`" in text


def test_the_slurm_script_parses():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(SCRIPT)], check=True)


def test_the_slurm_script_says_what_it_needs(tmp_path):
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True)
    assert (done.returncode, "usage: CURATE_ENV=" in done.stderr) == (2, True)


def test_the_slurm_script_runs_a_head_workers_and_the_job(tmp_path):
    """With a Slurm and a Ray that only write down how they are called; the job's exit status is the script's."""
    log = tmp_path / "calls"
    (tmp_path / "bin").mkdir()
    fakes = {
        "scontrol": "printf 'n1\\nn2\\nn3\\n'",
        "srun": 'while [ "${1#-}" != "$1" ]; do at="$at $1"; shift; done; PLACE="$at" exec "$@"',
        "ray": f'echo "ray $* [$PLACE] $RAY_AUTH_MODE $(stat -c %a "$RAY_AUTH_TOKEN_PATH")" >> {log}; '
        '[ "$1" = start ] && exec tail -f /dev/null; exit 0',
        "curate": f'until grep -q "start --address" {log}; do :; done; echo "curate $* [$PLACE]" >> {log}; exit 3',
    }
    for name, body in fakes.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    python = shutil.which("python3")
    assert python is not None
    (tmp_path / "bin/python").symlink_to(python)
    env = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "CURATE_ENV": str(tmp_path),
        "HOME": str(tmp_path),
        "SLURM_JOB_ID": "41234",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_CPUS_PER_TASK": "16",
        "SLURM_GPUS_ON_NODE": "8",
    }
    done = subprocess.run(
        ["bash", str(SCRIPT), "run", "source=files", "source.url=/a b"], env=env, capture_output=True, timeout=60
    )
    assert done.returncode == 3, done.stderr
    calls = log.read_text().splitlines()
    (head,) = [c for c in calls if "start --head" in c]
    (workers,) = [c for c in calls if "start --address" in c]
    (job,) = [c for c in calls if c.startswith("curate")]
    assert "--port=21234" in head
    assert "--nodelist=n1" in head
    assert "start --address=n1:21234" in workers
    assert "--nodes=2 --ntasks=2 --exclude=n1" in workers
    assert head.endswith("token 600")
    assert workers.endswith("token 600")
    assert "--num-cpus=16 --num-gpus=8" in workers
    assert job.startswith("curate run source=files source.url=/a b cluster=existing cluster.ray_address=n1:21234 ")
    assert "cluster.cpus=48 cluster.gpus=24" in job
    assert not list(tmp_path.glob(".curate*"))  # the token is gone
