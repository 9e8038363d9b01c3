"""Loading, prunable weights, prompts and the teacher's log-probabilities."""

import json
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from pipeline.errors import UserError
from pipeline.models.loading import (
    check_same_tokenizer,
    load_model,
    load_tokenizer,
)
from pipeline.models.paths import BUNDLED_MODEL
from pipeline.models.prompts import encode_prompt, format_prompt
from pipeline.models.prunable import apply_masks, measured_sparsity, prunable_weights
from pipeline.models.teacher import completion_log_probs


def tiny_llama(**changes):
    torch.manual_seed(0)
    values = {
        "vocab_size": 20,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.5,
    }
    return LlamaForCausalLM(LlamaConfig(**(values | changes))).eval()


def test_prunable_weights_are_the_linear_layers_of_the_decoder():
    model = tiny_llama()
    weights = prunable_weights(model)
    assert len(weights) == 2 * 7
    assert "model.layers.1.mlp.down_proj.weight" in weights
    assert not any("embed" in name or "norm" in name or "lm_head" in name for name in weights)
    state = model.state_dict()
    assert all(state[name].shape == weight.shape for name, weight in weights.items())
    # q 16x16, k and v 8x16, o 16x16, gate and up 24x16, down 16x24
    assert sum(w.numel() for w in weights.values()) == 2 * (2 * 256 + 2 * 128 + 3 * 384)


def test_sparsity_is_counted_in_the_weights():
    model = tiny_llama()
    masks = {n: torch.ones_like(w, dtype=torch.bool) for n, w in prunable_weights(model).items()}
    masks["model.layers.0.self_attn.q_proj.weight"][:4] = False
    apply_masks(model, masks)
    total, each = measured_sparsity(model)
    assert each["model.layers.0.self_attn.q_proj.weight"] == 0.25
    assert total == 64 / (2 * (2 * 256 + 2 * 128 + 3 * 384))


def test_teacher_log_probs_equal_one_sequence_at_a_time():
    model = tiny_llama()
    rows = [([3, 4, 5], [6, 7]), ([8], [9, 10])]
    input_ids = torch.tensor([[3, 4, 5, 6, 7], [0, 0, 8, 9, 10]])
    attention_mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    expected = []
    for prompt, completion in rows:
        logits = model(torch.tensor([prompt + completion])).logits[0] / 0.7
        log_probs = logits.log_softmax(-1)
        start = len(prompt) - 1
        expected.append([log_probs[start + i, t].item() for i, t in enumerate(completion)])
    for micro_batch_size in (1, 2):
        found = completion_log_probs(
            model, input_ids, attention_mask, 2, micro_batch_size=micro_batch_size, temperature=0.7
        )
        assert torch.allclose(found, torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize(
    ("path", "remedy"),
    [("./nowhere", "is not a folder"), ("nowhere", "Hub id"), ("someone/unknown-llama", "network")],
)
def test_a_missing_model_is_named_with_the_remedy(path, remedy):
    with pytest.raises(UserError, match=remedy) as error:
        load_model(path, key="teacher.path")
    assert str(error.value).startswith(f"teacher.path: {path!r}")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        load_model(str(tmp_path))


def test_another_architecture_is_refused_with_the_list(tmp_path):
    OPTForCausalLM(
        OPTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=1, ffn_dim=8, vocab_size=8
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'opt' model; supported: llama"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("student.path", r"or student\.trust_remote_code: true if you trust it"),
        ("teacher.path", "set one without"),
    ],
)
def test_code_that_comes_with_a_model_is_not_run_unless_one_says_so(key, remedy, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED_MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}
    (folder / "config.json").write_text(json.dumps(config | own))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match=rf"^{key}: .* Python code that .*{remedy}$"):
        load_model(str(folder), key=key)
    assert not (tmp_path / "ran").exists()


def test_bundled_tokenizer_pads_left_with_a_token_that_ends_nothing():
    tokenizer = load_tokenizer("bundled")
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    ids = tokenizer("02@03#01@00=")["input_ids"]
    assert len(ids) == 8
    assert (
        tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == "02@03#01@00="
    )


def test_different_tokenizers_are_refused_with_the_first_difference(tmp_path):
    for file in BUNDLED_MODEL.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    shutil.copy(BUNDLED_MODEL / "config.json", tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["04"], vocab["05"] = vocab["05"], vocab["04"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    student, teacher = load_tokenizer("bundled"), load_tokenizer(str(tmp_path))
    check_same_tokenizer(student, student)
    with pytest.raises(UserError, match="token 7 is '04' and '05'"):
        check_same_tokenizer(student, teacher)


def test_prompts_use_the_chat_template_where_there_is_one():
    tokenizer = load_tokenizer("bundled")
    assert format_prompt(tokenizer, "1+1=") == "1+1="
    assert format_prompt(tokenizer, "1+1=", "Think.") == "1+1=\n\nThink."
    assert encode_prompt(tokenizer, "12+35=") == tokenizer("12+35=")["input_ids"]
    tokenizer.chat_template = "{{ messages[0].content }}{% if add_generation_prompt %}={% endif %}"
    prompt = format_prompt(tokenizer, "12+35")
    assert prompt == [{"role": "user", "content": "12+35"}]
    assert encode_prompt(tokenizer, prompt) == tokenizer("12+35=")["input_ids"]
