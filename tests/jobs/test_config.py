"""Every choice of every group composes and passes the schema; every option has its default in YAML, with a comment."""

from __future__ import annotations

import inspect
import subprocess
import sys
from importlib import resources

import pytest
import yaml

from conf.schema import settings
from curate.evaluation.registry import EVALUATORS
from curate.scoring.registry import SCORERS
from jobs.app import compose_config
from jobs.cli import JOBS
from jobs.submit import prepared

MANDATORY = {
    "source/files": ["source.url=data"],
    "source/mcq": ["source.url=data"],
    "model/hf": ["model.path=x"],
    "concept/persona": ["concept.persona.path=x"],
    "concept/probe": ["concept.probe.path=x", "concept.probe.positive_label=bad"],
    "concept/sae": ["concept.sae.path=x", "concept.sae.latents=[1]"],
    "concept/file": ["concept.file.path=x"],
    "judge/openai": ["judge.model=x"],
    "judge/vllm": ["judge.path=x"],
    "judge/classifier": ["judge.path=x"],
    "judge/probe": ["judge.rows=x", "judge.positive_label=bad"],
    "query/file": ["query.path=x"],
    "tuned/adapter": ["tuned.adapter=x"],
    **{f"evaluator/{name}": [f"evaluator.{name}.path=x"] for name in EVALUATORS},
}
LISTS = ("concept", "scorer", "evaluator")
CHOICES = [
    (group.name, choice.name.removesuffix(".yaml"))
    for group in resources.files("conf").iterdir()
    if group.is_dir() and not group.name.startswith("_")
    for choice in group.iterdir()
    if choice.name.endswith(".yaml")
]


@pytest.mark.parametrize(("group", "choice"), sorted(CHOICES))
def test_every_choice_composes(group, choice, monkeypatch):
    monkeypatch.setenv("CURATE_DATA", "data")  # where experiments on real data find it
    value = f"[{choice}]" if group in LISTS else choice
    found = settings(compose_config("run", [f"{group}={value}", *MANDATORY.get(f"{group}/{choice}", [])]))
    if group == "scorer":
        assert list(found.scorer) == [choice]
    if group == "evaluator":
        options = inspect.signature(EVALUATORS[choice]).parameters
        assert set(found.evaluator[choice]) == set(options)  # every option has its default in YAML
        defaults = {o: p.default for o, p in options.items() if p.default is not p.empty}
        defaults = {o: list(value) if isinstance(value, tuple) else value for o, value in defaults.items()}
        assert found.evaluator[choice].items() >= defaults.items()
    assert found.source.unit_rows > 0


@pytest.mark.parametrize("job", sorted(JOBS))
def test_every_job_composes(job):
    assert settings(compose_config(job, [])).source.name == "demo"


def test_every_scorer_and_evaluator_has_a_choice():
    assert {c for g, c in CHOICES if g == "scorer"} == set(SCORERS)
    assert {c for g, c in CHOICES if g == "evaluator"} == set(EVALUATORS)


@pytest.mark.parametrize(("group", "choice"), sorted(CHOICES))
def test_every_choice_says_what_it_is(group, choice):
    text = (resources.files("conf") / group / f"{choice}.yaml").read_text()
    lines = [x for x in text.splitlines() if not x.startswith("# @package")]
    assert lines[0].startswith("# ") or "\n# " in text
    yaml.safe_load(text)


def test_the_submission_id_follows_the_settings(tmp_path):
    base = ["source=files", "source.url=s3://b/x", f"sink.url={tmp_path}", f"sink.store={tmp_path}/s"]
    name, given = prepared("run", base, False)
    assert name.startswith("curate-run-")
    assert given == base
    assert prepared("run", base[::-1], False)[0] == name
    assert prepared("run", [*base, "cluster.workers=9"], False)[0] == name
    assert prepared("run", [*base, "selector.fraction=0.5"], False)[0] != name
    assert prepared("score", base, False)[0] != name
    assert prepared("run", [*base[:-1], f"sink.store={tmp_path}/t"], False)[0] != name


def test_a_plan_is_refused_where_it_would_be_ignored(monkeypatch, capsys):
    import jobs.fit

    monkeypatch.setattr("sys.argv", ["curate fit", "plan=true"])
    with pytest.raises(SystemExit, match="2"):
        jobs.fit.main()
    assert "plan=true is for run, retrain" in capsys.readouterr().err


def test_a_config_is_checked_before_any_heavy_import():
    """`curate submit` needs no more than this: seconds and half a gigabyte less."""
    given = ["source=files", "source.url=s3://b/x", "sink.url=/o", "sink.store=/s"]
    code = (
        "import sys, jobs.submit\n"
        f"jobs.submit.prepared('score', {given}, False)\n"
        "print(sorted({'torch', 'ray', 'transformers', 'vllm'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
