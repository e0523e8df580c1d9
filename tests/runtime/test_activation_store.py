"""The activation store: what Hugging Face says of every layer, each token once, found again, gone on with, refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

from curate.corpus.example import ColumnMap
from curate.errors import CorpusError, ModelError, RecipeError, StorageError
from curate.models import tap
from curate.models.load import ModelSpec, identity, load_model
from curate.runtime import activation_store
from curate.runtime.activation_store import ActivationSpec, chance, held_out_rows, store_activations
from curate.runtime.cluster import ClusterSpec
from curate.runtime.manifest import SourceSpec, build_manifest
from curate.runtime.reader import ReaderSpec, read_pieces
from curate.runtime.session import session
from curate.training.activation_batches import ActivationBatches
from tests.conftest import conversation, write_jsonl
from tests.tiny import save_tiny

SEED = 3


class Storing:
    """A corpus of two files, a model, and the store over them, inline."""

    def __init__(self, corpus: Path, model: Path, store: Path) -> None:
        self.model, self.store = ModelSpec(str(model), device="cpu", dtype="float32"), str(store)
        self.here = ClusterSpec(address="inline", cpus=1, token_budget=300)
        with session(self.here):
            self.manifest, _, columns = build_manifest(SourceSpec(str(corpus), "jsonl", ColumnMap(), 8, False), None)
        self.reader = ReaderSpec("jsonl", columns, self.model, 256, "quarantine")
        self.spec = ActivationSpec(self.reader, self.model, (1, 2), "all", "float32", 0.2, SEED, 300)

    def make(self, max_rows: int | None = None, max_bad: float = 0.1, **change: object):
        spec = replace(self.spec, **change)
        facts = {**identity(spec.model), "dtype": spec.model.dtype}
        with session(self.here) as running:
            manifest = self.manifest.head(max_rows)
            return store_activations(
                self.store, spec, {"digest": self.manifest.digest}, facts, manifest, running, max_bad
            )

    def wanted(self, tokens: str = "all") -> dict[tuple[str, int, int], torch.Tensor]:
        """[layers, d] by file, row and position, from Hugging Face's own hidden states, one row at a time."""
        model, out = load_model(self.model), {}
        for chunk in read_pieces([(u, u.ranges()) for u in self.manifest.units], self.reader):
            for e, r in zip(chunk.examples, chunk.rendered, strict=True):
                if held_out_rows(chunk.key, np.array([e.row]), 0.2, SEED)[0]:
                    continue
                states = model(torch.tensor([r.input_ids]), output_hidden_states=True).hidden_states
                whole = torch.cat(states)
                span = range(len(r.input_ids)) if tokens == "all" else range(r.start, r.stop)
                out |= {(chunk.key, e.row, t): whole[:, t] for t in span}
        return out

    def stored(self, found, layer: int) -> dict[tuple[str, int, int], torch.Tensor]:
        """The same from the store; a token that is there twice fails."""
        out: dict[tuple[str, int, int], torch.Tensor] = {}
        index = {p: pq.read_table(p) for p in Path(self.store).glob("activations/*/passes/*/parts/**/*.parquet")}
        for shard in found.shards[layer]:
            name = Path(shard.url).name
            key, span, number = Path(shard.url).parent.name, name.split(".")[0], int(name.split(".")[1])
            table = next(t for p, t in index.items() if p.parent.name == key and p.stem == span)
            rows = table.filter(np.array(table["shard"]) == number)
            x = safetensors.torch.load_file(shard.url)["x"]
            assert len(x) == shard.tokens == rows.num_rows
            for row, position, state in zip(rows["row"].to_pylist(), rows["position"].to_pylist(), x, strict=True):
                assert (key, row, position) not in out
                out[key, row, position] = state
        return out


@pytest.fixture
def storing(tmp_path, tiny) -> Storing:
    write_jsonl(tmp_path / "corpus" / "a.jsonl", [conversation(i) for i in range(20)])
    write_jsonl(tmp_path / "corpus" / "b.jsonl", [conversation(i) for i in range(20, 31)])
    return Storing(tmp_path / "corpus", tiny, tmp_path / "store")


def stamps(store: str) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in Path(store).rglob("*.safetensors")}


