"""curvature=cg through the jobs: solved test vectors against dense solves, resumed after a stop, found again; item by
item, in a model with an SAE; bad settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from curate.concepts import concept as concept_files
from curate.concepts import sae_files
from curate.concepts.concept import Concept
from curate.corpus.render import Rendered
from curate.corpus.spread import draw
from curate.curvature import test_vector
from curate.curvature.behaviour import BehaviourSpec, make_behaviour
from curate.errors import ConfigError, CorpusError, CurvatureError, StorageError
from curate.models.load import ModelSpec, identity, load_model
from curate.models.tracked import LayerChoice, tracked_layers
from curate.runtime import conjugate_gradient as module
from curate.runtime import partials
from curate.runtime.reader import read_pieces
from jobs.app import compose_config, run
from jobs.pipeline import Pipeline
from tests.conftest import write_jsonl
from tests.curvature.curves import Dense, random_sae
from tests.jobs.helpers import options, run_job, scores
from tests.tiny import save_tiny

ROWS = [
    {
        "id": f"r{i}",
        "messages": [
            {"role": "user", "content": f"{7 * i} or {i}?"},
            {"role": "assistant", "content": f"{i}, I say {3 * i}"},
        ],
    }
    for i in range(24)
]
QUERIES = [
    {"prompt": f"is {i} good?", "positive": f"yes, {i} is the best", "negative": f"no, think about {i + 3} again"}
    for i in range(3)
]
PATTERN = "v_proj"
CG = {
    "curvature": "cg",
    "curvature.rows": 6,
    "curvature.layers.pattern": PATTERN,
    "curvature.damping": 0.01,
    "curvature.iterations": 200,
    "curvature.tolerance": "1e-6",
    "curvature.save_every": 7,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("cg")
    write_jsonl(root / "corpus" / "a.jsonl", ROWS[:15])
    write_jsonl(root / "corpus" / "b.jsonl", ROWS[15:])
    write_jsonl(root / "queries.jsonl", QUERIES)
    save_tiny(root / "tiny", layers=2, d=8)
    who = identity(ModelSpec(str(root / "tiny")))
    vectors = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    concept_files.save(Concept("test", vectors, 1, who, "random", "response_mean"), str(root / "concept"))
    return root


@pytest.fixture
def given(data, tmp_path):
    def make(sink: str = "out", **more: object) -> list[str]:
        base = {
            "cluster": "inline",
            "cluster.cpus": 1,
            "cluster.workers": None,
            "scorer": "[influence_function]",
            "scorer.influence_function.behaviours": "[loss]",
            "query": "file",
            "query.path": data / "queries.jsonl",
            "sink.store": tmp_path / "store",
            "source.columns.label": None,
            "source.columns.group": None,
            "source.positive_label": None,
            **CG,
        }
        return options(data / "corpus", data / "tiny", tmp_path / sink, **{**base, **more})

    return make


def inside(overrides: list[str], act) -> object:
    """What `act(pipeline)` gives in a job with these settings."""
    found = []
    run(compose_config("fit", overrides), lambda pipeline: found.append(act(pipeline)))
    return found[0]


def drawn(pipeline: Pipeline) -> list[Rendered]:
    """The rows that the curvature is of."""
    pieces = draw(pipeline.whole_manifest, CG["curvature.rows"], pipeline.config.seed)
    return [row for chunk in read_pieces(pieces, pipeline.reader) for row in chunk.rendered]


class Exact:
    """Dense float64 gradients of −L and solves, of the job's model with or without an SAE."""

    def __init__(self, folder: Path, rows: list[Rendered], sae=None, pattern: str = PATTERN) -> None:
        self.model = load_model(ModelSpec(str(folder / "tiny"), device="cpu")).double()
        self.layers, _ = tracked_layers(self.model, LayerChoice(pattern=pattern))
        self.dense, self.sae = Dense(self.model, self.layers, rows, sae=sae), sae

    def gradients(self, rows: list[Rendered]) -> torch.Tensor:
        out = []
        for row in rows:
            one = Dense(self.model, self.layers, [row], sae=self.sae)
            theta = one.theta.clone().requires_grad_(True)
            out.append(torch.autograd.grad(-one.loss(theta), theta)[0])
        return torch.stack(out)

    def solved(self, b: torch.Tensor, damping: float) -> torch.Tensor:
        matrix = self.dense.gauss_newton()
        return torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=torch.float64), b.T).T

    def flat(self, vector: test_vector.TestVector) -> torch.Tensor:
        return self.dense.flat({x.name: vector.blocks[x.name].dense().double() for x in self.layers})


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-4) -> None:
    assert ((found - expected).norm(dim=1) <= tolerance * expected.norm(dim=1)).all()


def vector_at(store: Path, name: str) -> test_vector.TestVector:
    (one,) = (store / "test_vectors").glob(f"{name}-*.json")
    return test_vector.load(str(one))


