"""Test vectors: solutions, files, arrays, ranks; and files that are broken or of another model."""

from __future__ import annotations

import gc
import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from curate.curvature import blocks, test_vector
from curate.curvature.ekfac import Damping, Factor
from curate.curvature.test_vector import (
    Dense,
    LowRank,
    TestVector,
    check_fits,
    load,
    load_header,
    low_rank,
    restrict,
    save,
    solve_all,
)
from curate.errors import CurvatureError
from curate.models.tracked import TrackedLayer

LAYERS = (
    TrackedLayer("b.0.q", 6, 4, 0, "b.0.q"),
    TrackedLayer("b.0.o", 4, 6, 0, "b.0.o"),
    TrackedLayer("b.1.q", 6, 4, 1, "b.1.q"),
)
MODEL = {"name": "tiny", "digest": "aaa", "adapter": None}


def matrices(q: int, layer: TrackedLayer, seed: int = 0) -> torch.Tensor:
    return torch.randn(
        (q, layer.out, layer.width), generator=torch.Generator().manual_seed(seed + layer.size + layer.block)
    )


def vector(names: tuple[str, ...] = ("loss", "kind.L1"), layers=LAYERS, seed: int = 0) -> TestVector:
    blocks = {layer.name: Dense(matrices(len(names), layer, seed)) for layer in layers}
    return TestVector(names, tuple(layers), blocks, {"model": MODEL, "recipe": "r"})


def flat(v: TestVector) -> torch.Tensor:
    """[Q, all weights]"""
    return torch.cat([v.blocks[layer.name].dense().flatten(1) for layer in v.layers], 1)


def equal(a: TestVector, b: TestVector) -> None:
    assert (a.names, a.layers, a.meta) == (b.names, b.layers, b.meta)
    assert torch.equal(flat(a), flat(b))
    assert [type(a.blocks[x.name]) for x in a.layers] == [type(b.blocks[x.name]) for x in b.layers]


def spd(n: int, seed: int) -> torch.Tensor:
    root = torch.randn((n, n), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["absolute", "relative"])
def test_solve_all_is_the_dense_damped_inverse_of_a_kronecker_curvature(kind):
    factors, dense, gradients = {}, {}, {"loss": {}, "kind.L1": {}}
    damping = Damping(0.3, kind)
    for i, layer in enumerate(LAYERS):
        a, b = spd(layer.width, i), spd(layer.out, 10 + i)
        (la, qa), (lb, qb) = torch.linalg.eigh(a), torch.linalg.eigh(b)
        factors[layer.name] = Factor(layer, "ekfac", torch.outer(lb, la), qb, qa)
        h = torch.kron(b, a)  # of rows of W one after the other
        added = 0.3 if kind == "absolute" else 0.3 * float(torch.linalg.eigvalsh(h).mean())
        dense[layer.name] = torch.linalg.inv(h + added * torch.eye(len(h), dtype=torch.float64))
        for q, name in enumerate(gradients):
            if layer.block == 0 or name == "loss":  # the concept reads layer 1: nothing of block 1
                gradients[name][layer.name] = matrices(2, layer)[q].double()
    loaded = []

    def load_factor(layer: TrackedLayer) -> Factor:
        loaded.append(layer.name)
        return factors[layer.name]

    found = solve_all(gradients, LAYERS, load_factor, damping, {"recipe": "x"})
    assert loaded == [layer.name for layer in LAYERS]
    assert found.names == ("loss", "kind.L1")
    assert found.meta == {"recipe": "x", "damping": {"value": 0.3, "kind": kind}}
    for layer in LAYERS:
        block = found.blocks[layer.name].dense()
        assert block.dtype == torch.float32
        for q, name in enumerate(gradients):
            g = gradients[name].get(layer.name, torch.zeros(layer.out, layer.width, dtype=torch.float64))
            expected = (dense[layer.name] @ g.flatten()).reshape(g.shape)
            torch.testing.assert_close(block[q].double(), expected, rtol=1e-5, atol=1e-6)


def test_solve_all_leaves_out_what_no_behaviour_reaches_and_refuses_nothing_at_all():
    gradient = {"loss": {LAYERS[0].name: matrices(1, LAYERS[0])[0]}}
    found = solve_all(gradient, LAYERS, lambda layer: Factor(layer, "identity"), Damping())
    assert found.layers == LAYERS[:1]
    assert torch.equal(found.blocks["b.0.q"].dense()[0], gradient["loss"]["b.0.q"])
    with pytest.raises(CurvatureError, match=r"gradients of 'b\.0\.q', which is none of the 2"):
        solve_all(gradient, LAYERS[1:], lambda layer: Factor(layer, "identity"), Damping())
    with pytest.raises(CurvatureError, match="no gradient"):
        solve_all({"loss": {}}, LAYERS, lambda layer: Factor(layer, "identity"), Damping())
    dead = Factor(LAYERS[0], "diagonal", torch.zeros(6, 4))
    with pytest.raises(CurvatureError, match="the test vector of 'loss' is zero"):
        solve_all(gradient, LAYERS, lambda layer: dead, Damping())
    tiny = Factor(LAYERS[0], "diagonal", torch.full((6, 4), 1e-39))
    with pytest.raises(CurvatureError, match=r"b\.0\.q is not finite; raise the damping"):
        solve_all(gradient, LAYERS, lambda layer: tiny, Damping(1e-39, "absolute"))