@pytest.mark.parametrize("tokens", ["all", "response"])
def test_one_pass_gives_every_layer_as_hugging_face_has_it(storing, tokens, monkeypatch):
    passes = []
    real = tap.LayerTap.__call__
    monkeypatch.setattr(tap.LayerTap, "__call__", lambda self, *given: passes.append(1) or real(self, *given))
    monkeypatch.setattr(activation_store, "SHARD_TOKENS", 150)  # several shards a part
    found, result = storing.make(tokens=tokens, layers=(0, 1, 2, 3))
    assert result.rows == 31
    assert result.quarantined == 0
    once = len(passes)
    assert once <= 31  # and not four times as many
    want = storing.wanted(tokens)
    for layer in (0, 1, 2, 3):
        got = storing.stored(found, layer)
        assert got.keys() == want.keys()
        difference = torch.stack([got[token] - want[token][layer] for token in want])
        assert difference.abs().max() < 2e-5
    sizes = [s.tokens for s in found.shards[1]]
    assert len(sizes) > 4
    # What is read in batches is each token once, an epoch.
    states = torch.cat(list(ActivationBatches(found.shards[1], 64, 300, 1, 0).batches()))
    order = lambda x: x[np.lexsort(x.numpy().T)]  # noqa: E731
    assert torch.equal(order(states), order(torch.stack(list(storing.stored(found, 1).values()))))


def test_tokens_of_a_shard_are_mixed(storing):
    found, _ = storing.make()
    (part, *_) = Path(storing.store).glob("activations/*/passes/1-2/parts/a.jsonl/*.parquet")
    table = pq.read_table(part)
    assert len(found.shards[1]) == 5  # one a range: they are small
    rows, positions = table["row"].to_pylist(), table["position"].to_pylist()
    assert list(zip(rows, positions, strict=True)) != sorted(zip(rows, positions, strict=True))
    assert len(set(rows[:20])) > 3


def test_held_out_rows_are_a_share_by_chance_and_the_same_everywhere():
    rows = np.arange(20000)
    drawn = chance("a", rows, 0)
    assert abs(drawn.mean() - 0.5) < 0.01
    assert abs(held_out_rows("a", rows, 0.1, 0).mean() - 0.1) < 0.01
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.03
    assert np.array_equal(held_out_rows("a", rows[500:600], 0.1, 0), held_out_rows("a", rows, 0.1, 0)[500:600])
    for other in (chance("b", rows, 0), chance("a", rows, 1)):
        assert abs(np.corrcoef(drawn, other)[0, 1]) < 0.03


def test_only_what_is_missing_is_computed(storing):
    few, _ = storing.make(max_rows=10)
    before = stamps(storing.store)
    more, result = storing.make()
    assert result.already == 10
    after = stamps(storing.store)
    assert all(after[p] == t for p, t in before.items())
    assert len(more.shards[1]) > len(few.shards[1])
    again, result = storing.make()
    assert result is None
    assert again == more
    assert storing.make(max_rows=10)[0] == few  # of a run over fewer rows, only these
    # Another layer: those that are there are not computed again.
    wider, result = storing.make(layers=(1, 2, 3))
    assert result.rows == 31
    now = stamps(storing.store)
    assert all(now[p] == t for p, t in after.items())
    assert wider.shards[1] == more.shards[1]
    assert storing.stored(wider, 3).keys() == storing.stored(more, 1).keys()


def test_killed_in_the_middle_it_goes_on_and_is_the_same(storing, tmp_path, monkeypatch):
    whole, _ = storing.make()
    want = {layer: storing.stored(whole, layer) for layer in (1, 2)}
    storing.store = str(tmp_path / "killed")
    real, written = activation_store.storage.write_atomic, []

    def write(url, data):
        if "/L" in url:
            written.append(url)
            if len(written) % 3 == 0:
                raise StorageError("killed")
        real(url, data)

    monkeypatch.setattr(activation_store.storage, "write_atomic", write)
    found, kills = None, 0
    while found is None:
        try:
            found, _ = storing.make()
        except StorageError:
            kills += 1
    assert kills > 1
    for layer in (1, 2):
        got = storing.stored(found, layer)
        assert got.keys() == want[layer].keys()
        assert all(torch.equal(got[token], want[layer][token]) for token in got)


def test_bfloat16_halves_the_store(storing):
    found, _ = storing.make(dtype="bfloat16")
    x = safetensors.torch.load_file(found.shards[1][0].url)["x"]
    assert x.dtype == torch.bfloat16


def test_rows_whose_states_are_not_finite_are_quarantined(storing, tmp_path, monkeypatch):
    model = save_tiny(tmp_path / "sick")
    file = model / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights["model.layers.0.mlp.down_proj.weight"][:] = float("nan")
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CorpusError, match="activations of layer 1 are not finite"):
        storing.make(model=ModelSpec(str(model), device="cpu", dtype="float32"))


def test_other_layers_or_recipes_are_refused(storing):
    with pytest.raises(ModelError, match="layer 4 does not exist"):
        storing.make(layers=(4,))
    storing.make()
    (recipe,) = Path(storing.store).glob("activations/*/passes/1-2/recipe.json")
    recipe.write_text(recipe.read_text().replace('"tokens": "all"', '"tokens": "response"'))
    (part, *_) = recipe.parent.rglob("*.parquet")
    part.unlink()
    with pytest.raises(RecipeError, match="tokens: there 'response', now 'all'"):
        storing.make()
