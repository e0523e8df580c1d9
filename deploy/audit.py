"""Audits the dependencies that deploy/constraints.txt fixes: are their files still those we tested, and are they known
to be vulnerable?

In: deploy/constraints.txt and deploy/hashes.txt. Out: lines for a person; exit status 0, or 1 where a file has another
hash than the recorded one or a vulnerability is known. A service that cannot be reached, or does not know a package, is
said and is no failure (with --strict it is): a build machine may reach its package index alone.

    make audit-deps                                    as CI does, with pip-audit in an environment of its own
    .venv/bin/python deploy/audit.py --record          writes deploy/hashes.txt anew, after deploy/pin.py

The hashes are of the files that pip takes on the platform where they were recorded (its first line names it); on
another one only the vulnerabilities are asked for.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CONSTRAINTS, HASHES = HERE / "constraints.txt", HERE / "hashes.txt"
SERVICES = ("pypi", "osv")
PLATFORM = f"{sysconfig.get_platform()}, Python {sys.version_info.major}.{sys.version_info.minor}"
_MISMATCH = re.compile(r"THESE PACKAGES DO NOT MATCH THE HASHES|HashMismatch|do not match the hash", re.IGNORECASE)


def pinned(text: str) -> dict[str, str]:
    """{name: version} of lines `name==version`, whatever follows on the line."""
    lines = (line.split() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    return dict(words[0].split("==") for words in lines)


def _run(command: list[str], seconds: float | None) -> subprocess.CompletedProcess[str]:
    """A command's end; one that takes longer than `seconds` counts as one that failed, and says so."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer within {seconds:g} s")


def report(*arguments: str, seconds: float | None = None) -> tuple[dict[str, Any] | None, str]:
    """What pip would install, as its report, without installing anything; and what it said."""
    with tempfile.TemporaryDirectory() as place:
        target = Path(place) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "-q"]
        done = _run([*command, "--report", str(target), *arguments], seconds)
        return (json.loads(target.read_text()) if done.returncode == 0 else None), done.stderr


def record() -> str:
    """The text of hashes.txt: every pinned package with the SHA-256 of the file that pip takes here."""
    found, said = report("-r", str(CONSTRAINTS))
    if found is None:
        raise SystemExit(f"pip cannot resolve {CONSTRAINTS}: {said[-2000:]}")
    lines = [
        f"{i['metadata']['name'].lower().replace('_', '-')}=={i['metadata']['version']} "
        f"--hash=sha256:{i['download_info']['archive_info']['hashes']['sha256']}"
        for i in found["install"]
    ]
    head = f"# Made by deploy/audit.py --record on {PLATFORM}; do not edit by hand.\n"
    return head + "".join(f"{line}\n" for line in sorted(lines))


def check_hashes(seconds: float) -> tuple[bool, bool]:
    """(does every file have its recorded hash, could it be asked)."""
    text = HASHES.read_text()
    if f"on {PLATFORM};" not in text:
        print(f"hashes: not checked; they were recorded on another platform than {PLATFORM}")
        return True, False
    if pinned(text) != pinned(CONSTRAINTS.read_text()):
        print("hashes: hashes.txt is not of the versions in constraints.txt; run deploy/audit.py --record")
        return False, True
    found, said = report("--require-hashes", "-r", str(HASHES), seconds=seconds)
    if found is not None:
        print(f"hashes: {len(found['install'])} packages have their recorded files")
        return True, True
    if _MISMATCH.search(said):
        print(f"hashes: the index gives another file than was recorded:\n{said.strip()[-3000:]}")
        return False, True
    print(f"hashes: not checked; the package index did not answer: {' '.join(said.split())[-300:]}")
    return True, False


def ask(service: str, seconds: float) -> tuple[list[str], int, str]:
    """(known vulnerabilities, packages that were looked up, why others were not)."""
    command = [sys.executable, "-m", "pip_audit", "-s", service, "-r", str(CONSTRAINTS), "--no-deps", "--disable-pip"]
    done = _run([*command, "-f", "json", "--progress-spinner", "off", "--timeout", "20"], seconds)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        words = (done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1]
        return [], 0, words[:300]
    skipped = [p["skip_reason"] for p in packages if "skip_reason" in p]
    found = [
        f"{p['name']} {p['version']}: {v['id']} ({', '.join(v.get('aliases', []))}), "
        f"mended in {', '.join(v.get('fix_versions', [])) or 'no version yet'}"
        for p in packages
        for v in p.get("vulns", [])
    ]
    return found, len(packages) - len(skipped), f"{len(skipped)} not known there: {skipped[0]}" if skipped else ""


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--record", action="store_true", help="write hashes.txt anew")
    p.add_argument("--strict", action="store_true", help="fail where something could not be asked")
    p.add_argument("--seconds", type=float, default=300.0, help="for each question, then it counts as not answered")
    args = p.parse_args()
    if args.record:
        HASHES.write_text(record())
        return 0
    sound, asked = check_hashes(args.seconds)
    wanted, seen = len(pinned(CONSTRAINTS.read_text())), 0
    for service in SERVICES:
        found, n, why = ask(service, args.seconds)
        seen = max(seen, n)
        print(f"{service}: {n} of {wanted} packages looked up, {len(found)} known vulnerabilities{why and f' ({why})'}")
        print("".join(f"  {line}\n" for line in found), end="")
        sound = sound and not found
        if n == wanted:
            break
    if seen < wanted:
        print(f"vulnerabilities of {wanted - seen} packages could not be looked up from here")
    return 0 if sound and (not args.strict or (asked and seen == wanted)) else 1


if __name__ == "__main__":
    sys.exit(main())