def test_solve_all_with_a_rank_is_the_whole_one_cut_and_holds_one_dense_block(monkeypatch):
    made = vector()
    gradients = {
        name: {x.name: made.blocks[x.name].dense()[q].clone() for x in LAYERS} for q, name in enumerate(made.names)
    }
    del gradients["kind.L1"]["b.1.q"]
    factors = {x.name: Factor(x, "diagonal", matrices(1, x, 5)[0].abs()) for x in LAYERS}
    whole = solve_all(gradients, LAYERS, lambda layer: factors[layer.name], Damping())
    assert all(len(gradient) >= 2 for gradient in gradients.values())  # not consumed
    dense = []

    def load_factor(layer: TrackedLayer) -> Factor:
        gc.collect()
        assert not [ref for ref in dense if ref() is not None]
        assert not [g for g in gradients.values() for x in LAYERS[: LAYERS.index(layer)] if x.name in g]
        return factors[layer.name]

    def watched(block, rank):
        dense.append(weakref.ref(block.values))
        return blocks.cut(block, rank)

    monkeypatch.setattr(test_vector, "cut", watched)
    found = solve_all(gradients, LAYERS, load_factor, Damping(), {"recipe": "x"}, rank=2, consume=True)
    assert len(dense) == len(LAYERS)
    monkeypatch.undo()
    expected = low_rank(whole, 2)[0]
    assert torch.equal(flat(found), flat(expected))
    assert found.meta["recipe"] == "x"
    assert found.meta["rank"] == 2
    assert found.meta["energy_kept"] == pytest.approx(expected.meta["energy_kept"])
    assert max(found.meta["energy_kept"].values()) < 0.999
    with pytest.raises(CurvatureError, match="rank of a test vector is 0"):
        solve_all(gradients, LAYERS, load_factor, Damping(), rank=0)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_saved_test_vector_is_the_same_again(tmp_path, rank):
    made = vector() if rank is None else low_rank(vector(), rank)[0]
    url = save(made, str(tmp_path / "s"))
    assert url.endswith("s.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.json", "s.safetensors"]
    for name in ("s", "s.json", "s.safetensors"):
        equal(load(str(tmp_path / name)), made)
    assert load(url).digest == made.digest
    assert load_header(url) == made.header
    (tmp_path / "s.safetensors").unlink()
    assert load_header(url).names == made.names  # without a number


def test_arrays_share_memory_both_ways_even_when_they_are_read_only():
    made = low_rank(vector(), 2)[0]
    mixed = TestVector(made.names, made.layers, {**made.blocks, "b.0.q": vector().blocks["b.0.q"]}, made.meta)
    arrays = mixed.to_arrays()
    assert all(isinstance(array, np.ndarray) for array in arrays.values())
    for array in arrays.values():
        array.setflags(write=False)
    found = TestVector.from_arrays(arrays)
    equal(found, mixed)
    assert found.digest == mixed.digest
    assert found.blocks["b.0.q"].dense().data_ptr() == mixed.blocks["b.0.q"].dense().data_ptr()
    assert found.blocks["b.0.o"].u.data_ptr() == mixed.blocks["b.0.o"].u.data_ptr()


def test_the_digest_is_of_what_changes_a_score():
    made = vector()
    digest = made.digest
    assert replace(made, meta={**made.meta, "recipe": "other"}).digest == digest
    for other in (
        vector(seed=1),
        replace(made, names=("loss", "kind.L2")),
        replace(made, meta={"model": {**MODEL, "digest": "bbb"}}),
        restrict(made, lambda layer: layer.block == 0),
        low_rank(made, 1)[0],
    ):
        assert other.digest != digest


