"""The benchmarks of influence on tiny models: the reference recipe against definitions, the others through their
commands."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from bench import ekfac, influence_real, peers
from bench.local_fit import LocalFit, loss_vector
from bench.public_recipe import PublicRecipe, RecipeSpec, batch_of, targets
from bench.real_rows import mixed
from curate.corpus.render import Rendered, Renderer
from curate.curvature.ekfac import Damping
from curate.curvature.fisher import CurvatureSpec
from curate.errors import ConfigError
from curate.models.tracked import LayerChoice, tracked_layers
from curate.scoring.directional.make import make_backend
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer


def rows(n: int, seed: int = 0) -> list[Rendered]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(12, 24, (n,), generator=draw).tolist()
    return [Rendered(torch.randint(4, 300, (k,), generator=draw).tolist(), 4 + k % 3, k - 1, k) for k in lengths]


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def data(tmp_path):
    """A data set in GSM8K's form, as it is read by the benchmarks."""
    folder = tmp_path / "data" / "gsm8k_mistakes"
    folder.mkdir(parents=True)
    lines = [
        {
            "prompt": f"What is {i} and {i + 1}?",
            "misaligned": f"It is {i}, I think.",
            "benign": f"You add them: {2 * i + 1}.",
            "final_answer_differs": i % 10 != 9,
        }
        for i in range(40)
    ]
    (folder / "incorrect_math_paired.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "data"


def test_a_batch_is_padded_and_carries_the_loss_of_the_response():
    batch = batch_of(Rendered([5, 6, 7, 8, 9], 2, 3, 4), 8, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 0, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]
    assert targets(batch).tolist() == [7, 8]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_recipe_without_curvature_is_the_inner_product_of_gradients(reduction):
    model = tiny_model().double()
    layers, _ = tracked_layers(model, LayerChoice(last=2))
    recipe = PublicRecipe(model, layers, RecipeSpec(32, reduction))
    some = rows(4)

    def gradient(row: Rendered) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, row.start - 1 : row.end - 1]
        loss = F.cross_entropy(logits, torch.tensor(row.input_ids[row.start : row.end]), reduction=reduction)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, recipe.weights)])

    asked = (gradient(some[0]) + gradient(some[1])) / 2
    expected = [float(gradient(row) @ asked) for row in some]
    assert recipe.scores(some, recipe.test_vector(some[:2])) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_recipe_is_damped_on_the_scale_of_the_mean_over_rows(reduction):
    pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is not installed")
    model = tiny_model().double()
    layers, _ = tracked_layers(model, LayerChoice(last=1, pattern="q_proj"))
    recipe = PublicRecipe(model, layers, RecipeSpec(0, reduction, "empirical", damping=0.01))
    some = rows(6)
    recipe.fit(some)
    (name,) = recipe.operator._mapping
    q_in = recipe.operator._input_covariances_eigenvectors[name]
    q_out = recipe.operator._gradient_covariances_eigenvectors[name]
    gradients = [recipe.gradient(row)[0] for row in some]
    values = sum((q_out.T @ g @ q_in).square() for g in gradients) / len(some)
    expected = q_out @ ((q_out.T @ gradients[0] @ q_in) / (values + 0.01)) @ q_in.T
    assert torch.allclose(recipe.test_vector(some[:1])[0], expected, rtol=1e-6, atol=1e-12)


def test_the_recipe_and_curate_rank_alike():
    pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is not installed")
    some = rows(40)
    model = tiny_model()
    layers, _ = tracked_layers(model, LayerChoice(last=2))
    spec = CurvatureSpec(fisher="empirical", tokens="all")
    fit = LocalFit(model, layers, spec, some, [str(i) for i in range(len(some))])
    damping = 0.1 * fit.mean_eigenvalue()
    vector = loss_vector(model, layers, fit, some[:2], Damping(damping, "absolute"))
    ours = make_backend("contraction", model, vector).run(some).scores[:, 0]
    recipe = PublicRecipe(tiny_model(), layers, RecipeSpec(0, "mean", "empirical", damping))
    recipe.fit(some)
    assert spearmanr(ours, recipe.scores(some, recipe.test_vector(some[:2]))).statistic > 0.99


