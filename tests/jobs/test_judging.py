"""From `judge=…` on the command line to scores: every kind through the real settings, and what is refused."""

from __future__ import annotations

import pytest
from hydra.errors import MissingConfigException

from conf.schema import settings
from curate.errors import ConceptError, ConfigError, CurateError, ModelError
from curate.evaluation.judge import reads_template
from curate.evaluation.openai_judge import OpenAIJudge
from curate.runtime.judge import PoolJudge
from curate.runtime.session import session
from jobs.app import compose_config
from jobs.pipeline import Pipeline
from tests.conftest import conversation, write_jsonl
from tests.evaluation.test_classifier_judge import save as save_classifier
from tests.jobs.helpers import inline, options, run_job
from tests.jobs.test_concepts import kept, trait

PAIRS = [("question?", "word1 word2"), ("question?", "word3")]


@pytest.fixture
def make(corpus, model, tmp_path):
    """A judge from overrides, within an inline session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OPENAI_API_KEY", raising=False)

        def build(*overrides: str):
            given = inline([*options(corpus, model, tmp_path / "out"), f"sink.store={tmp_path / 'store'}", *overrides])
            config = settings(compose_config("concept", given))
            with session(config.cluster) as found:
                pipeline = Pipeline(config)
                pipeline.session = found
                judge = pipeline.judge()
                return judge, judge.score(PAIRS, "Rate {answer}.") if isinstance(judge, PoolJudge) else None

        yield build


def test_no_judge_and_an_endpoint(make):
    assert make("judge=none") == (None, None)
    judge, _ = make("judge=openai", "judge.model=m", "judge.base_url=http://localhost:1/v1",
                    "judge.requests_per_minute=30")  # fmt: skip
    assert isinstance(judge, OpenAIJudge)
    assert reads_template(judge)
    assert judge.pace._gap == 2.0


def test_a_model_of_ones_own(make, tiny, tmp_path):
    judge, scores = make("judge=vllm", f"judge.path={tiny}", "judge.engine=transformers", "judge.max_tokens=200")
    assert [s.value for s in scores] == [None, None]
    assert "gave no number" in scores[0].reason
    facts = judge.fingerprint()
    assert (facts["judge"], facts["engine"], facts["dtype"]) == ("engine", "transformers", "float32")
    assert len(list((tmp_path / "store" / "judge").iterdir())) == 1


def test_a_classifier(make, tmp_path):
    save_classifier(tmp_path / "classifier")
    path = f"judge.path={tmp_path / 'classifier'}"
    judge, scores = make("judge=classifier", path, "judge.label=harmful")
    assert not reads_template(judge)
    assert all(0 < s.value < 100 for s in scores)
    assert make("judge=classifier", path, "judge.label=1")[1] == scores
    assert make("judge=classifier", path, "judge.label=harmless")[1] != scores


def test_a_probe(make, corpus, tmp_path):
    judge, scores = make("judge=probe", f"judge.rows={corpus}", "judge.positive_label=marked",
                         "judge.columns.group=group")  # fmt: skip
    assert not reads_template(judge)
    assert all(0 < s.value < 100 for s in scores)
    assert judge.fingerprint()["positive_label"] == "marked"


@pytest.mark.parametrize(
    ("overrides", "kind", "message"),
    [
        (["judge=vllm", "judge.path=/nowhere/model"], ModelError, "/nowhere/model.* does not exist"),
        (["judge=vllm", "judge.path=MODEL", "judge.max_tokens=0"], ConfigError, "judge.max_tokens is 0"),
        (["judge=vllm"], ConfigError, "judge.path is not set"),
        (["judge=vllm", "judge.path=MODEL", "judge.engine=x"], ConfigError, "judge.engine"),
        (["judge=classifier", "judge.path=MODEL"], ConfigError, "judge.label is not set"),
        (["judge=classifier", "judge.path=MODEL", "judge.label=bad"], ConfigError, "has no such label"),
        (["judge=probe", "judge.positive_label=bad"], ConfigError, "judge.rows is not set"),
        (["judge=probe", "judge.rows=ROWS"], ConfigError, "judge.positive_label is not set"),
        (["judge=probe", "judge.rows=ROWS", "judge.positive_label=markd"], ConceptError, "did you mean 'marked'"),
        (["judge=probe", "judge.rows=ROWS", "judge.positive_label=marked", "judge.layer=9"], ConfigError,
         "judge.layer is 9, but the model has 3 layers"),
        (["judge=probe", "judge.rows=ROWS", "judge.positive_label=marked", "judge.columns.label=null"], ConfigError,
         "judge.columns.label"),
        (["judge=openai", "judge.model=m"], ConfigError, "set the environment variable OPENAI_API_KEY"),
    ],
)  # fmt: skip
def test_what_is_refused(make, corpus, model, overrides, kind, message):
    given = [o.replace("MODEL", str(model)).replace("ROWS", str(corpus)) for o in overrides]
    with pytest.raises(kind, match=message):
        make(*given)


def test_an_unknown_judge(make):
    with pytest.raises((CurateError, MissingConfigException), match="gpt"):
        make("judge=gpt")


@pytest.mark.usefixtures("here")
def test_a_judge_with_one_question_is_not_asked_for_coherence(corpus, model, tmp_path):
    """A persona vector whose rollouts a probe judges: pairs go by the trait alone."""
    rows = write_jsonl(tmp_path / "rows" / "r.jsonl", [conversation(i) for i in range(60)])
    given = options(corpus, model, tmp_path / "out", concept="[persona]", **{"concept.file.path": None})
    given += [
        f"concept.persona.path={trait(tmp_path)}",
        f"sink.store={tmp_path / 'store'}",
        "concept.persona.method=rollouts",
        "concept.persona.rollouts=2",
        "concept.persona.max_new_tokens=5",
        "generation.engine=transformers",
        "judge=probe",
        f"judge.rows={rows}",
        "judge.positive_label=marked",
    ]
    with pytest.raises(ConceptError, match=r"0 of 8 pairs") as caught:
        run_job("concept", given)  # a random model's answers all look alike to the probe
    assert "coherence" not in str(caught.value).split("pairs", 1)[1].replace("coherence_threshold", "")
    assert not kept(tmp_path / "store")