def test_scores_by_conjugate_gradients_are_those_of_a_dense_solve(given, data, tmp_path, capsys):
    more = {
        "scorer": "[influence_function,gradient_cosine]",
        "scorer.influence_function.behaviours": "[loss,contrast,concept]",
        "scorer.gradient_cosine.behaviours": "[concept]",
    }
    run_job("run", given(**more))
    rows, queries = inside(given(**more), lambda p: (drawn(p), p.influence.queries))
    exact = Exact(data, rows)
    positive, negative = (
        exact.gradients([getattr(q, side) for q in queries]).mean(0) for side in ("positive", "negative")
    )
    expected = exact.solved(torch.stack([positive, positive - negative]), CG["curvature.damping"])
    vector = vector_at(tmp_path / "store", "influence_function")
    assert vector.names == ("loss", "contrast", "test.L1")
    found = exact.flat(vector)
    close(found[:2], expected)
    # A concept at layer 1 is solved among the layers of block 0, whatever else is measured; H = I gives its gradient.
    plain = vector_at(tmp_path / "store", "gradient_cosine")
    below = Exact(data, rows, pattern=r"layers\.0\.self_attn\.v_proj")
    (layer,) = below.layers
    assert plain.layers == (layer,)
    close(
        found[2:, : layer.size],
        below.solved(plain.blocks[layer.name].dense().double().flatten(1), CG["curvature.damping"]),
    )
    assert not found[2, layer.size :].any()
    cosines = scores(tmp_path / "out", "gradient_cosine.test.L1")
    assert len(cosines) == 24
    assert all(-1 <= c <= 1 for c in cosines.values())
    assert vector.meta["curvature"] == "cg"
    assert vector.meta["cg"]["drawn"] == 6
    told = vector.meta["cg"]["items"]["loss"]
    assert told["converged"]
    assert told["negative"] == 0
    assert len(told["residuals"]) > told["iterations"] > 7
    assert told["residuals"][-1] <= 1e-6
    assert set(scores(tmp_path / "out", "influence_function.loss")) == {f"r{i}" for i in range(24)}
    left = [p.name for p in (tmp_path / "store").rglob("*") if ".work" in str(p) and p.is_file()]
    assert left == []
    assert not (tmp_path / "store" / "factors").exists()
    said = capsys.readouterr().err
    assert "cg influence_function (loss, contrast): step 7 of 200, residuals 0." in said
    assert "3 of 3 converged after at most" in said
    run_job("fit", given(**more))
    assert "test vector influence_function: found at" in capsys.readouterr().err
    assert "conjugate gradients" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_blocks_are_shared_out_to_actors(given, data, tmp_path, running):
    more = {"scorer.influence_function.behaviours": "[loss,contrast]", "curvature.block": 1}
    run_job("fit", given(**more))
    one = vector_at(tmp_path / "store", "influence_function")
    ray = {"cluster": "local", "cluster.cpus": None, "cluster.workers": 2, "sink.store": tmp_path / "other"}
    run_job("fit", given(**more, **ray))
    two = vector_at(tmp_path / "other", "influence_function")
    for layer in one.layers:
        torch.testing.assert_close(two.blocks[layer.name].dense(), one.blocks[layer.name].dense(), rtol=1e-4, atol=1e-5)


def test_a_stopped_solve_goes_on_at_its_last_file(given, tmp_path, monkeypatch, capsys):
    run_job("fit", given(**{"sink.store": tmp_path / "whole"}))
    whole = vector_at(tmp_path / "whole", "influence_function")
    steps = capsys.readouterr().err.count("step ")
    real, written = partials.save, []

    def save(url, tensors):
        if len(written) % 2 == 1 and written[-1] != "failed":
            written.append("failed")
            raise StorageError(f"no space left for {url}")
        written.append(url)
        real(url, tensors)

    monkeypatch.setattr(partials, "save", save)
    failures = 0
    while True:
        try:
            run_job("fit", given())
            break
        except StorageError:
            failures += 1
    assert failures > 1
    assert len([u for u in written if u != "failed"]) == steps  # none was made twice
    again = vector_at(tmp_path / "store", "influence_function")
    assert again.digest == whole.digest


def test_items_in_a_model_with_an_sae(given, data, tmp_path, capsys):
    sae = random_sae(1)
    sae_files.save(str(tmp_path / "sae"), sae.to(dtype=torch.float32))
    where, layers = str(tmp_path / "sae"), LayerChoice(first=1, pattern="v_proj")
    loss = make_behaviour(BehaviourSpec("loss"))
    settings = given(**{"curvature.block": 2})

    def act(pipeline: Pipeline):
        def make(kind):
            return pipeline.influence.item_vector(
                "trace", pipeline.influence.queries, loss, layers, where, "the SAE's digest", kind
            )

        return drawn(pipeline), pipeline.influence.queries, make("identity"), make(None)

    rows, queries, plain, solved = inside(settings, act)
    exact = Exact(data, rows, sae, pattern=r"layers\.1\.self_attn\.v_proj")
    b = exact.gradients([q.positive for q in queries])
    assert plain[1].names == solved[1].names == tuple(q.id for q in queries)
    close(exact.flat(test_vector.load(plain[0])), b)
    close(exact.flat(test_vector.load(solved[0])), exact.solved(b, CG["curvature.damping"]))
    assert solved[1].meta["cg"]["items"].keys() == {q.id for q in queries}
    assert capsys.readouterr().err.count("found at") == 0
    again = inside(settings, act)
    assert [x[0] for x in again[2:]] == [plain[0], solved[0]]
    assert capsys.readouterr().err.count("test vector trace: found at") == 2

    def below(pipeline: Pipeline):
        pipeline.influence.item_vector("trace", queries, loss, LayerChoice(pattern="v_proj"), where, "d")

    with pytest.raises(
        CurvatureError, match=r"spliced in at layer 1, but the tracked layers begin at block 0.*first=1"
    ):
        inside(settings, below)


