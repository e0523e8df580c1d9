"""Influence through the jobs: scores of a finetuned model against autograd's, found again, refused; bad settings.

The oracle is a plain Hugging Face loop with peft and autograd, one row at a time. All in this process but one run.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from curate.concepts import concept as concept_files
from curate.curvature.ekfac import Damping, solve
from curate.curvature.files import load_factor, load_index
from curate.errors import ConfigError, CurvatureError, RecipeError
from tests.conftest import write_jsonl
from tests.evaluation.server import completion, serve
from tests.jobs.helpers import options, run_job, scores
from tests.runtime.fitting import varied
from tests.tiny import tiny_model

ROWS = [varied(i) for i in range(30)]
QUERIES = [
    {"prompt": f"is {i} good?", "positive": f"yes, {i} is the best", "negative": f"no, think about {i + 3} again"}
    for i in range(3)
]
INLINE = {"cluster": "inline", "cluster.cpus": 1, "cluster.workers": None}
ALL = {
    "scorer": "[influence_function,concept_influence,gradient_product,vector_filter]",
    "scorer.influence_function.behaviours": "[loss,contrast]",
    "scorer.gradient_product.behaviours": "[contrast,concept]",
}
COLUMNS = {
    "influence_function.loss",
    "influence_function.contrast",
    "concept_influence.test.L2",
    "gradient_product.contrast",
    "gradient_product.test.L2",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with a corpus of two shards, queries, and a LoRA adapter of the tiny model."""
    root = tmp_path_factory.mktemp("influence")
    write_jsonl(root / "corpus" / "a.jsonl", ROWS[:20])
    write_jsonl(root / "corpus" / "b.jsonl", ROWS[20:])
    write_jsonl(root / "queries.jsonl", QUERIES)
    adapted = get_peft_model(tiny_model(layers=3), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.2, generator=generator)
    adapted.save_pretrained(root / "lora")
    return root


@pytest.fixture
def given(data, model, tmp_path):
    def make(sink: str = "out", **more: object) -> list[str]:
        base = {
            **INLINE,
            **ALL,
            "tuned.adapter": data / "lora",
            "query": "file",
            "query.path": data / "queries.jsonl",
            "curvature.shard_rows": 9,
            "sink.store": tmp_path / "store",
            "source.columns.label": None,
            "source.columns.group": None,
            "source.positive_label": None,
        }
        return options(data / "corpus", model, tmp_path / sink, **{**base, **more})

    return make


