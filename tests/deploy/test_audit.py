"""The audit of dependencies: what it reads, and that only a finding fails it, never a service that is out of reach."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess

import pytest

from tests.deploy.rendered import ROOT

SPEC = importlib.util.spec_from_file_location("audit", ROOT / "deploy/audit.py")
assert SPEC is not None
audit = importlib.util.module_from_spec(SPEC)
assert SPEC.loader is not None
SPEC.loader.exec_module(audit)


def test_the_hashes_are_of_the_pinned_versions():
    hashes = audit.HASHES.read_text()
    assert audit.pinned(hashes) == audit.pinned(audit.CONSTRAINTS.read_text())
    lines = [line for line in hashes.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    assert len(lines) > 100


@pytest.fixture
def answers(monkeypatch, tmp_path):
    """Answers of pip and of pip-audit's services, by what is asked: (status, stdout, stderr)."""
    said: dict[str, tuple[int, str, str]] = {}
    constraints, hashes = tmp_path / "constraints.txt", tmp_path / "hashes.txt"
    constraints.write_text("# made\none==1\ntwo==2\n")
    hashes.write_text(
        f"# on {audit.PLATFORM};\n" + "".join(f"{n} --hash=sha256:{'0' * 64}\n" for n in ("one==1", "two==2"))
    )
    monkeypatch.setattr(audit, "CONSTRAINTS", constraints)
    monkeypatch.setattr(audit, "HASHES", hashes)
    monkeypatch.setattr("sys.argv", ["audit.py"])

    def run(command, **_):
        what = "pip" if "pip" in command else command[command.index("-s") + 1]
        status, out, err = said[what]
        if what == "pip" and status == 0:
            with open(command[command.index("--report") + 1], "w") as f:
                f.write(json.dumps({"install": [{}, {}]}))
        return subprocess.CompletedProcess(command, status, out, err)

    monkeypatch.setattr(audit.subprocess, "run", run)
    return said


CLEAN = json.dumps({"dependencies": [{"name": n, "version": "1", "vulns": []} for n in ("one", "two")]})
SKIPPED = json.dumps({"dependencies": [{"name": n, "skip_reason": "not found on PyPI"} for n in ("one", "two")]})
KNOWN = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["1.1"]}
BAD = json.dumps({"dependencies": [{"name": "one", "version": "1", "vulns": [KNOWN]}, {"name": "two", "vulns": []}]})
DOWN = (1, "", "Traceback …\nConnectionError: Failed to resolve 'api.osv.dev'")


def test_all_is_well(answers, capsys):
    answers |= {"pip": (0, "", ""), "pypi": (0, CLEAN, "")}
    assert audit.main() == 0
    assert "2 of 2 packages looked up, 0 known" in capsys.readouterr().out


def test_nobody_answers(answers, capsys, monkeypatch):
    answers |= {"pip": (1, "", "ERROR: Could not find a version"), "pypi": (0, SKIPPED, ""), "osv": DOWN}
    assert audit.main() == 0
    said = capsys.readouterr().out
    assert "not checked; the package index did not answer" in said
    assert "2 not known there: not found on PyPI" in said
    assert "Failed to resolve 'api.osv.dev'" in said
    assert "vulnerabilities of 2 packages could not be looked up from here" in said
    monkeypatch.setattr("sys.argv", ["audit.py", "--strict"])
    assert audit.main() == 1


def test_a_known_vulnerability_fails_and_is_named(answers, capsys):
    answers |= {"pip": (0, "", ""), "pypi": (1, BAD, "")}
    assert audit.main() == 1
    assert "one 1: PYSEC-1 (CVE-1), mended in 1.1" in capsys.readouterr().out


def test_another_file_under_the_same_version_fails(answers, capsys):
    mismatch = "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE."
    answers |= {"pip": (1, "", mismatch), "pypi": (0, CLEAN, "")}
    assert audit.main() == 1
    assert "another file than was recorded" in capsys.readouterr().out


def test_hashes_of_other_versions_fail(answers):
    answers |= {"pip": (0, "", ""), "pypi": (0, CLEAN, "")}
    audit.CONSTRAINTS.write_text("one==1\ntwo==3\n")
    assert audit.main() == 1