def test_items_by_factors_of_the_model_with_its_sae(given, tmp_path, monkeypatch):
    """Factors are fitted in the spliced model, and are not those of the model as it is."""
    sae_files.save(str(tmp_path / "sae"), random_sae(1).to(dtype=torch.float32))
    loss, layers = make_behaviour(BehaviourSpec("loss")), LayerChoice(first=1, pattern="v_proj")
    more = {name: None for name in CG} | {"curvature": "ekfac", "curvature.layers.pattern": "v_proj"}

    def act(pipeline: Pipeline):
        made = []
        for sae in (None, str(tmp_path / "sae")):
            made.append(pipeline.influence.item_vector("trace", pipeline.influence.queries, loss, layers, sae, sae))
        return [test_vector.load(url) for url, _ in made]

    plain, spliced = inside(given(**more), act)
    assert len(list((tmp_path / "store" / "factors").iterdir())) == 2
    a, b = (v.blocks[v.layers[0].name].dense() for v in (plain, spliced))
    assert (a - b).norm() > 1e-2 * a.norm()
    assert spliced.meta["curvature"] == "ekfac"


def test_relative_damping_is_one_number_for_all_blocks(given, data, tmp_path):
    more = {"curvature.damping": 0.5, "curvature.damping_kind": "relative", "curvature.block": 1}
    run_job("fit", given(**more))
    rows, queries = inside(given(**more), lambda p: (drawn(p), p.influence.queries))
    vector = vector_at(tmp_path / "store", "influence_function")
    exact = Exact(data, rows)
    mean = float(exact.dense.gauss_newton().diagonal().mean())
    found = vector.meta["cg"]["damping"]
    assert 0.1 * mean < found < 2.5 * mean
    b = exact.gradients([q.positive for q in queries]).mean(0)[None]
    close(exact.flat(vector)[:1], exact.solved(b, found))


def test_what_a_user_has_to_know_is_said(given, tmp_path, capsys, monkeypatch):
    few = {"curvature.rows": 3, "curvature.iterations": 2}
    run_job("fit", given(**few))
    said = capsys.readouterr().err
    assert "WARNING: curvature of 3 rows; so few make it unstable (curvature.rows)" in said
    told = vector_at(tmp_path / "store", "influence_function").meta["cg"]["items"]["loss"]
    assert f"cg influence_function: the solve of 'loss' has not converged: residual {told['residuals'][-1]:.3g}" in said
    with pytest.raises(CurvatureError, match=r"none of the 6 rows drawn .* can be used .*curvature\.max_tokens=8"):
        run_job("fit", given(**{"curvature.max_tokens": 8}))
    with monkeypatch.context() as patched:
        patched.setattr(module, "free_bytes", lambda device: 1000)
        with pytest.raises(CurvatureError, match=r"solving for 1 gradients of 2 layers at once takes 1,536 bytes"):
            run_job("fit", given(**{**few, "sink.store": tmp_path / "other"}))


@pytest.mark.parametrize(
    ("more", "error", "said"),
    [({"curvature.iterations": 0}, ConfigError, r"curvature\.iterations is 0"),
     ({"curvature.product": "fisher"}, ConfigError, r"curvature\.product = 'fisher'"),
     ({"curvature.damping": -1}, ConfigError, r"the damping is -1"),
     ({"curvature.examples": 10}, ConfigError, r"examples"),
     ({"curvature.layers.kind": "adapter"}, ConfigError, r"set tuned\.merge=false")],
)  # fmt: skip
def test_bad_settings(given, more, error, said):
    with pytest.raises(error, match=said):
        run_job("fit", given(**more))


def test_bad_rows_beyond_the_limit_are_refused(given, data, tmp_path):
    rows = [*ROWS[:4], *({"id": f"bad{i}", "messages": "none"} for i in range(4))]
    write_jsonl(tmp_path / "broken" / "a.jsonl", rows)
    more = {"source.url": tmp_path / "broken", "curvature.rows": 8}
    with pytest.raises(CorpusError, match=r"4 of 8 rows drawn for the curvature are bad.*max_bad_fraction=0\.1"):
        run_job("fit", given(**more))
    run_job("fit", given(**more, **{"source.max_bad_fraction": 0.6}))