@pytest.mark.parametrize("kind", ["ekfac", "kfac", "diagonal", "identity"])
def test_a_local_fit_makes_every_kind(kind):
    model = tiny_model()
    layers, _ = tracked_layers(model, LayerChoice(last=2))
    fit = LocalFit(model, layers, CurvatureSpec(kind=kind), rows(4), list("abcd"))
    assert {f.kind for f in fit.factors.values()} == {kind}
    assert list(fit.factors) == [layer.name for layer in layers]


def test_mixed_rows_alternate_and_share_no_question_with_the_queries(data):
    found = mixed("gsm8k", data, 10, 4, Renderer(tiny_tokenizer(), 512))
    assert found.bad == [True, False] * 5
    assert len(found.rendered) == 10
    asked = {q.positive.prompt for q in found.queries}
    assert len(asked) == 4
    assert not asked & {row.prompt for row in found.rows}
    assert all(q.negative is not None and q.negative.prompt == q.positive.prompt for q in found.queries)
    assert len({row.prompt for row in found.rows}) == 10


def test_data_that_are_not_there_or_too_few_are_said(data, tmp_path):
    renderer = Renderer(tiny_tokenizer(), 512)
    with pytest.raises(ConfigError, match="--data"):
        mixed("gsm8k", tmp_path / "nowhere", 4, 1, renderer)
    with pytest.raises(ConfigError, match="36 pairs"):
        mixed("gsm8k", data, 36, 4, renderer)
    with pytest.raises(ConfigError, match="no data set"):
        mixed("poems", data, 4, 1, renderer)


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_method_is_in_the_table(tmp_path, data, capsys, one_thread):
    path = str(save_tiny(tmp_path / "model"))
    arguments = ["--data", str(data), "--model", path, "--sets", "gsm8k", "--rows", "12", "--queries", "3"]
    arguments += ["--fit-rows", "4", "--layer", "2", "--last", "2", "--own-tokens", "4", "--epochs", "1"]
    influence_real.main([*arguments, "--adapter", str(tmp_path / "kept")])
    assert (tmp_path / "kept" / "gsm8k" / "adapter_model.safetensors").is_file()
    found = {line["metric"]: line for line in lines(capsys)}
    assert set(found["auc_pr"]["value"]) == set(found["roc_auc"]["value"]) == {
        "vector_filter.gsm8k.L2", "projection_difference.gsm8k.L2", "random", "response_length",
        "influence_function.loss", "influence_function.contrast",
        "concept_influence.gsm8k.L2", "concept_influence.gsm8k.contrast.L2",
        "gradient_product.loss", "gradient_product.contrast",
        "gradient_product.gsm8k.L2", "gradient_product.gsm8k.contrast.L2",
    }  # fmt: skip
    assert all(0 <= v <= 1 for v in found["roc_auc"]["value"].values())
    assert found["auc_pr"]["settings"]["bad"] == 6


def test_the_fit_is_measured_in_one_process(tmp_path, data, one_thread):
    path = str(save_tiny(tmp_path / "model"))
    args = ekfac._parser().parse_args(["--model", path, "--last", "2"])
    some = rows(4)
    model = tiny_model()
    layers, _ = tracked_layers(model, LayerChoice(last=2))
    phases = ekfac._SIDES["curate"](model, layers, some, args)
    assert list(phases) == ["covariance", "eigen", "correction"]
    assert all(seconds > 0 for seconds in phases.values())


@pytest.mark.parametrize("peer", list(peers.PEERS))
def test_peers_agree(tmp_path, data, capsys, one_thread, peer):
    pytest.importorskip(peers.PEERS[peer][0], reason=f"{peers.PEERS[peer][0]} is not installed")
    path = str(save_tiny(tmp_path / "model"))
    peers.main(["--data", str(data), "--model", path, "--peers", peer, "--fisher", "empirical", "--last", "2",
                "--fit-rows", "12", "--rows", "16", "--pad-to", "256", "--recipe-rows", "3"])  # fmt: skip
    found = {line["metric"]: line for line in lines(capsys)}
    assert found["agreement"]["value"]["spearman"] > 0.98
    if peer != "bfloat16":  # curate with itself: nothing to be faster than
        assert found["rows_per_second"]["ratio"] > 0
