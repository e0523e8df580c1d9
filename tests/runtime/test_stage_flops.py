"""FLOPs and the devices' peak that stages tell the metrics, against PyTorch's own counter."""

from __future__ import annotations

import pytest

from curate.corpus.recipe import Recipe
from curate.models.load import identity, load_model
from curate.runtime import activation_store, gradient_cosine, latent_activations, latent_influence, stage
from curate.runtime.activation_store import ActivationSpec, store_activations
from curate.runtime.cluster import ClusterSpec
from curate.runtime.latent_activations import LatentActivationSpec
from curate.runtime.output import Output
from curate.runtime.session import session
from tests.flop_counter import Counter
from tests.runtime.tracing import Tracing

ALONE = 1  # tokens of a batch, so that each row is one: the counter counts padding


@pytest.fixture
def told(monkeypatch) -> list[tuple]:
    """(tokens, FLOPs, seconds, peak) of every answer of a worker. Attention is of a kind that the counter knows."""

    def eager(*given):
        model = load_model(*given)
        model.set_attn_implementation("eager")
        return model

    for module in (activation_store, gradient_cosine, latent_activations, latent_influence):
        monkeypatch.setattr(module, "load_model", eager)
        monkeypatch.setattr(module, "device_peak", lambda device, dtype, set_by_hand: 3e9)
    found: list[tuple] = []
    add = stage.Progress.add

    def spy(self, rows, tokens=0, bad=0, flops=0.0, busy=0.0, peak=None):
        found.append((tokens, flops, busy, peak))
        add(self, rows, tokens, bad, flops, busy, peak)

    monkeypatch.setattr(stage.Progress, "add", spy)
    return found


def check(told: list[tuple], counter: Counter, rel: float) -> None:
    assert sum(flops for _, flops, _, _ in told) == pytest.approx(counter.total, rel=rel)
    assert all(tokens > 0 and busy > 0 and peak == 3e9 for tokens, _, busy, peak in told)


@pytest.fixture
def given(tmp_path, tiny) -> Tracing:
    return Tracing(tmp_path, tiny, rows=6)


def test_states(given, told):
    spec = ActivationSpec(given.reader, given.model, (1, 2), "all", "float32", 0.0, 3, ALONE)
    with session(ClusterSpec(address="inline", cpus=1)) as here, Counter() as counter:
        corpus, model = {"digest": given.manifest.digest}, identity(given.model)
        store_activations(str(given.root / "store"), spec, corpus, model, given.manifest, here, 0.0)
    check(told, counter, 0.01)


@pytest.mark.parametrize("tokens", ["all", "response"])
def test_latents(given, told, tokens):
    spec = LatentActivationSpec(given.reader, Output(str(given.root / "out")), ALONE, tokens)
    with session(ClusterSpec(address="inline", cpus=1)) as here, Counter() as counter:
        latent_activations.latent_activations(spec, given.sae, Recipe("latents", {}), given.manifest, here, 0.0)
    check(told, counter, 0.01)


def test_cosines(given, told):
    with Counter() as counter:
        given.cosines(token_budget=ALONE)
    check(told, counter, 0.03)


def test_latent_influence(given, told):
    with Counter() as counter:
        given.latents(token_budget=ALONE)
    check(told, counter, 0.03)
