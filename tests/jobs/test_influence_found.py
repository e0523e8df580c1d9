"""What influence jobs find in the store: broken products are named with what to remove, and then made anew; queries of
the configured persona concept; what is said of coverage where nothing is fitted; products of another tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from curate.errors import ConfigError, CurvatureError
from tests.conftest import write_jsonl
from tests.jobs.helpers import options, run_job, scores
from tests.runtime.fitting import varied

TRAIT = {
    "name": "agree",
    "instructions": [{"positive": "agree", "negative": "object"}],
    "extract_questions": ["is it so?", "are you sure?", "and that?", "well?"],
    "contrastive_responses": [
        {"question": i, "positive": f"yes, {i} it is", "negative": f"no, {i} it is not"} for i in range(4)
    ],
}


@pytest.fixture
def given(model, tmp_path):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", [varied(i) for i in range(12)])
    write_jsonl(tmp_path / "q.jsonl", [{"prompt": "is it?", "response": "yes it is"}])
    (tmp_path / "trait.json").write_text(json.dumps(TRAIT))

    def make(scorer: str = "influence_function", **more: object) -> list[str]:
        base = {
            "cluster": "inline",
            "cluster.cpus": 1,
            "cluster.workers": None,
            "scorer": f"[{scorer}]",
            f"scorer.{scorer}.behaviours": "[loss]",
            "query": "file",
            "query.path": tmp_path / "q.jsonl",
            "sink.store": tmp_path / "store",
            "source.columns.label": None,
            "source.columns.group": None,
            "source.positive_label": None,
        }
        return options(tmp_path / "corpus", model, tmp_path / "out", **{**base, **more})

    return make


def test_broken_products_name_what_to_remove_and_the_same_command_then_works(given, tmp_path):
    run_job("score", given())
    whole = scores(tmp_path / "out", "influence_function.loss")
    (factors,) = (tmp_path / "store" / "factors").iterdir()
    (header,) = (tmp_path / "store" / "test_vectors").glob("*.json")
    numbers = header.with_suffix(".safetensors")

    def mended(break_it, place: Path, words: str) -> None:
        shutil.rmtree(tmp_path / "out" / "scores")
        break_it()
        with pytest.raises(CurvatureError, match=rf"{words}.*Remove (the folder )?{place} and run the same command"):
            run_job("score", given())
        shutil.rmtree(place) if place.is_dir() else place.unlink()
        run_job("score", given())
        assert scores(tmp_path / "out", "influence_function.loss") == pytest.approx(whole, rel=1e-4, abs=1e-6)

    mended(numbers.unlink, header, "has no")
    mended(lambda: numbers.write_bytes(numbers.read_bytes()[:-9]), header, "broken")
    mended(lambda: header.write_text("{"), header, "broken")
    mended(next((factors / "inputs").iterdir()).unlink, factors, "incomplete")
    mended(lambda: (factors / "factors.json").write_text("{}"), factors, "format None")

    def halve_a_layer() -> None:
        header.unlink()  # so that it is read
        layer = next((factors / "layers").iterdir())
        layer.write_bytes(layer.read_bytes()[:100])

    mended(halve_a_layer, factors, "broken")


@pytest.mark.parametrize(
    "change", [{"scorer": "gradient_product"}, {"scorer": "influence_function", "curvature": "identity"}]
)
def test_coverage_is_said_without_a_fit(given, capsys, change):
    for said in ("made and kept", "found"):
        run_job("fit", given(**change))
        err = capsys.readouterr().err
        assert said in err
        assert "of 48,352 parameters tracked (not: embeddings" in err
        assert "factors:" not in err


def test_queries_of_the_configured_persona_concept(given, tmp_path, capsys):
    persona = {"concept": "[persona]", "concept.file.path": None, "concept.persona.path": tmp_path / "trait.json"}
    query = {"query": "trait", "query.path": None}
    run_job("fit", given("gradient_product", **persona, **query))
    assert f"queries: 4 from {tmp_path / 'trait.json'} (query=trait)" in capsys.readouterr().err
    two = {**persona, "concept": "[persona,sycophantic]"}
    with pytest.raises(ConfigError, match=r"exactly one \(configured: .*persona.*\); give query\.path="):
        run_job("fit", given("gradient_product", **two, **query))
    run_job("fit", given("gradient_product", **two, **{**query, "query.path": tmp_path / "trait.json"}))
    with pytest.raises(ConfigError, match=r"query\.path is not set; give the JSON lines of your queries"):
        run_job("fit", given("gradient_product", **{"query.path": "null"}))


def test_a_concept_of_another_chat_template_is_another(given, model, tmp_path):
    more = {"concept": "[persona]", "concept.file.path": None, "concept.persona.path": tmp_path / "trait.json"}
    probe = {
        "concept": "[probe]",
        "concept.file.path": None,
        "concept.probe.path": tmp_path / "labelled.jsonl",
        "concept.probe.positive_label": "a",
    }
    write_jsonl(tmp_path / "labelled.jsonl", [{**varied(i), "label": "ab"[i % 2]} for i in range(8)])
    other = tmp_path / "other"
    shutil.copytree(model, other)
    template = other / "chat_template.jinja"
    plain = template.read_text()
    for concept, n in ((more, 1), (probe, 2)):
        template.write_text(plain)
        for _ in range(2):
            run_job("concept", given(**concept, **{"model.path": other}))
        made = len(list((tmp_path / "store" / "concepts").glob("*.json")))
        assert made == 2 * n - 1
        template.write_text("so: " + plain)
        run_job("concept", given(**concept, **{"model.path": other}))
        assert len(list((tmp_path / "store" / "concepts").glob("*.json"))) == 2 * n
