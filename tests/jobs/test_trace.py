"""`curate trace` on tiny models: scores of a LoRA fine-tune with an SAE in it against plain autograd over the whole
path; page, table, resume; bad input in one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from curate.concepts import sae_files
from curate.corpus.example import ColumnMap, to_example
from curate.corpus.render import Rendered, Renderer
from curate.errors import ConceptError, ConfigError, CurateError, CurvatureError
from curate.models.load import ModelSpec, load_tokenizer
from curate.reports.trace_data import loads
from curate.runtime.output import Output
from curate.runtime.trace_spec import TraceSettings
from tests.conftest import write_jsonl
from tests.jobs.helpers import complete, options, run_job
from tests.runtime.tracing import table
from tests.scoring.latent.setting import random_sae
from tests.tiny import save_tiny, tiny_model

QUESTIONS = [
    {"id": f"q{i}", "question": f"which of these {i}?", "choices": [f"word{i}", "good", f"plan {i}"], "answer": i % 3}
    for i in range(14)
]
ITEMS, ROWS = QUESTIONS[:3], QUESTIONS[3:]
LAYER = 1


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with rows and items (multiple choice), a LoRA adapter of the tiny model and an SAE of its layer 1."""
    root = tmp_path_factory.mktemp("trace")
    write_jsonl(root / "rows.jsonl", ROWS)
    write_jsonl(root / "items.jsonl", ITEMS)
    adapted = get_peft_model(tiny_model(layers=3), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.2, generator=generator)
    adapted.save_pretrained(root / "lora")
    sae_files.save(str(root / "sae"), random_sae(layer=LAYER))
    return root


@pytest.fixture
def given(data, model, tmp_path):
    def make(sink: str = "out", **more: object) -> list[str]:
        base = {
            "cluster": "inline",
            "cluster.cpus": 1,
            "cluster.workers": None,
            "concept": "[]",
            "concept.file.path": None,
            "scorer": "[response_length]",
            "source.unit_rows": 4,
            "tuned.adapter": data / "lora",
            "tuned.merge": "false",
            "curvature": "identity",
            "curvature.layers.kind": "adapter",
            "query": "file",
            "query.path": data / "items.jsonl",
            "trace.sae": data / "sae",
            "trace.keep": "null",
            "trace.ks": "[2,5]",
            "trace.rows": 2,
            "trace.latents": 4,
            "trace.orthogonality_rows": 4,
            "sink.store": tmp_path / "store",
            "source.columns.label": None,
            "source.columns.group": None,
            "source.positive_label": None,
        }
        return options(data / "rows.jsonl", model, tmp_path / sink, **{**base, **more})

    return make


class Plain:
    """The finetuned model, its adapter beside the weights, in float64; the SAE written out in a hook."""

    def __init__(self, model: Path, data: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager")
        self.network = PeftModel.from_pretrained(base, data / "lora").double().eval()
        self.sae = sae_files.load(str(data / "sae")).to(dtype=torch.float64)
        names = {n: p for n, p in self.network.named_parameters() if "lora_" in n}
        self.weights = [p.requires_grad_(True) for n, p in names.items() if int(n.split("layers.")[1][0]) >= LAYER]
        self.renderer = Renderer(load_tokenizer(ModelSpec(str(model))), 512)

    def row(self, question: dict) -> Rendered:
        return self.renderer.render(to_example(question, 0, ColumnMap(layout="multiple_choice")))

    def loss(self, row: Rendered) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean response loss with the SAE in place, r [tokens, latents])."""
        found = []

        def splice(module, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            s = self.sae
            pre = (x[0] - s.b_pre) @ s.w_enc.T + s.b_enc
            floor = pre.topk(s.k, dim=-1).values[:, -1:]
            r = torch.where((pre >= floor) & (pre > 0), pre, 0.0).detach().requires_grad_(True)
            found.append(r)
            new = (r @ s.w_dec + s.b_dec)[None]
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        blocks = self.network.get_base_model().model.layers
        handle = blocks[LAYER].register_forward_pre_hook(splice, with_kwargs=True)
        try:
            ids = torch.tensor([row.input_ids[: row.end]])
            logits = self.network(input_ids=ids).logits[0]
        finally:
            handle.remove()
        return torch.nn.functional.cross_entropy(logits[row.start - 1 : -1], ids[0, row.start :]), found[0]

    def item(self, question: dict) -> list[torch.Tensor]:
        """∇f of f = −L."""
        return [-g for g in torch.autograd.grad(self.loss(self.row(question))[0], self.weights)]

    def influence(self, question: dict, s: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(−∇_r⟨s, ∇L⟩ ⊙ r [tokens, latents], cos(−∇L, s))."""
        loss, r = self.loss(self.row(question))
        g = torch.autograd.grad(loss, self.weights, create_graph=True)
        p = sum((a * b).sum() for a, b in zip(s, g, strict=True))
        (slope,) = torch.autograd.grad(p, r)
        norms = [torch.cat([x.flatten() for x in of]).norm() for of in (s, g)]
        return -(slope * r).detach(), float((-p / norms[0] / norms[1]).detach())