class Plain:
    """The finetuned model, merged, and gradients of one conversation at a time."""

    def __init__(self, model: Path, adapter: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.network = PeftModel.from_pretrained(base, adapter).merge_and_unload().eval()
        self.v = torch.tensor(concept_files.load(str(model.parent / "concept")).vectors[2])
        self.v /= self.v.norm()

    def gradient(self, prompt: str, answer: str, what: str, layers: list[str]) -> dict[str, torch.Tensor]:
        """Of the mean loss ("loss") over the answer and its end of turn, or of the answer's projection ("concept")."""
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        first = text.rindex(answer)
        enc = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        inside = [i for i, (a, b) in enumerate(enc["offset_mapping"]) if a < first + len(answer) and b > first]
        ids = torch.tensor([enc["input_ids"]])
        weights = [self.network.get_submodule(name).weight.requires_grad_(True) for name in layers]
        out = self.network(ids, output_hidden_states=True)
        if what == "loss":
            end = inside[-1] + 2
            value = torch.nn.functional.cross_entropy(out.logits[0, inside[0] - 1 : end - 1], ids[0, inside[0] : end])
        else:
            value = out.hidden_states[2][0, inside].mean(0) @ self.v
        found = torch.autograd.grad(value, weights, allow_unused=True)
        pairs = zip(layers, weights, found, strict=True)
        return {n: torch.zeros_like(w) if g is None else g for n, w, g in pairs}

    def behaviour(self, name: str, layers: list[str]) -> dict[str, torch.Tensor]:
        """∇f, the mean over QUERIES; f grows with the behaviour."""
        total = {n: torch.zeros(()) for n in layers}
        for q in QUERIES:
            if name == "test.L2":
                terms = [(1.0, self.gradient(q["prompt"], q["positive"], "concept", layers))]
            else:
                terms = [(-1.0, self.gradient(q["prompt"], q["positive"], "loss", layers))]
            if name == "contrast":
                terms.append((1.0, self.gradient(q["prompt"], q["negative"], "loss", layers)))
            total = {n: total[n] + sum(sign * g[n] for sign, g in terms) / len(QUERIES) for n in layers}
        return total


def test_scores_are_those_of_autograd_and_a_second_run_finds_everything(given, data, model, tmp_path, capsys):
    run_job("run", given())
    (folder,) = (tmp_path / "store" / "factors").iterdir()
    index = load_index(str(folder))
    assert index.rows == 30
    plain = Plain(model, data / "lora")
    layers = [layer.name for layer in index.layers]
    rows = [[m["content"] for m in row["messages"]] for row in ROWS]
    losses = [plain.gradient(*row, "loss", layers) for row in rows]
    for column in COLUMNS:
        method, _, name = column.partition(".")
        s = plain.behaviour(name, layers)
        if method != "gradient_product":
            factors = {x.name: load_factor(str(folder), x, "ekfac") for x in index.layers}
            s = {n: solve(factors[n], s[n], Damping(0.1)) for n in layers}
        expected = [-float(sum((s[n] * g[n]).double().sum() for n in layers)) for g in losses]
        found = scores(tmp_path / "out", column)
        scale = np.abs(expected).max()
        np.testing.assert_allclose([found[r["id"]] for r in ROWS], expected, rtol=1e-3, atol=1e-4 * scale)
    first = capsys.readouterr()
    assert "influence_function.contrast" in (tmp_path / "out" / "report.html").read_text()
    assert "of 48,352 parameters tracked" in first.err
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*") if p.is_file()}
    run_job("run", given())
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*") if p.is_file()} == before
    said = capsys.readouterr().err
    assert "rows_left=0" in said
    assert "test vector influence_function: found at" in said
    # Another tuned model is another product; said before anything is fitted.
    with pytest.raises(RecipeError, match=r"tuned\.adapter: there '\w+', now None"):
        run_job("score", given(**{"tuned.adapter": None}))
    assert len(list((tmp_path / "store" / "factors").iterdir())) == 1


@pytest.mark.usefixtures("running")
def test_a_cluster_gives_what_this_process_gives(given, tmp_path, capsys):
    small = {"source.max_rows": 20, "curvature.layers.last": 2, "curvature.rank": 3}
    run_job("score", given("here", **small))
    other = {"cluster": None, "cluster.cpus": None, "cluster.workers": 2, "sink.store": tmp_path / "store2"}
    run_job("plan", given("there", **small, **other))
    planned = capsys.readouterr().out
    largest = 2 * sum(3 * (a + b) for a, b in [(32, 32), (16, 32), (16, 32), (32, 32)] * 2) * 4
    assert f"{largest / 1e6:.2f} MB, the largest test vector" in planned
    assert "2 pass(es) over 30 rows" in planned
    assert not (tmp_path / "store2" / "factors").exists()
    run_job("fit", given("there", **small, **other))
    said = capsys.readouterr()
    assert "rank 3: " in said.err
    assert "influence_function: " in said.out
    run_job("score", given("there", **small, **other, **{"cluster.token_budget": 150}))
    for column in COLUMNS:
        one, two = scores(tmp_path / "here", column), scores(tmp_path / "there", column)
        scale = max(map(abs, one.values()))
        np.testing.assert_allclose([two[k] for k in one], list(one.values()), rtol=1e-3, atol=1e-4 * scale)


def test_the_matrices_of_the_adapter_can_be_tracked(given, tmp_path):
    more = {"scorer": "[gradient_product]", "scorer.influence_function.behaviours": None, "source.max_rows": 10}
    run_job("score", given(**more, **{"curvature.layers.kind": "adapter", "tuned.merge": "false"}))
    assert set(scores(tmp_path / "out", "gradient_product.contrast")) == {f"r{i}" for i in range(10)}


def test_bad_settings_are_one_sentence_and_nothing_is_scored(given, data, tmp_path):
    write_jsonl(tmp_path / "half.jsonl", [{k: v for k, v in q.items() if k != "negative"} for q in QUERIES])
    write_jsonl(tmp_path / "empty.jsonl", [{"prompt": "what?", "positive": " "}])
    cases: list[tuple[dict, type[Exception], str]] = [
        ({"curvature.layers.pattern": "experts"}, ConfigError, r"no linear layer matches .*pattern='experts'"),
        ({"curvature.layers.kind": "adapter"}, ConfigError, r"LoRA matrices, which are gone once merged; set tuned"),
        ({"tuned.merge": "false", "tuned.adapter": None}, ConfigError, r"merge=false leaves an adapter .* tuned"),
        ({"curvature.layers.first": 2}, ConfigError, r"test\.L2: the behaviour reads layer 2, but .* begin at block 2"),
        ({"scorer.influence_function.behaviours": "[los]"}, ConfigError, r"a behaviour is 'los'; did you mean 'loss'"),
        ({"scorer.influence_function.behaviours": "[]"}, ConfigError, r"behaviours is \[\]; give a list, such as"),
        ({"scorer.concept_influence.layers": "[9]"}, Exception, r"no direction at layer 9"),
        ({"scorer.concept_influence.backend": "magic"}, ConfigError, r"concept_influence\.backend is 'magic'"),
        ({"concept": "[]", "concept.file.path": None, "scorer": "[concept_influence]"} | dict.fromkeys(list(ALL)[1:]),
         ConfigError, r"behaviours has 'concept', which needs a concept; set concept="),
        ({"query.path": tmp_path / "half.jsonl"}, CurvatureError, r"has no negative answer, which .*'contrast'"),
        ({"query.path": tmp_path / "empty.jsonl"}, CurvatureError, r"row 0 is no query: .*empty"),
        ({"curvature.damping": 0, "curvature.damping_kind": "absolute", "curvature.examples": 1}, CurvatureError,
         r"is singular .* set a damping"),
        ({"scorer.gradient_product.reduction": "sum"}, ConfigError,
         r"scorer\.gradient_product\.reduction is 'sum' and curvature\.reduction 'mean'"),
        ({"query": "trait", "query.path": None}, ConfigError, r"exactly one \(configured: none\); give query\.path"),
        ({"curvature.rank": 0}, ConfigError, r"curvature\.rank is 0; it must be at least 1"),
        ({"query": "on_policy", "query.path": None}, ConfigError, r"chosen by a judge; name one \(judge=openai\)"),
    ]  # fmt: skip
    for change, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            run_job("score", given(**change))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out" / "scores").exists()
    with pytest.raises(ConfigError, match=r"no configured scorer needs a fit; these do: concept_influence, gradient_"):
        run_job("fit", given(scorer="[random]", **dict.fromkeys(list(ALL)[1:])))


def test_a_gradient_that_is_zero_is_said(given, model, tmp_path):
    """A last block whose output is multiplied by nothing: what it holds cannot move a loss."""
    from curate.models.load import ModelSpec, load_model, load_tokenizer

    dead = load_model(ModelSpec(str(model)))
    with torch.no_grad():
        dead.get_submodule("model.layers.2.self_attn.o_proj").weight.zero_()
    dead.save_pretrained(tmp_path / "dead")
    load_tokenizer(ModelSpec(str(model))).save_pretrained(tmp_path / "dead")
    more = {"tuned.adapter": None, "tuned.path": tmp_path / "dead", "curvature.layers.first": 2}
    only = {"scorer": "[gradient_product]", "scorer.influence_function.behaviours": None}
    only |= {"scorer.gradient_product.behaviours": "[loss]", "curvature.layers.pattern": "k_proj"}
    with pytest.raises(CurvatureError, match=r"the gradient of 'loss' is zero in all of the 1 tracked layers"):
        run_job("score", given(**more, **only))


def test_on_policy_queries_are_generated_judged_and_kept(given, model, tmp_path, capsys):
    trait = {
        "name": "agree",
        "evaluate_questions": ["is it so?", "are you sure?"],
        "judge_prompt": "trait? {question} {answer}",
        "coherence_prompt": "coherent? {question} {answer}",
    }
    (tmp_path / "trait.json").write_text(json.dumps(trait))
    more = {
        "scorer": "[influence_function]",
        "scorer.gradient_product.behaviours": None,
        "query": "on_policy",
        "query.path": tmp_path / "trait.json",
        "query.samples": 2,
        "query.keep": 2,
        "query.max_new_tokens": 6,
        "generation.engine": "transformers",
        "judge": "openai",
        "judge.model": "judge",
        "judge.attempts": 1,
    }

    def judge(request: dict, n: int) -> dict:
        text = request["messages"][-1]["content"]
        value = "90" if text.startswith("coherent?") else str(10 + sum(map(ord, text)) % 80)
        return completion([(value, {value: 1.0})])

    with serve(judge) as endpoint:
        run_job("fit", given(**more, **{"judge.base_url": endpoint.url}))
        asked = len(endpoint.prompts)
        assert asked > 0
        run_job("fit", given(**more, **{"judge.base_url": endpoint.url}))
        assert len(endpoint.prompts) == asked
        (kept,) = (tmp_path / "store" / "queries").iterdir()
        (tmp_path / "other.jinja").write_text("so: " + (model / "chat_template.jinja").read_text())
        template = {"model.chat_template": tmp_path / "other.jinja"}  # other prompts, and so other answers
        run_job("fit", given(**more, **template, **{"judge.base_url": endpoint.url}))
        assert len(list((tmp_path / "store" / "queries").iterdir())) == 2
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert 2 <= len(rows) <= 4
    assert all(r["coherence"] == pytest.approx(90) and 10 <= r["trait"] < 90 for r in rows)
    assert "queries: found at" in capsys.readouterr().err
