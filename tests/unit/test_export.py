"""Exports: what is loaded is what was saved, as small as promised, and damage is refused."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.artifacts import RunFolder
from pipeline.config_loading import load_config
from pipeline.errors import UserError
from pipeline.export import packed
from pipeline.export.formats import FORMATS, differing_weights, same_logits
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.models.prunable import prunable_weights
from pipeline.stages import export
from pipeline.stages.inputs import save_model

DTYPES = (torch.float32, torch.bfloat16)
PROMPTS = [[1, 2, 3], [4], [3, 1, 4, 1, 5]]


def sparse_llama(sparsity, *, dtype=torch.float32, hidden=15, mlp=24, vocab=11, tie=False):
    """A random Llama, each prunable matrix pruned to the sparsity by chance."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=2,
        max_position_embeddings=32,
        tie_word_embeddings=tie,
        dtype=dtype,
    )
    model = LlamaForCausalLM._from_config(config, dtype=dtype).eval()
    prune(model, sparsity)
    return model


@torch.no_grad()
def prune(model, sparsity):
    for weight in prunable_weights(model).values():
        order = torch.randperm(weight.numel()).view_as(weight)
        weight[order < round(sparsity * weight.numel())] = 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A packed model, not to be changed."""
    out = tmp_path_factory.mktemp("packed")
    packed.save(sparse_llama(0.5), out)
    return out


@settings(deadline=None, max_examples=25)
@given(
    hidden=st.integers(1, 6).map(lambda width: 3 * width),
    mlp=st.integers(1, 13),
    vocab=st.integers(6, 9),
    sparsity=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    dtype=st.sampled_from(DTYPES),
    tie=st.booleans(),
)
def test_packed_gives_the_model_back(tmp_path_factory, hidden, mlp, vocab, sparsity, dtype, tie):
    out = tmp_path_factory.mktemp("round")
    model = sparse_llama(sparsity, dtype=dtype, hidden=hidden, mlp=mlp, vocab=vocab, tie=tie)
    packed.save(model, out)
    loaded = packed.load(out)
    assert differing_weights(model, loaded) == []
    assert same_logits(model, loaded, PROMPTS)
    assert type(loaded) is LlamaForCausalLM
    assert not loaded.training
    kept = sum(int((weight != 0).sum()) for weight in prunable_weights(model).values())
    assert len(load_file(out / packed.FILE)["values"]) == kept
    shutil.rmtree(out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hf_gives_the_model_back(tmp_path, dtype):
    model = sparse_llama(0.7, dtype=dtype)
    FORMATS["hf"].save(model, tmp_path)
    loaded = FORMATS["hf"].load(tmp_path)
    assert differing_weights(model, loaded) == []
    assert same_logits(model, loaded, PROMPTS)


def test_another_model_is_told_apart():
    model, other = sparse_llama(0.5), sparse_llama(0.5)
    assert differing_weights(model, other) == []
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 1
    assert differing_weights(model, other) == ["model.layers.1.mlp.up_proj.weight"]
    assert not same_logits(model, other, PROMPTS)
    assert len(differing_weights(model, sparse_llama(0.5, dtype=torch.bfloat16))) == 21


def test_at_90_percent_in_bf16_prunable_weights_are_six_times_smaller(tmp_path):
    model = load_model("bundled", dtype="bfloat16")
    prune(model, 0.9)
    packed.save(model, tmp_path)
    size = packed.measure(tmp_path)
    assert size.bits_per_prunable_weight == pytest.approx(2.6, rel=1e-3)
    assert size.prunable_ratio >= 6
    assert size.header_bytes <= 0.01 * size.file_bytes
    assert size.dense_bytes == 2 * sum(p.numel() for p in model.parameters())
    assert size.file_bytes == (tmp_path / packed.FILE).stat().st_size


def altered(folder, out, *, metadata=None, **tensors):
    """The same file with other tensors or metadata, and a digest that fits."""
    found, kept = packed._read(folder)
    found, kept = found | (metadata or {}), kept | tensors
    shutil.copytree(folder, out)
    found["sha256"] = packed._digest(found, kept, folder)
    save_file(kept, out / packed.FILE, metadata=found)
    return out


def refusal(folder):
    with pytest.raises(UserError) as caught:
        packed.load(folder)
    assert str(caught.value).startswith(f"packed model: {str(folder)!r}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@settings(deadline=None, max_examples=40)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_refused(folder, tmp_path_factory, where, bit):
    out = tmp_path_factory.mktemp("flipped")
    shutil.copytree(folder, out, dirs_exist_ok=True)
    content = bytearray((out / packed.FILE).read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    (out / packed.FILE).write_bytes(content)
    refusal(out)
    shutil.rmtree(out)


@pytest.mark.parametrize("fraction", [0.0, 0.0001, 0.1, 0.5, 0.9999])
def test_a_file_that_was_cut_off_is_refused(folder, tmp_path, fraction):
    out = tmp_path / "cut"
    shutil.copytree(folder, out)
    content = (out / packed.FILE).read_bytes()
    (out / packed.FILE).write_bytes(content[: int(fraction * len(content))])
    assert "cannot be read" in refusal(out)


def test_what_does_not_fit_together_is_refused(folder, tmp_path):
    assert "holds no packed.safetensors" in refusal(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "config.json").write_text((other / "config.json").read_text().replace("10000", "9999"))
    assert "was changed" in refusal(other)
    plain = tmp_path / "plain"
    sparse_llama(0.5).save_pretrained(plain)
    shutil.move(plain / "model.safetensors", plain / packed.FILE)
    assert "is no packed model" in refusal(plain)
    found, tensors = packed._read(folder)
    newer = altered(folder, tmp_path / "newer", metadata={"version": "2"})
    assert "format version '2'; this loader reads 1" in refusal(newer)
    wide = found["shapes"].replace("24", "23")
    shaped = altered(folder, tmp_path / "shaped", metadata={"shapes": wide})
    assert "are not those of the Llama" in refusal(shaped)
    short = altered(folder, tmp_path / "short", values=tensors["values"][1:].clone())
    assert "not as many values" in refusal(short)
    bits = altered(folder, tmp_path / "bits", mask=tensors["mask"][1:].clone())
    assert "not as many mask bits" in refusal(bits)


def test_the_stage_exports_the_last_student_with_a_card(tmp_path):
    tokenizer = load_tokenizer("bundled")
    inputs = SimpleNamespace(
        tokenizer=tokenizer,
        encode=tokenizer.encode,
        task=SimpleNamespace(test=[SimpleNamespace(prompt="1+2=")]),
    )
    folder = RunFolder.open(tmp_path)
    config = load_config(None, {"run.stages": ["export"], "export.dtype": "bfloat16"})
    out = folder.stage("export")
    with pytest.raises(UserError, match="set --stages prune,export"):
        export.run(config, folder, inputs, out)
    model = sparse_llama(0.9, vocab=len(tokenizer))
    save_model(model, tokenizer, folder.stage("prune"))
    folder.write_record("prune", {"done": True, "outputs": {}})
    export.run(config, folder, inputs, out)
    student = model.to(torch.bfloat16)
    for name in ("hf", "packed"):
        assert differing_weights(student, FORMATS[name].load(out / name)) == []
        card = (out / name / "README.md").read_text()
        assert "was not measured" in card
        assert "2505.14052" in card
        assert ("library_name: transformers" in card) == (name == "hf")
        assert load_tokenizer(str(out / name)).get_vocab() == tokenizer.get_vocab()
    assert {path.name for path in out.iterdir()} == {"hf", "packed", "export.json"}


def test_an_export_that_loads_as_another_model_is_never_put_in_place(tmp_path, monkeypatch):
    tokenizer = load_tokenizer("bundled")
    folder = RunFolder.open(tmp_path)
    save_model(sparse_llama(0.5, vocab=len(tokenizer)), tokenizer, folder.stage("prune"))
    folder.write_record("prune", {"done": True, "outputs": {}})
    unpack = packed.unpack_mask
    monkeypatch.setattr(packed, "unpack_mask", lambda bits, shape: unpack(bits, shape).flip(0))
    config = load_config(None, {"run.stages": ["export"], "export.formats": ["packed"]})
    inputs = SimpleNamespace(tokenizer=tokenizer)
    with pytest.raises(RuntimeError, match=r"export packed: .* are not the student's"):
        export.run(config, folder, inputs, folder.stage("export"))
    assert not (folder.stage("export") / "packed").exists()
