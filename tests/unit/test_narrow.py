"""Narrow: dead heads go, the widest layer decides, and no logit moves."""

import pytest
import torch
from transformers import LlamaForCausalLM

from pipeline.models.narrow import narrow_llama, needed_sizes
from pipeline.models.prunable import decoder_layers
from tests.unit.pruning_models import make_model

PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
SIZE = 8
"""Of a head."""


def logits_of(model):
    with torch.no_grad():
        return model(PROMPT).logits


def attention(model, index):
    return decoder_layers(model)[index].self_attn


def drop_head(attention, head):
    attention.o_proj.weight[:, head * SIZE : (head + 1) * SIZE] = 0


@torch.no_grad()
def model_with_dead_heads(**changes):
    """Six heads over three groups; layer 0 keeps groups 0 and 2, layer 1 groups 1 and 2."""
    model = make_model(hidden_size=48, num_attention_heads=6, num_key_value_heads=3, **changes)
    drop_head(attention(model, 0), 2)
    drop_head(attention(model, 0), 3)
    attention(model, 1).v_proj.weight[:SIZE] = 0
    return model


def heads(model):
    config = model.config
    return config.num_attention_heads, config.num_key_value_heads


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
def test_dead_groups_go_and_the_logits_stay(changes, tmp_path):
    model = model_with_dead_heads(**changes)
    narrow = narrow_llama(model)
    assert heads(narrow) == (4, 2)
    assert heads(model) == (6, 3)
    assert attention(narrow, 0).num_key_value_groups == 2
    torch.testing.assert_close(logits_of(narrow), logits_of(model), rtol=0, atol=1e-10)
    narrow.save_pretrained(tmp_path)
    loaded, report = LlamaForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, output_loading_info=True
    )
    assert not any(report.values()), report
    assert torch.equal(logits_of(loaded), logits_of(narrow))
    assert loaded.config.head_dim == SIZE
    answers = [
        m.generate(PROMPT, max_new_tokens=5, do_sample=False, pad_token_id=0)
        for m in (model, loaded)
    ]
    assert torch.equal(*answers)


@torch.no_grad()
def test_single_heads_go_where_every_group_can_spare_as_many():
    model = make_model(num_attention_heads=4, num_key_value_heads=2)
    for index, dead in ((0, (0, 2)), (1, (1, 3))):
        for head in dead:
            drop_head(attention(model, index), head)
    narrow = narrow_llama(model)
    assert heads(narrow) == (2, 2)
    torch.testing.assert_close(logits_of(narrow), logits_of(model), rtol=0, atol=1e-10)
    attention(model, 1).o_proj.weight[0, 8] = 1  # one column of a head brings it back
    kept = narrow_llama(model)
    assert heads(kept) == (4, 2)
    torch.testing.assert_close(logits_of(kept), logits_of(model), rtol=0, atol=1e-10)


@torch.no_grad()
def test_columns_and_rows_kill_a_head_together_and_a_bias_keeps_it():
    model = make_model(num_attention_heads=4, num_key_value_heads=4, attention_bias=True)
    for index in range(2):
        layer = attention(model, index)
        layer.v_proj.bias.zero_()
        layer.v_proj.weight[: SIZE // 2] = 0
        layer.o_proj.weight[:, SIZE // 2 : SIZE] = 0
    narrow = narrow_llama(model)
    assert heads(narrow) == (3, 3)
    torch.testing.assert_close(logits_of(narrow), logits_of(model), rtol=0, atol=1e-10)
    attention(model, 0).v_proj.bias[1] = 1  # a constant value passes the attention weights
    kept = narrow_llama(model)
    assert heads(kept) == (4, 4)
    torch.testing.assert_close(logits_of(kept), logits_of(model), rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_widest_layer_is_named():
    model = model_with_dead_heads()
    attention(model, 0).o_proj.weight.zero_()
    decoder_layers(model)[1].mlp.down_proj.weight[:, 5:] = 0
    sizes = needed_sizes(model, width_multiple=1)
    assert (sizes.widest_attention, sizes.widest_mlp) == (1, 0)
    assert (sizes.intermediate_size, sizes.num_key_value_heads) == (48, 2)
    assert not sizes.are_those_of(model)
    narrow = narrow_llama(model)
    assert needed_sizes(narrow).are_those_of(narrow)
    torch.testing.assert_close(logits_of(narrow), logits_of(model), rtol=0, atol=1e-10)


@torch.no_grad()
def test_an_attention_that_adds_nothing_leaves_one_head():
    model = make_model()
    for index in range(2):
        attention(model, index).o_proj.weight.zero_()
    narrow = narrow_llama(model)
    assert heads(narrow) == (1, 1)
    torch.testing.assert_close(logits_of(narrow), logits_of(model), rtol=0, atol=1e-10)
