"""Generation against a plain argmax loop, random state, and the rollout file."""

import json
from dataclasses import dataclass

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.errors import UserError
from pipeline.rollouts import (
    ATTEMPTS,
    Rollout,
    generate,
    load_rollouts,
    sample_rollouts,
    sample_verified_rollouts,
    save_rollouts,
)

CHARACTERS = "0123456789+="
PAD, END = 0, 1


@dataclass(frozen=True)
class Row:
    prompt: str
    answer: str


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<end>", *CHARACTERS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
        initializer_range=0.3,  # far from uniform: no ties, and completions of all lengths
    )
    model = LlamaForCausalLM(config).double().eval()
    model.generation_config.update(do_sample=True, temperature=0.6, top_k=3, top_p=0.5)
    return model


@pytest.fixture(scope="module")
def prompts(tokenizer):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 12, (40,), generator=generator).tolist()
    return [torch.randint(2, 14, (n,), generator=generator).tolist() for n in lengths]


def argmax_loop(model, prompt, max_new_tokens):
    ids = list(prompt)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == END:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_greedy_equals_a_plain_argmax_loop(model, tokenizer, prompts, batch_size):
    expected = [argmax_loop(model, prompt, 9) for prompt in prompts]
    lengths = {len(completion) for completion in expected if completion[-1] == END}
    assert len(lengths) > 2, "the test needs ends at several lengths"
    assert any(END not in completion for completion in expected)
    got = generate(model, tokenizer, prompts, max_new_tokens=9, batch_size=batch_size)
    assert got == expected


def test_sampling_follows_the_softmax(model, tokenizer):
    # Counts of the first token against the model's own distribution at temperature 2.
    prompt, number, temperature = [2, 3, 4], 4000, 2.0
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(0)
    completions = generate(
        model, tokenizer, [prompt] * number, max_new_tokens=1, batch_size=number, temperature=2.0
    )
    counts = torch.bincount(torch.tensor(completions)[:, 0], minlength=len(tokenizer))
    deviation = (counts / number - expected).abs()
    assert (deviation < 5 * (expected * (1 - expected) / number).sqrt() + 1e-9).all()


def test_seed_decides_and_global_random_state_is_untouched(model, tokenizer, prompts):
    def sample(seed):
        return generate(
            model, tokenizer, prompts, max_new_tokens=6, batch_size=16, temperature=1.0, seed=seed
        )

    before = torch.get_rng_state()
    first = sample(3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert sample(3) == first
    assert sample(4) != first


def test_nothing_after_the_end_and_at_most_max_new_tokens(model, tokenizer, prompts):
    completions = generate(
        model, tokenizer, prompts * 5, max_new_tokens=6, batch_size=32, temperature=1.0
    )
    assert any(completion[-1] == END for completion in completions)
    for completion in completions:
        assert END not in completion[:-1]
        assert len(completion) == 6 or completion[-1] == END


def test_training_mode_comes_back(model, tokenizer, prompts):
    model.train()
    generate(model, tokenizer, prompts[:2], max_new_tokens=2, batch_size=2)
    assert model.training
    model.eval()
    generate(model, tokenizer, prompts[:2], max_new_tokens=2, batch_size=2)
    assert not model.training


def test_no_prompts(model, tokenizer):
    assert generate(model, tokenizer, [], max_new_tokens=2, batch_size=2) == []


def sample(model, tokenizer, **changes):
    rows = [Row("1+2=", "3"), Row("10+20=", "30"), Row("7=", "7")]
    settings = {"max_new_tokens": 5, "batch_size": 4, "temperature": 1.0, "seed": 0}
    return sample_rollouts(
        model,
        tokenizer,
        rows,
        lambda prompt: tokenizer(prompt)["input_ids"],
        lambda completion, answer: float(len(completion)),
        **{"num_rollouts": 8, **settings, **changes},
    )


def test_rollouts_cycle_through_the_rows_and_are_verified(model, tokenizer):
    rollouts = sample(model, tokenizer, num_rollouts=32, temperature=2.0)
    assert [rollout.answer for rollout in rollouts] == (["3", "30", "7"] * 11)[:32]
    assert any(rollout.completion_ids[-1] == END for rollout in rollouts)
    assert len({tuple(rollout.completion_ids) for rollout in rollouts[::3]}) > 1
    for rollout in rollouts:
        assert rollout.prompt_ids == [2 + CHARACTERS.index(c) for c in rollout.prompt]
        assert rollout.reward == sum(token > END for token in rollout.completion_ids)


def test_fewer_rollouts_than_rows(model, tokenizer):
    rollouts = sample(model, tokenizer, num_rollouts=2)
    assert [rollout.answer for rollout in rollouts] == ["3", "30"]


ODD = Rollout("a\u2028b\n\ud800", "ü", [1, 2], [3, END], 0.5)


def test_file_gives_back_what_was_saved(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    save_rollouts(path, [ODD], {"old": True})
    save_rollouts(path, [ODD, ODD], {"model": "m", "seed": 3})
    assert load_rollouts(path) == ({"model": "m", "seed": 3}, [ODD, ODD])
    assert list(tmp_path.iterdir()) == [path]
    assert len(path.read_text().splitlines()) == 3


def test_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    save_rollouts(path, [ODD], {"seed": 3})
    with pytest.raises(TypeError):
        save_rollouts(path, [ODD], {"seed": object()})
    assert load_rollouts(path) == ({"seed": 3}, [ODD])


def test_damaged_file_is_named(tmp_path):
    path = tmp_path / "rollouts.jsonl"
    save_rollouts(path, [ODD, ODD], {})
    lines = path.read_text().splitlines(keepends=True)
    without_reward = json.dumps({"prompt": "p", "answer": "a"}) + "\n"
    damages = [lines[:2], lines[1:], [*lines[:2], lines[2][:20]], [*lines[:2], without_reward], []]
    for damage in damages:
        path.write_text("".join(damage))
        with pytest.raises(UserError, match=r"rollouts\.jsonl is damaged.*Delete it"):
            load_rollouts(path)


def test_verified_rollouts_are_right_and_tried_several_times(model, tokenizer):
    rows = [Row(f"{n}+", str(n % 7)) for n in range(60)]

    def verifier(text, answer):
        return float(answer in text)

    arguments = {"max_new_tokens": 6, "batch_size": 16, "seed": 5, "temperature": 1.0}

    def encode(text):
        return tokenizer(text)["input_ids"]

    once = sample_rollouts(model, tokenizer, rows, encode, verifier, num_rollouts=60, **arguments)
    first = {r.prompt: r.completion_ids for r in once if r.reward >= 1}
    found = sample_verified_rollouts(model, tokenizer, rows, encode, verifier, **arguments)
    prompts = [rollout.prompt for rollout in found]
    assert all(rollout.reward >= 1 for rollout in found)
    assert prompts == sorted(prompts, key=[row.prompt for row in rows].index)
    assert {p: r.completion_ids for p, r in zip(prompts, found, strict=True) if p in first} == first
    assert len(first) < len(found) < len(rows), "the row set must leave something to every attempt"
    right_once = len(first) / len(rows)
    expected = 1 - (1 - right_once) ** ATTEMPTS
    assert len(found) / len(rows) == pytest.approx(expected, abs=0.25)
    greedy = {**arguments, "temperature": 0.0}
    again = sample_verified_rollouts(model, tokenizer, rows, encode, verifier, **greedy)
    plain = sample_rollouts(model, tokenizer, rows, encode, verifier, num_rollouts=60, **greedy)
    assert again == [rollout for rollout in plain if rollout.reward >= 1]
