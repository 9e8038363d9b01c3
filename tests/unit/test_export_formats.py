"""CSR, 2:4 and narrow: the same answers from fewer bytes, and masks that do not fit are refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.artifacts import RunFolder
from pipeline.config_loading import load_config
from pipeline.errors import UserError
from pipeline.export import csr, semi_structured
from pipeline.export.csr import CsrLinear
from pipeline.export.formats import (
    FORMATS,
    differing_weights,
    logits_difference,
    prepared,
    same_logits,
)
from pipeline.models.loading import load_tokenizer
from pipeline.models.prunable import apply_masks, decoder_layers, prunable_weights
from pipeline.sparsity.threshold import masks_by_score
from pipeline.stages import export
from pipeline.stages.inputs import save_model
from tests.unit.pruning_models import make_model

PROMPTS = [[1, 2, 3], [4], [3, 1, 4, 1, 5]]


def pruned(sparsity, scope="matrix", **changes):
    model = make_model(torch.float32, **changes)
    scores = {name: weight.detach().abs() for name, weight in prunable_weights(model).items()}
    apply_masks(model, masks_by_score(scores, sparsity, scope))
    return model


@settings(deadline=None, max_examples=40)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    batch=st.sampled_from([(1,), (1, 1), (3,), (2, 1), (2, 3), (0, 4)]),
    density=st.sampled_from([0.0, 0.2, 1.0]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_csr_layer_is_the_dense_one(size, batch, density, bias, dtype):
    dense = nn.Linear(*size, bias=bias)
    dense.weight.data *= torch.rand_like(dense.weight) < density
    dense.to(dtype)
    inputs = torch.randn(*batch, size[0]).to(dtype)
    layer = CsrLinear(dense)
    with torch.no_grad():
        outputs, expected = layer(inputs), dense.float()(inputs.float())
    assert outputs.dtype == dtype
    assert outputs.shape == expected.shape
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(outputs.float(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(layer.dense_weight(), dense.weight.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_csr_answers_as_the_model_it_was_saved_from(tmp_path, dtype):
    model = pruned(0.9, attention_bias=True).to(dtype)
    FORMATS["csr"].save(model, tmp_path)
    loaded = csr.load(tmp_path)
    layers = [module for module in loaded.modules() if isinstance(module, CsrLinear)]
    assert len(layers) == 14
    assert differing_weights(model, loaded) == []
    difference, largest = logits_difference(model, loaded, PROMPTS)
    assert difference <= (1e-6 if dtype == torch.float32 else 0.05) * largest
    prompts = torch.tensor([[1, 2, 3], [5, 4, 3]])
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    answers = [m.generate(prompts, **arguments) for m in (model.float(), loaded.float())]
    assert torch.equal(*answers)


@torch.no_grad()
def test_matrices_below_the_break_even_stay_dense():
    model = pruned(0.9)
    down = decoder_layers(model)[1].mlp.down_proj
    down.weight.normal_()
    sparse = csr.to_csr(model)
    assert decoder_layers(sparse)[1].mlp.down_proj is down
    assert isinstance(decoder_layers(sparse)[0].mlp.down_proj, CsrLinear)
    assert type(sparse.lm_head) is nn.Linear


def test_another_value_in_a_csr_layer_is_told_apart():
    model, other = pruned(0.9), csr.to_csr(pruned(0.9))
    assert differing_weights(model, other) == []
    decoder_layers(other)[1].mlp.up_proj.weight.values()[3] += 1
    assert differing_weights(model, other) == ["model.layers.1.mlp.up_proj.weight"]


def refusal(name, model):
    with pytest.raises(UserError) as caught:
        prepared(name, model, width_multiple=8)
    message = str(caught.value)
    assert message.startswith(f"export.formats: {name}: ")
    assert "\n" not in message
    return message


@torch.no_grad()
def test_masks_that_do_not_fit_are_refused():
    assert "0.5" in refusal("csr", pruned(0.5))
    assert "decided by layer" in refusal("narrow", pruned(0.5))
    assert prepared("csr", pruned(0.6), width_multiple=8)
    assert "no matrix is sparser than 0.6" in refusal("csr", pruned(0.6).to(torch.bfloat16))
    model = pruned(0.5, "2:4").to(torch.bfloat16)
    assert prepared("semi_structured", model, width_multiple=8) is model
    key = decoder_layers(model)[1].self_attn.k_proj.weight
    key[5, 8:12] = torch.tensor([1, 1, 0, 1])
    key[9, 0:4] = 1
    message = refusal("semi_structured", model)
    assert "model.layers.1.self_attn.k_proj.weight: row 5 keeps 3 of columns 8 to 11" in message
    odd = pruned(0.9, hidden_size=30, num_attention_heads=3, num_key_value_heads=3)
    assert "30 columns" in refusal("semi_structured", odd.to(torch.bfloat16))
    with pytest.raises(UserError, match=r"export\.dtype: float32: torch's 2:4"):
        prepared("semi_structured", pruned(0.5, "2:4"), width_multiple=8)


def test_a_2_4_model_is_written_anywhere_and_loads_on_gpus_alone(tmp_path, monkeypatch):
    model = pruned(0.5, "2:4")
    FORMATS["semi_structured"].save(model, tmp_path)
    loaded = FORMATS["semi_structured"].load(tmp_path)
    assert differing_weights(model, loaded) == []
    assert same_logits(model, loaded, PROMPTS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="there is no NVIDIA GPU; load it where"):
        semi_structured.load(tmp_path)


@pytest.mark.gpu
def test_a_2_4_model_answers_on_the_gpu(tmp_path):
    model = pruned(0.5, "2:4", hidden_size=128, intermediate_size=256).to(torch.bfloat16)
    FORMATS["semi_structured"].save(model, tmp_path)
    loaded = semi_structured.load(tmp_path)
    difference, largest = logits_difference(model, loaded, PROMPTS)
    assert difference <= export.GPU_TOLERANCE * largest


@pytest.fixture
def run_stage(tmp_path):
    """Runs the stage on a model, as a run folder and its config would."""
    tokenizer = load_tokenizer("bundled")

    def run(model, **values):
        inputs = SimpleNamespace(
            tokenizer=tokenizer,
            encode=tokenizer.encode,
            task=SimpleNamespace(test=[SimpleNamespace(prompt="1+2=")]),
        )
        folder = RunFolder.open(tmp_path)
        save_model(model, tokenizer, folder.stage("prune"))
        folder.write_record("prune", {"done": True, "outputs": {}})
        values = {"run.stages": ["export"]} | {f"export.{k}": v for k, v in values.items()}
        config = load_config(None, values | {"prune.width_multiple": 8})
        out = folder.stage("export")
        export.run(config, folder, inputs, out)
        return out

    return run


@torch.no_grad()
def test_the_stage_writes_csr_and_narrow_and_says_how_far_logits_are_apart(run_stage):
    vocabulary = len(load_tokenizer("bundled"))
    model = pruned(0.9, vocab_size=vocabulary)
    for layer in decoder_layers(model):
        layer.mlp.down_proj.weight[:, 16:] = 0
    out = run_stage(model, formats=["packed", "csr", "narrow"], dtype="bfloat16")
    measured = json.loads((out / "export.json").read_text())
    assert measured["packed"]["largest_logit_difference"] == 0
    assert 0 <= measured["csr"]["largest_logit_difference"] < 0.1
    assert measured["narrow"]["file_bytes"] < measured["csr"]["dense_bytes"]
    assert FORMATS["narrow"].load(out / "narrow").config.intermediate_size == 16
    assert "csr.load(path)" in (out / "csr" / "README.md").read_text()


@torch.no_grad()
def test_an_export_that_answers_otherwise_is_never_put_in_place(run_stage, monkeypatch):
    vocabulary = len(load_tokenizer("bundled"))
    model = pruned(0.9, vocab_size=vocabulary)
    forward = CsrLinear.forward
    monkeypatch.setattr(CsrLinear, "forward", lambda self, x: 1.01 * forward(self, x))
    with pytest.raises(RuntimeError, match="export csr: the logits are not the student's"):
        run_stage(model, formats=["csr"])


def test_nothing_is_written_where_one_format_does_not_fit(run_stage, tmp_path):
    model = pruned(0.9, vocab_size=len(load_tokenizer("bundled")))
    with pytest.raises(UserError, match="narrow: nothing can be cut"):
        run_stage(model, formats=["packed", "narrow"])
    assert not (tmp_path / "export" / "packed").exists()