def test_low_rank_keeps_the_energy_of_the_largest_singular_values():
    made = vector()
    thin, share = low_rank(made, 2)
    assert thin.meta["rank"] == 2
    kept = np.zeros(2)
    total = np.zeros(2)
    for layer in made.layers:
        assert isinstance(thin.blocks[layer.name], LowRank)
        assert thin.blocks[layer.name].shape == made.blocks[layer.name].shape
        for q, matrix in enumerate(made.blocks[layer.name].dense().double().numpy()):
            u, s, vt = np.linalg.svd(matrix, full_matrices=False)
            expected = u[:, :2] * s[:2] @ vt[:2]
            np.testing.assert_allclose(thin.blocks[layer.name].dense()[q].numpy(), expected, atol=1e-5)
            kept[q] += (s[:2] ** 2).sum()
            total[q] += (s**2).sum()
    assert share == pytest.approx(kept.sum() / total.sum(), rel=1e-5)
    assert list(thin.meta["energy_kept"].values()) == pytest.approx(kept / total, rel=1e-5)
    np.testing.assert_allclose(thin.norm(), np.sqrt(kept), rtol=1e-5)
    np.testing.assert_allclose(made.norm(), np.sqrt(total), rtol=1e-6)
    whole, share = low_rank(made, 99)
    assert share == pytest.approx(1, rel=1e-6)
    torch.testing.assert_close(flat(whole), flat(made), rtol=1e-4, atol=1e-5)
    with pytest.raises(CurvatureError, match="rank of a test vector is 0"):
        low_rank(made, 0)


def test_large_blocks_keep_almost_the_best_energy_and_the_same_numbers_each_time():
    layer = TrackedLayer("w", 400, 300, 0, "w")
    g = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, 301).float() ** -0.7
    q, _ = torch.linalg.qr(torch.randn((400, 300), generator=g))
    p, _ = torch.linalg.qr(torch.randn((300, 300), generator=g))
    made = TestVector(("f",), (layer,), {"w": Dense(((q * spectrum) @ p.T)[None])})
    first, share = low_rank(made, 16)
    best = float((spectrum[:16] ** 2).sum() / (spectrum**2).sum())
    assert best * 0.999 < share <= best * (1 + 1e-5)
    torch.rand(3)
    assert torch.equal(first.blocks["w"].u, low_rank(made, 16)[0].blocks["w"].u)


def test_restriction():
    made = vector()
    lower = restrict(made, lambda layer: layer.block == 0)
    assert [layer.name for layer in lower.layers] == ["b.0.q", "b.0.o"]
    assert lower.blocks["b.0.o"] is made.blocks["b.0.o"]
    with pytest.raises(CurvatureError, match="none of the 3 layers"):
        restrict(made, lambda layer: False)


def test_blocks_must_fit_names_and_layers():
    made = vector()
    with pytest.raises(CurvatureError, match=r"b\.0\.q has the shape \(2, 6, 4\), expected \(1, 6, 4\)"):
        replace(made, names=("loss",))
    with pytest.raises(CurvatureError, match="different names"):
        replace(made, names=("loss", "loss"))
    with pytest.raises(CurvatureError, match=r"3 blocks for 2 layers, without a partner: 'b\.1\.q'"):
        replace(made, layers=LAYERS[:2])


def test_another_model_is_named():
    made = vector()
    check_fits(made, MODEL)
    check_fits(made.header, {**MODEL, "name": "elsewhere"})
    check_fits(replace(made, meta={}), MODEL)
    for other in ({"name": "big", "digest": "bbb"}, {**MODEL, "name": "big", "adapter": "ccc"}):
        with pytest.raises(CurvatureError, match=r"made with tiny \(digest aaa\), but .* is big \(digest "):
            check_fits(made.header, other)


def test_broken_files_say_what_is_wrong(tmp_path):
    path = tmp_path / "s"
    save(vector(), str(path))
    tensors, text = (tmp_path / "s.safetensors").read_bytes(), (tmp_path / "s.json").read_text()
    body = json.loads(text)

    def broken(message: str, json_text: str | None = text, numbers: bytes = tensors) -> None:
        (tmp_path / "s.safetensors").write_bytes(numbers)
        if json_text is None:
            (tmp_path / "s.json").unlink()
        else:
            (tmp_path / "s.json").write_text(json_text)
        with pytest.raises(CurvatureError, match=message):
            load(str(path))

    broken(r"s\.safetensors is broken", numbers=tensors[:-20])
    broken(r"s\.safetensors is broken", numbers=b"")
    broken(r"do not belong together", numbers=tensors[:-1] + bytes([tensors[-1] ^ 1]))
    broken(r"s\.json is broken", text[:-30])
    broken(r"s\.json is broken: KeyError", json.dumps({key: x for key, x in body.items() if key != "names"}))
    broken(r"has version 9", json.dumps({**body, "version": 9}))
    broken(r"is not a test vector", json.dumps({"format": "curate.concept"}))
    broken(r"b\.0\.q has the shape", json.dumps({**body, "names": ["loss"]}))
    broken(r"was not written to its end", None)
    save(vector(), str(path))  # over what is there
    equal(load(str(path)), vector())
    bad = vector()
    bad.blocks["b.0.o"].values[0, 0, 0] = float("nan")
    with pytest.raises(CurvatureError, match=r"NaN or infinite values .*b\.0\.o"):
        save(bad, str(path))


def test_any_storage_will_do(tmp_path, monkeypatch):
    monkeypatch.setenv("CURATE_CACHE", str(tmp_path))
    made = vector()
    save(made, "memory://vectors/s")
    equal(load("memory://vectors/s"), made)
