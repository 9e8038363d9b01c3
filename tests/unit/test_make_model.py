"""`launch/make_model.py`: a text Llama and the bundled one, each in a few steps."""

import json
import math
import random
from itertools import chain, islice
from pathlib import Path

import pytest
import torch

from launch import make_model
from launch.models import arithmetic, text
from launch.models.length_batches import length_batches
from pipeline.data.tasks import split_of
from pipeline.models.loading import check_same_tokenizer, load_model, load_tokenizer
from pipeline.models.paths import BUNDLED_MODEL
from pipeline.models.prompts import encode_answer, encode_prompt

HELD_OUT_WORD = "zyzzyva"
TINY = ["--hidden_size", "16", "--intermediate_size", "24", "--num_layers", "1"]
TINY += ["--num_heads", "2", "--num_threads", "1"]
NUM_STEPS = 150


def invented_rows() -> list[dict[str, str]]:
    """Sums in words. `HELD_OUT_WORD` stands in the answer of one held-out row."""
    chance = random.Random(0)
    rows = {}
    for _ in range(300):
        a, b = chance.randrange(100), chance.randrange(100)
        prompt = f"Tom has {a} pears and Eve has {b} plums. How many is that?"
        rows[prompt] = f"They have {a}+{b} = <<{a}+{b}={a + b}>>{a + b} together.\n#### {a + b}"
    held_out = next(prompt for prompt in rows if split_of(prompt) == "test")
    rows[held_out] = HELD_OUT_WORD
    return [{"question": prompt, "reply": answer} for prompt, answer in rows.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A text Llama after a few steps, with the rows it was made from."""
    root = tmp_path_factory.mktemp("text_llama")
    task = root / "task.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in invented_rows()))
    options = ["--task", str(task), "--prompt_column", "question", "--answer_column", "reply"]
    sizes = [
        *TINY,
        "--vocab_size",
        "400",
        "--steps",
        str(NUM_STEPS),
        "--batch_size",
        "8",
        "--adamw_lr",
        "0.02",
    ]
    assert make_model.main([*options, *sizes, "--output_dir", str(root / "model")]) == 0
    return root / "model"


def split_rows(is_test: bool) -> list[dict[str, str]]:
    return [row for row in invented_rows() if (split_of(row["question"]) == "test") == is_test]


def test_pipeline_loads_the_folder(folder):
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    check_same_tokenizer(tokenizer, tokenizer)
    assert model.config.vocab_size == len(tokenizer) < 400
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token) == (
        "<pad>",
        "<end>",
        None,
    )
    assert tokenizer.padding_side == "left"
    assert model.config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert model.lm_head.weight is model.model.embed_tokens.weight
    batch = tokenizer(["a", "a longer one"], padding=True, return_tensors="pt")
    completions = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert len(tokenizer.batch_decode(completions, skip_special_tokens=True)) == 2


def test_every_text_survives_the_tokenizer(folder):
    tokenizer = load_tokenizer(str(folder))
    texts = [row["reply"] for row in invented_rows()] + [
        "  ö\t漢 \n\n<unk> @-@ , 1,234.5 ?",
        ". it 's",
    ]
    for content in texts:
        ids = encode_answer(tokenizer, content)
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == content
        assert tokenizer.decode(ids, skip_special_tokens=True) == content
    assert len(tokenizer("12345")["input_ids"]) == 5


def test_tokenizer_has_not_seen_held_out_rows(folder):
    tokenizer = load_tokenizer(str(folder))
    assert len(tokenizer(" together")["input_ids"]) == 1
    assert len(tokenizer(HELD_OUT_WORD)["input_ids"]) > 4
    train, validation = text.load_rows(
        str(folder.parent / "task.jsonl"), prompt_column="question", answer_column="reply"
    )
    assert len(train) == len(split_rows(False))
    assert len(validation) == len(split_rows(True))
    assert [HELD_OUT_WORD in row.answer for row in validation].count(True) == 1
    assert len(text.learn_tokenizer(train, 280)) == 280
    assert len(text.learn_tokenizer(validation, 400)(HELD_OUT_WORD)["input_ids"]) == 1


@torch.no_grad()
def test_reported_perplexities_are_those_of_the_saved_model(folder):
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    facts = json.loads((folder / "training.json").read_text())
    nats = []
    for row in split_rows(True):
        prompt = encode_prompt(tokenizer, row["question"])
        answer = encode_answer(tokenizer, row["reply"])
        log_p = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        nats += [-log_p[len(prompt) + i - 1, token].item() for i, token in enumerate(answer)]
    assert facts["validation_perplexity"] == pytest.approx(
        math.exp(sum(nats) / len(nats)), rel=1e-4
    )
    assert facts["num_validation_tokens"] == len(nats)
    assert facts["validation_perplexity"] < facts["unigram_perplexity"]

    counts = [1] * len(tokenizer)
    for row in split_rows(False):
        for token in encode_answer(tokenizer, row["reply"]):
            counts[token] += 1
    nats = [
        math.log(sum(counts) / counts[token])
        for row in split_rows(True)
        for token in encode_answer(tokenizer, row["reply"])
    ]
    assert facts["unigram_perplexity"] == pytest.approx(math.exp(sum(nats) / len(nats)))
    assert (facts["steps"], facts["num_train_rows"]) == (NUM_STEPS, len(split_rows(False)))


def test_batches_hold_every_row_once_an_epoch():
    sequences = [[row + 1] * (1 + row * 7 % 50) for row in range(103)]
    batches = length_batches(sequences, batch_size=8, seed=0)
    epochs = [list(islice(batches, 13)) for _ in range(2)]
    for epoch in epochs:
        seen = [ids[ids > 0].tolist() for ids, _ in epoch]
        assert sorted(chain(*seen)) == sorted(chain(*sequences))
        for ids, labels in epoch:
            assert torch.equal(labels, ids.masked_fill(ids == 0, -100))
            assert all(row == sorted(row, reverse=True) for row in (ids > 0).int().tolist())
    assert [ids.tolist() for ids, _ in epochs[0]] != [ids.tolist() for ids, _ in epochs[1]]
    size = sum(ids.numel() for ids, _ in epochs[0])
    assert size < 1.1 * sum(map(len, sequences)), "rows of unlike lengths share a batch"


def test_broken_task_file_is_explained(tmp_path, capsys):
    missing = tmp_path / "none.jsonl"
    assert make_model.main(["--task", str(missing), "--output_dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: task.path={str(missing)!r}: there is no")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("heads", "hidden_size"), [(3, 20), (5, 20), (2, 6), (0, 16)])
def test_sizes_that_make_no_llama_are_refused(tmp_path, capsys, heads, hidden_size):
    sizes = ["--num_heads", str(heads), "--hidden_size", str(hidden_size)]
    with pytest.raises(SystemExit) as stopped:
        make_model.main([*sizes, "--output_dir", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert f"--num_heads {heads}: set" in capsys.readouterr().err


def test_bundled_task_still_trains(tmp_path):
    out = tmp_path / "model"
    options = [*TINY, "--steps", "2", "--batch_size", "4", "--output_dir", str(out)]
    assert make_model.main(options) == 0
    check_same_tokenizer(load_tokenizer(str(out)), load_tokenizer("bundled"))
    assert load_model(str(out)).config.hidden_size == 16
    made, shipped = (json.loads((f / "training.json").read_text()) for f in (out, BUNDLED_MODEL))
    assert made.keys() == shipped.keys()
    assert {key: shipped[key] for key in arithmetic.DEFAULTS} == arithmetic.DEFAULTS
