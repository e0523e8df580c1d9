"""SAE training: a planted dictionary is found again; a killed one ends with the same weights; bad input is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from curate.concepts import sae_files
from curate.concepts.sae import dense, reconstruct
from curate.errors import ConfigError, StorageError, TrainingError
from curate.training import sae_trainer
from curate.training.sae_settings import SaeSettings, middle_half
from curate.training.sae_trainer import SaeIdentity, train_sae
from tests.training.sae_sample import dictionary, planted, steps, write

WHO = SaeIdentity("sae-L2", 2, {"name": "m", "digest": "x", "adapter": None}, {"made": "here"})
BASE = {"dtype": "float32", "batch_tokens": 128, "buffer_tokens": 4000, "latents": 48}
FORMS = {
    "topk": {"k": 2, "learning_rate": 1e-2, "epochs": 3},
    "relu": {"sparsity": 0.15, "learning_rate": 1e-2, "epochs": 3},
    "jumprelu": {"sparsity": 1e-2, "learning_rate": 1e-2, "epochs": 5},
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write(tmp_path_factory.mktemp("planted"), planted(12000), 2000)


@pytest.mark.parametrize("activation", list(FORMS))
def test_a_planted_dictionary_is_found_again(shards, tmp_path, activation):
    settings = SaeSettings(activation=activation, **{**BASE, **FORMS[activation]})
    done = train_sae(settings, steps(shards, settings), WHO, str(tmp_path))
    sae = sae_files.load(str(tmp_path))
    cosines = (dictionary() @ sae.w_dec.T).max(1).values
    assert float(cosines.mean()) > 0.9
    assert torch.allclose(sae.w_dec.norm(dim=-1), torch.ones(48), atol=1e-5)
    # What is told, on states that it has not seen.
    x = planted(2000, seed=5)
    rest = (x - reconstruct(sae, x)).square().sum() / (x - x.mean(0)).square().sum()
    assert float(1 - rest) == pytest.approx(done["explained_variance"], abs=0.02)
    assert float((dense(sae, x) > 0).sum(-1).float().mean()) == pytest.approx(done["l0"], rel=0.1)
    assert (sae.name, sae.layer, sae.scale, sae.meta["made"]) == ("sae-L2", 2, 1.0, "here")
    assert sae.meta["training"]["tokens"] == done["tokens"] == 12000 * settings.epochs


def test_found_again_it_is_not_trained_again(shards, tmp_path):
    settings = SaeSettings(**BASE, k=2, epochs=1)
    done = train_sae(settings, steps(shards, settings), WHO, str(tmp_path))
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert train_sae(settings, steps(shards, settings), WHO, str(tmp_path)) == done
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()} == stamps
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"cfg.json", "sae_weights.safetensors", "log.jsonl", "done.json"}  # no checkpoint is left


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_killed_at_any_checkpoint_it_ends_with_the_same_weights(shards, tmp_path, monkeypatch, activation):
    more = {"epochs": 1, "save_every": 14, "log_every": 9, "dead_after": 1000, "optimizer": "adamw", "k": 2}
    settings = SaeSettings(activation=activation, **{**BASE, **more})
    steady = train_sae(settings, steps(shards, settings), WHO, str(tmp_path / "steady"))
    real, saves = sae_trainer.checkpoints.complete, []

    def complete(url, step, sizes):
        real(url, step, sizes)
        saves.append(step)
        if len(saves) % 2:
            raise StorageError("killed")

    monkeypatch.setattr(sae_trainer.checkpoints, "complete", complete)
    kills, done = 0, None
    while done is None:
        try:
            done = train_sae(settings, steps(shards, settings), WHO, str(tmp_path / "killed"))
        except StorageError:
            kills += 1
    assert kills >= 3
    assert saves == sorted(set(saves))  # no stretch was trained twice
    one, other = (sae_files.load(str(tmp_path / place)) for place in ("steady", "killed"))
    for name, tensor in one.tensors().items():
        assert (tensor - other.tensors()[name]).abs().max() <= 1e-6, name
    same = ("loss", "explained_variance", "l0", "dead", "tokens")
    assert {k: done[k] for k in same} == pytest.approx({k: steady[k] for k in same}, rel=1e-6)
    logs = [
        [json.loads(x) for x in (tmp_path / p / "log.jsonl").read_text().splitlines()] for p in ("steady", "killed")
    ]
    for a, b in zip(*logs, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in b.items() if k != "seconds"}, rel=1e-6
        )


def test_a_half_checkpoint_is_not_taken(shards, tmp_path):
    settings = SaeSettings(**BASE, k=2, epochs=1)
    folder = tmp_path / "checkpoints" / "step-00000010"
    folder.mkdir(parents=True)
    (folder / "state.safetensors").write_bytes(b"half")
    train_sae(settings, steps(shards, settings), WHO, str(tmp_path))


def test_the_auxiliary_loss_revives_dead_latents(shards, tmp_path, monkeypatch):
    class Halved(sae_trainer.Autoencoder):
        """Three quarters of the latents can hardly fire, and the rest are too few for the dictionary."""

        def __init__(self, *given: object) -> None:
            super().__init__(*given)
            with torch.no_grad():
                self.b_enc[12:] -= 4.0

    monkeypatch.setattr(sae_trainer, "Autoencoder", Halved)
    found = {}
    for weight in (0.0, 1 / 32):
        settings = SaeSettings(**BASE, k=2, epochs=1, learning_rate=1e-2, auxiliary=weight, dead_after=2000)
        found[weight] = train_sae(settings, steps(shards, settings), WHO, str(tmp_path / str(weight)))
    without, aided = found.values()
    assert without["dead"] > 0.7
    assert aided["dead"] < without["dead"] - 0.2


def test_the_orthogonality_penalty_makes_latents_less_alike(shards, tmp_path):
    x, found = planted(2000, seed=5), {}
    for weight in (0.0, 5.0):
        settings = SaeSettings(**{**BASE, "latents": 24}, k=8, epochs=1, learning_rate=1e-2, orthogonality=weight)
        train_sae(settings, steps(shards, settings), WHO, str(tmp_path / str(weight)))
        r = dense(sae_files.load(str(tmp_path / str(weight))), x)
        correlation = torch.nan_to_num(torch.corrcoef(r.T))
        found[weight] = float((correlation**2).mean())
    assert found[5.0] < found[0.0]


def test_bfloat16_is_as_good(shards, tmp_path):
    settings = SaeSettings(**{**BASE, **FORMS["topk"], "dtype": "bfloat16", "epochs": 2})
    done = train_sae(settings, steps(shards, settings), WHO, str(tmp_path))
    assert done["explained_variance"] > 0.9
    assert sae_files.load(str(tmp_path)).w_enc.dtype == torch.float32


def test_states_or_rates_that_lead_nowhere_are_said(tmp_path):
    settings = SaeSettings(**BASE, k=2, epochs=1)
    bad = planted(600)
    bad[7, 3] = float("nan")
    cases = {
        "hold NaN": (write(tmp_path / "nan", bad, 200), settings),
        "all alike": (write(tmp_path / "same", torch.ones(300, 4), 100), settings),
    }
    for said, (found, given) in cases.items():
        with pytest.raises(TrainingError, match=said):
            train_sae(given, steps(found, given), WHO, str(tmp_path / "out"))
    late = planted(600)
    late[:, 0] = 1e30
    late[0, 0] = 0.0
    wild = SaeSettings(**{**BASE, "max_grad_norm": 0.0}, k=2, learning_rate=1e30, warmup=0.0)
    found = write(tmp_path / "late", late * 1e8, 200)
    with pytest.raises(TrainingError, match=r"layer 2 (is no number|hold)|activations of layer 2"):
        train_sae(wild, steps(found, wild), WHO, str(tmp_path / "wild"))
    assert not list(Path(tmp_path).rglob("done.json"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"latents": 8, "k": 9}, r"sae\.k is 9, more than sae\.latents=8"),
        ({"k": 0}, r"sae\.k is 0"),
        ({"learning_rate": 0.0}, r"sae\.learning_rate"),
        ({"held_out": 0.0}, r"sae\.held_out"),
        ({"warmup": 0.8, "decay": 0.3}, "together at most 1"),
        ({"layers": []}, "empty list"),
        ({"epochs": 0}, r"sae\.epochs"),
    ],
)
def test_settings_out_of_range_are_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        SaeSettings(**change)


def test_layers():
    assert middle_half(30) == list(range(8, 23))  # ⌈30/4⌉..⌊90/4⌋
    assert middle_half(4) == [1, 2, 3]
    assert SaeSettings(layers="all").chosen_layers(3) == [1, 2]
    assert SaeSettings(layers=[2, 0, 2]).chosen_layers(3) == [0, 2]
    for layer in (3, -1):
        with pytest.raises(ConfigError, match=rf"sae\.layers holds {layer}"):
            SaeSettings(layers=[layer]).chosen_layers(3)
