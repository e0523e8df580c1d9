"""Files of other projects, written here as those projects write them."""

from __future__ import annotations

import pickle

import gguf
import numpy as np
import pytest
import torch

from curate.concepts.concept import load
from curate.errors import ConceptError

V = torch.arange(1, 33, dtype=torch.float32).reshape(4, 8)


def test_persona_vector_file(tmp_path):
    torch.save(V.to(torch.bfloat16), tmp_path / "evil_response_avg_diff.pt")
    c = load(str(tmp_path / "evil_response_avg_diff.pt"))
    np.testing.assert_array_equal(c.vectors, V.numpy())
    assert (c.name, c.pooling, c.layer, c.model, c.method) == ("evil", "response_mean", None, {}, "persona_vectors.pt")
    assert "pooling_assumed" not in c.meta


@pytest.mark.parametrize(
    ("file", "name", "pooling"),
    [
        ("evil_prompt_avg_diff.pt", "evil", "prompt_mean"),
        ("very evil_prompt_last_diff.pt", "very_evil", "last_prompt_token"),
        ("my.vector.pth", "my_vector", "response_mean"),
    ],
)
def test_name_and_pooling_come_from_the_file_name(tmp_path, file, name, pooling):
    torch.save(V, tmp_path / file)
    c = load(str(tmp_path / file))
    assert (c.name, c.pooling) == (name, pooling)


def test_dictionaries_of_tensors(tmp_path):
    torch.save({"a": V, "b": V + 1, "note": "x"}, tmp_path / "two.pt")
    with pytest.raises(ConceptError, match=r"holds 2 tensors .* under \['a', 'b', 'note'\]; name one"):
        load(str(tmp_path / "two.pt"))
    np.testing.assert_array_equal(load(str(tmp_path / "two.pt"), key="b").vectors, V.numpy() + 1)
    with pytest.raises(ConceptError, match=r"under 'c'"):
        load(str(tmp_path / "two.pt"), key="c")
    torch.save({"only": V}, tmp_path / "one.pt")
    assert load(str(tmp_path / "one.pt")).meta["key"] == "only"
    torch.save(V, tmp_path / "bare.pt")
    with pytest.raises(ConceptError, match="single tensor, so it has no entry 'k'"):
        load(str(tmp_path / "bare.pt"), key="k")


@pytest.mark.parametrize("keys", [[1, 3], ["1", "3"], ["layer_1", "layer_3"], ["L1", "L3"]])
def test_dictionary_of_layers(tmp_path, keys):
    torch.save({keys[0]: V[1], keys[1]: V[3]}, tmp_path / "layers.pt")
    c = load(str(tmp_path / "layers.pt"))
    assert c.layers() == [1, 3]
    np.testing.assert_array_equal(c.vectors[[1, 3]], V.numpy()[[1, 3]])
    assert c.meta["partial_rows"]


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("code of the file was run",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True])
def test_files_with_code_are_refused_without_running_it(tmp_path, legacy):
    torch.save({"v": Evil()}, tmp_path / "bad.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ConceptError, match="other Python objects, which are not loaded because they can run code"):
        load(str(tmp_path / "bad.pt"))
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ConceptError, match="can run code"):
        load(str(tmp_path / "bad.pt"))