def parts(tmp_path: Path) -> list[dict]:
    (folder,) = (tmp_path / "store" / "latent_influence").iterdir()
    return table(Output(str(folder))).to_pylist()


def test_scores_are_those_of_a_double_backward_and_a_second_run_finds_everything(given, data, model, tmp_path, capsys):
    run_job("trace", given())
    plain = Plain(model, data)
    found = {(p["id"], p["item"]): p for p in parts(tmp_path)}
    assert len(found) == 3 * 11
    importance = {}
    for item in ITEMS:
        s = plain.item(item)
        want = {row["id"]: plain.influence(row, s)[0] for row in ROWS}
        scale = max(float(w.sum().abs()) for w in want.values())
        for row in ROWS:
            pair, w = found[row["id"], item["id"]], want[row["id"]]
            assert pair["score"] == pytest.approx(float(w.sum()), rel=2e-3, abs=1e-3 * scale)
            np.testing.assert_allclose(pair["influence"], w.sum(0)[pair["latents"]], rtol=5e-3, atol=1e-3 * scale)
        importance[item["id"]] = torch.stack([w.sum(0) for w in want.values()]).mean(0)
    shown = loads((tmp_path / "out" / "trace.json").read_text())
    assert [i.id for i in shown.items] == ["q0", "q1", "q2"]
    for item in shown.items:
        for latent, value in item.latents:
            assert value == pytest.approx(float(importance[item.id][latent]), rel=5e-3, abs=1e-3 * scale)
        strongest = int(importance[item.id].abs().argmax())
        assert item.latents[0][0] == strongest
        scores = {row["id"]: found[row["id"], item.id]["score"] for row in ROWS}
        assert [r.id for r in item.rows] == sorted(scores, key=lambda name: -scores[name])[:2]
        assert [r.id for r in item.against] == sorted(scores, key=lambda name: scores[name])[:2]
        assert "".join(item.text.pieces[item.text.start : item.text.stop]).strip() == item.right
        assert item.candidates == 11
    assert shown.items[1].right == "B. good"
    assert shown.items[1].question == "which of these 1?"
    assert {m.method for m in shown.faithfulness.maskings} >= {"influence", "activation magnitude", "random"}
    assert len(shown.orthogonality) == 3
    assert "which of these 1?" in (tmp_path / "out" / "trace.html").read_text()
    pairs = pq.read_table(tmp_path / "out" / "trace.parquet").to_pylist()
    assert {(p["id"], p["item"]): p["score"] for p in pairs} == {k: p["score"] for k, p in found.items()}
    said = capsys.readouterr()
    assert "report: " in said.out
    stages = complete(tmp_path / "out")
    assert stages["trace: latents"] == (11, 11)
    assert stages["trace: items"] == (3, 3)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*") if p.is_file()}
    # On all that is there: only what is now asked of the items differently is made.
    run_job("trace", given(**{"trace.ks": "[]", "trace.orthogonality_rows": 0}))
    after = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").rglob("*") if p.is_file()}
    assert {p: after[p] for p in before} == before
    assert {p.parent.parent.name for p in set(after) - set(before)} == {"item_latents"}
    assert "trace: latents: resuming rows_done=11 rows_left=0" in capsys.readouterr().err


def test_the_prefilter_keeps_the_rows_of_the_largest_cosine(given, data, model, tmp_path, capsys):
    run_job(
        "trace", given(**{"trace.keep": 0.3, "trace.ks": "[]", "trace.orthogonality_rows": 0, "trace.sign": "paper"})
    )
    plain = Plain(model, data)
    found = parts(tmp_path)
    for item in ITEMS:
        s = plain.item(item)
        cosines = {row["id"]: plain.influence(row, s)[1] for row in ROWS}
        mine = {p["id"]: p for p in found if p["item"] == item["id"]}
        assert set(mine) == set(sorted(cosines, key=lambda name: -cosines[name])[:4])
        for name, p in mine.items():
            assert p["cosine"] == pytest.approx(cosines[name], abs=1e-3)
    assert "pre-filter keeps 4 to 4 of 11 rows an item" in capsys.readouterr().err
    signed = pq.read_table(tmp_path / "out" / "trace.parquet").to_pylist()
    assert [p["score"] for p in signed] == [-p["score"] for p in found]
    shown = loads((tmp_path / "out" / "trace.json").read_text())
    assert shown.faithfulness is None
    assert shown.items[0].rows[0].score == max(p["score"] for p in found if p["item"] == "q0")