def test_broken_pt_files(tmp_path):
    torch.save(V, tmp_path / "v.pt")
    raw = (tmp_path / "v.pt").read_bytes()
    for content in (b"", b"hello", raw[: len(raw) // 2]):
        (tmp_path / "v.pt").write_bytes(content)
        with pytest.raises(ConceptError, match=r"v\.pt"):
            load(str(tmp_path / "v.pt"))
    for value, message in (
        (V[0], r"shape \[8\]; expected \[layers \+ 1, width\]"),
        (V.long(), "a tensor of torch.int64"),
        ([V], "the tensor is list"),
        ({}, "holds 0 tensors"),
        ({1: V[1], 2: V[2, :4]}, "different widths"),
        (V.clone().fill_(float("nan")), "no direction at any layer"),
    ):
        torch.save(value, tmp_path / "v.pt")
        with pytest.raises(ConceptError, match=message):
            load(str(tmp_path / "v.pt"))


def repeng(path, directions, arch="controlvector", hint="llama", prefix="direction."):
    """As repeng's ControlVector.export_gguf writes it."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_string(f"{arch}.model_hint", hint)
    writer.add_uint32(f"{arch}.layer_count", len(directions))
    for layer, value in directions.items():
        writer.add_tensor(f"{prefix}{layer}", value)
    _finish(writer)


def cvector_generator(path, directions):
    """As llama.cpp's export_gguf writes it: the count is a signed integer."""
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_int32("controlvector.layer_count", len(directions))
    for layer, value in directions.items():
        writer.add_tensor(f"direction.{layer}", value)
    _finish(writer)


def _finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_repeng_counts_blocks_so_direction_n_is_hidden_state_n_plus_1(tmp_path):
    # repeng's default for a model of 4 blocks: layers 3, 2, 1, in that order
    made = {n: np.full(8, n, dtype=np.float32) for n in (3, 2, 1)}
    repeng(tmp_path / "honest.gguf", made)
    c = load(str(tmp_path / "honest.gguf"))
    assert c.vectors.shape == (5, 8)  # L + 1 rows
    assert c.layers() == [2, 3, 4]
    assert [c.vectors[row, 0] for row in (2, 3, 4)] == [1, 2, 3]
    assert (c.name, c.pooling, c.meta["model_hint"], c.meta["written_by"]) == (
        "honest",
        "last_token",
        "llama",
        "repeng",
    )


def test_cvector_generator_names_the_output_of_block_n_minus_1_direction_n(tmp_path):
    cvector_generator(tmp_path / "happy.gguf", {n: np.full(8, n, dtype=np.float32) for n in (1, 2, 3)})
    c = load(str(tmp_path / "happy.gguf"))
    assert c.layers() == [1, 2, 3]
    assert c.vectors[1, 0] == 1
    assert c.meta["written_by"] == "cvector-generator"


def test_half_precision_gguf_on_an_object_store(tmp_path):
    import fsspec

    repeng(tmp_path / "half.gguf", {1: np.full(8, 0.5, dtype=np.float16)})
    fsspec.filesystem("memory").pipe_file("/vectors/half.gguf", (tmp_path / "half.gguf").read_bytes())
    c = load("memory://vectors/half.gguf")
    np.testing.assert_array_equal(c.vectors[2], np.full(8, 0.5, dtype=np.float32))


def test_broken_and_foreign_gguf_files(tmp_path):
    path = tmp_path / "x.gguf"
    good = {n: np.ones(8, dtype=np.float32) for n in (1, 2)}
    repeng(path, good)
    raw = path.read_bytes()
    for content in (b"", b"GGUF", b"hello, no gguf here at all", raw[:40], raw[:-20]):
        path.write_bytes(content)
        with pytest.raises(ConceptError, match=r"x\.gguf is not a whole GGUF file"):
            load(str(path))
    for make, message in (
        (lambda: repeng(path, good, arch="llama"), "architecture 'llama', not a control vector.*model.path"),
        (lambda: repeng(path, good, prefix="other."), r"no direction.N tensor; it has \['other.1', 'other.2'\]"),
        (lambda: repeng(path, {"one": good[1]}), "tensor 'direction.one'"),
        (lambda: repeng(path, {1: good[1], 2: np.ones(4, dtype=np.float32)}), r"different widths: \[4, 8\]"),
        (lambda: repeng(path, {99999: good[1]}), "layer 100000 is out of all proportion"),
    ):
        path.unlink()
        make()
        with pytest.raises(ConceptError, match=message):
            load(str(path))