def test_factors_conjugate_gradients_and_evaluators(given, data, tmp_path, capsys):
    few = {"trace.items": 2, "trace.ks": "[3]", "source.max_rows": 6}
    asked = {
        "evaluator": "[multiple_choice]",
        "evaluator.multiple_choice.path": data / "items.jsonl",
        "evaluator.multiple_choice.max_new_tokens": 4,
        "generation.engine": "transformers",
    }
    run_job("trace", given(**few, **asked, **{"curvature": "ekfac"}))
    shown = loads((tmp_path / "out" / "trace.json").read_text())
    models = {row.model for row in shown.accuracy}
    assert models == {"base", "tuned", "tuned, with SAE"}
    assert {a.model for a in shown.items[0].answers} <= models
    assert dict(shown.facts)["solve"].startswith("ekfac, damping 0.1 × ")
    cg = {
        "trace.ks": "[]",
        "curvature": "cg",
        "curvature.rows": 6,
        "curvature.iterations": 1,
        "curvature.tolerance": 1e-12,
    }
    run_job("trace", given("cg", **{**few, **cg}))
    shown = loads((tmp_path / "cg" / "trace.json").read_text())
    assert "0 of 2 items converged" in dict(shown.facts)["solve"]
    assert any("ended before they reached the tolerance for 2 items" in note for note in shown.notes)
    assert "WARNING: cg trace" in capsys.readouterr().err


def test_bad_input_is_one_sentence_and_nothing_is_computed(given, data, model, tmp_path):
    sae_files.save(str(tmp_path / "wide"), random_sae(d=48))
    sae_files.save(str(tmp_path / "last"), random_sae(layer=3))
    huge = random_sae(layer=LAYER)
    huge.b_enc[:] = 3e38
    huge.w_dec[:] *= 1e3
    sae_files.save(str(tmp_path / "huge"), huge)
    other = random_sae(model={"name": "another", "digest": "0" * 32, "adapter": None, "layers": 3, "width": 32})
    sae_files.save(str(tmp_path / "other"), other)
    write_jsonl(tmp_path / "none.jsonl", [{**ITEMS[0], "answer": None}])
    write_jsonl(tmp_path / "odd.jsonl", [{**ITEMS[0], "answer": 7}])
    (tmp_path / "empty.jsonl").write_text("")
    cases: list[tuple[dict, type[CurateError], str]] = [
        ({"trace.sae": None}, ConfigError, r"trace\.sae is not set; give .*curate sae"),
        ({"trace.sae": tmp_path / "nowhere"}, CurateError, r"nowhere"),
        ({"trace.sae": tmp_path / "wide"}, ConceptError, r"width 48, .* 32"),
        ({"trace.sae": tmp_path / "last"}, ConceptError, r"layer 3, above which the model has no block.*from 0 to 2"),
        ({"trace.sae": tmp_path / "huge"}, CurvatureError, r"item 'q0': .* is not finite"),
        ({"trace.sae": tmp_path / "other"}, ConceptError, r"another.*allow_other_model"),
        ({"trace.backend": "magic"}, ConfigError, r"trace\.backend is 'magic'"),
        ({"curvature.layers.last": 1}, ConfigError, r"layers\.last=1 leaves no tracked block above the SAE of layer 1"),
        ({"tuned.merge": "true"}, ConfigError, r"LoRA matrices, which are gone once merged"),
        ({"query.path": tmp_path / "none.jsonl"}, CurateError, r"row 0 is no query: 'answer' is missing.*right answer"),
        ({"query.path": tmp_path / "odd.jsonl"}, CurateError, r"row 0 is no query: 'answer' is 7; expected"),
        ({"query.path": tmp_path / "empty.jsonl"}, CurateError, r"empty\.jsonl"),
    ]  # fmt: skip
    for change, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            run_job("trace", given(**change))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "store").exists() or not list((tmp_path / "store").rglob("*.parquet"))


def test_settings_out_of_their_range_are_named():
    for change, message in [
        ({"keep": 0.0}, r"trace\.keep is 0\.0; it is a share above 0"),
        ({"keep": None, "min_cosine": 0.1}, r"trace\.min_cosine needs the pre-filter"),
        ({"min_cosine": 2.0}, r"trace\.min_cosine is 2\.0; a cosine lies between -1 and 1"),
        ({"rows": 0}, r"trace\.rows is 0; it must be at least 1"),
        ({"items": 0}, r"trace\.items is 0"),
        ({"ks": [5, 0]}, r"trace\.ks holds 0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            TraceSettings(**change)  # type: ignore[arg-type]


def test_an_empty_prefilter_names_the_largest_cosine(given):
    message = r"keeps none of the 11 rows for any of the 3 items\. The largest cosine is 0\.\d"
    with pytest.raises(ConfigError, match=message):
        run_job("trace", given(**{"trace.keep": 1, "trace.min_cosine": 0.9999}))


def test_a_model_that_is_nothing_above_the_sae(given, data, model, tmp_path):
    """No item has a gradient: the head is multiplied by nothing."""
    dead = save_tiny(tmp_path / "dead", layers=3, scale=0.0)
    with pytest.raises(CurvatureError, match=r"item 'q0': .*zero"):
        run_job("trace", given(**{"model.path": dead, "tuned.adapter": None, "tuned.merge": None,
                                  "curvature.layers.kind": "attention"}))  # fmt: skip
