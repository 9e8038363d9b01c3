"""Text: reading, windows with stride, pieces to calibrate on, the unigram reference."""

import json
import math

import pytest
import torch

from pipeline.data.text import check_text_source, load_text, read_text, text_chunks
from pipeline.errors import UserError
from pipeline.evaluation.completions import TokenPair
from pipeline.evaluation.perplexity import completion_perplexity
from pipeline.evaluation.text_perplexity import text_windows
from pipeline.evaluation.unigram import unigram_perplexity
from tests.unit.pruning_models import make_model
from tests.unit.test_evaluation import P, bigram_model

SHAPES = [(2, 1), (5, 1), (5, 2), (5, 4), (8, 4), (7, 3)]


def random_tokens(num_tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(23, (num_tokens,), generator=generator).tolist()


def scored_positions(windows: list[TokenPair]) -> list[int]:
    return [token for _, scored in windows for token in scored]


@pytest.mark.parametrize("num_tokens", [8, 9, 40, 41, 42, 43])
@pytest.mark.parametrize(("seq_len", "stride"), SHAPES)
def test_windows_score_every_token_but_the_first_once(num_tokens, seq_len, stride):
    windows = text_windows(list(range(num_tokens)), seq_len=seq_len, stride=stride)
    assert scored_positions(windows) == list(range(1, num_tokens))
    for index, (context, scored) in enumerate(windows):
        assert [*context, *scored] == list(range(context[0], scored[-1] + 1))
        assert context[0] == index * stride
        assert len(context) == (seq_len - stride if index else 1)
        assert len(context) + len(scored) <= seq_len
    assert all(len(context) + len(scored) == seq_len for context, scored in windows[:-1])


@pytest.mark.parametrize("num_tokens", [8, 15, 16, 17])
def test_windows_side_by_side_score_all_but_their_first_token(num_tokens):
    windows = text_windows(list(range(num_tokens)), seq_len=8, stride=8)
    assert windows == [
        ([start], list(range(start + 1, start + 8))) for start in range(0, num_tokens - 7, 8)
    ]


def test_text_perplexity_on_three_tokens_matches_paper():
    # 0 1 2 | 0 1 1 | 2 is left out: 0.6 * 0.5, then 0.6 * 0.25.
    windows = text_windows([0, 1, 2, 0, 1, 1, 2], seq_len=3, stride=3)
    result = completion_perplexity(bigram_model(P), windows, batch_size=2)
    assert result.value == pytest.approx((0.6 * 0.5 * 0.6 * 0.25) ** (-1 / 4), rel=1e-5)
    # With overlap every token but the first counts: 0.6, 0.5, 0.7, 0.6, 0.25, 0.5.
    windows = text_windows([0, 1, 2, 0, 1, 1, 2], seq_len=3, stride=2)
    result = completion_perplexity(bigram_model(P), windows, batch_size=2)
    wanted = (0.6 * 0.5 * 0.7 * 0.6 * 0.25 * 0.5) ** (-1 / 6)
    assert result.value == pytest.approx(wanted, rel=1e-5)


@torch.no_grad()
def published_loop(model, tokens: list[int], seq_len: int) -> float:
    """As GPTQ, SparseGPT and Wanda: the loss of whole windows, of which transformers means."""
    count = len(tokens) // seq_len
    pieces = torch.tensor(tokens[: count * seq_len]).view(count, seq_len)
    nats = [model(piece[None], labels=piece[None]).loss.item() for piece in pieces]
    return math.exp(sum(nats) / count)


def test_perplexity_side_by_side_is_the_published_one():
    model, tokens = make_model(), random_tokens(45)
    windows = text_windows(tokens, seq_len=8, stride=8)
    result = completion_perplexity(model, windows, batch_size=3)
    assert result.value == pytest.approx(published_loop(model, tokens, 8), rel=1e-6)
    assert result.num_tokens == 5 * 7


@torch.no_grad()
def strided_loop(model, tokens: list[int], seq_len: int, stride: int) -> float:
    """Token by token: the model sees from the start of the first window that holds the token."""
    nats = []
    for position in range(1, len(tokens)):
        index = 0
        while index * stride + seq_len <= position:
            index += 1
        seen = torch.tensor([tokens[index * stride : position]])
        log_p = model(input_ids=seen).logits[0, -1].log_softmax(-1)
        nats.append(-log_p[tokens[position]].item())
    return math.exp(sum(nats) / len(nats))


@pytest.mark.parametrize(
    ("num_tokens", "seq_len", "stride"), [(30, 8, 3), (31, 8, 4), (24, 12, 11)]
)
def test_perplexity_equals_a_naive_loop(num_tokens, seq_len, stride):
    model, tokens = make_model(), random_tokens(num_tokens)
    windows = text_windows(tokens, seq_len=seq_len, stride=stride)
    result = completion_perplexity(model, windows, batch_size=4)
    assert result.value == pytest.approx(strided_loop(model, tokens, seq_len, stride), rel=1e-6)
    assert (result.num_tokens, result.seq_len) == (num_tokens - 1, seq_len)


def test_uniform_model_has_the_vocabulary_as_perplexity():
    model = make_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    windows = text_windows(random_tokens(50), seq_len=16, stride=8)
    assert completion_perplexity(model, windows, batch_size=3).value == pytest.approx(23)


def test_text_shorter_than_one_window_is_refused():
    assert len(text_windows(list(range(16)), seq_len=16, stride=8)) == 1
    with pytest.raises(UserError, match=r"^evaluate\.text_path: .* 15 tokens .* window of 16"):
        text_windows(list(range(15)), seq_len=16, stride=8)


def test_unigram_by_hand():
    # counts 2, 1, 0, 0; plus one: 3, 2, 1, 1 of 7. Scored: tokens 0, 1 and 3.
    expected = (3 / 7 * 2 / 7 * 1 / 7) ** (-1 / 3)
    assert unigram_perplexity([[0, 1], [0]], [[3], [0, 1]], 4) == pytest.approx(expected)


def test_unigram_without_training_text_guesses_blindly():
    assert unigram_perplexity([], [[0, 4, 4]], 9) == pytest.approx(9)
    with pytest.raises(ValueError, match="token to score"):
        unigram_perplexity([[1]], [[]], 9)


@pytest.mark.parametrize(("num_tokens", "num_chunks"), [(30, 6), (31, 6), (200, 6), (30, 1)])
def test_chunks_do_not_overlap(num_tokens, num_chunks):
    chunks = text_chunks(list(range(num_tokens)), seq_len=5, num_chunks=num_chunks, seed=7)
    assert len(chunks) == num_chunks
    assert all(chunk == list(range(chunk[0], chunk[0] + 5)) for chunk in chunks)
    tokens = [token for chunk in chunks for token in chunk]
    assert len(set(tokens)) == len(tokens)
    assert set(tokens) <= set(range(num_tokens))


def test_chunks_come_from_the_whole_text_and_depend_on_the_seed():
    drawn = [text_chunks(range(30), seq_len=5, num_chunks=2, seed=seed) for seed in range(200)]
    assert drawn[3] == text_chunks(range(30), seq_len=5, num_chunks=2, seed=3)
    starts = {chunk[0] for chunks in drawn for chunk in chunks}
    assert starts == set(range(26))


def test_text_shorter_than_its_chunks_is_refused():
    with pytest.raises(UserError, match=r"^calibration\.text_path: .* 29 tokens, fewer than 6"):
        text_chunks(range(29), seq_len=5, num_chunks=6, seed=0)


@pytest.mark.parametrize("content", ["one\n", "\n eins\r\n zwei\u2028drei ö <unk>\n\n"])
def test_a_text_file_is_read_as_it_stands(tmp_path, content):
    path = tmp_path / "some.txt"
    path.write_bytes(content.encode())
    assert read_text(str(path), "evaluate.text_path") == content
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert read_text(str(path), "evaluate.text_path") == content


def test_documents_of_json_lines_are_joined(tmp_path):
    path = tmp_path / "some.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in ("a\u2028b", "", "ö\n")]
    path.write_text("\n".join([lines[0], "", *lines[1:]]), encoding="utf-8")
    assert read_text(str(path), "evaluate.text_path") == "a\u2028b\n\n\n\nö\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, r"cannot be read \(No such file"),
        ("latin.txt", "größer".encode("latin-1"), r"not UTF-8 \(byte 2\)"),
        ("empty.txt", b" \n\n", "holds no text"),
        ("empty.jsonl", b'{"text": ""}\n', "holds no text"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
        ("column.jsonl", b'\n{"content": "a"}\n', "line 2 has no column text"),
        ("number.jsonl", b'{"text": 5}\n', "line 1 has no column text"),
        ("list.jsonl", b"[1]\n", "line 1 has no column text"),
        ("half.jsonl", rb'{"text": "\ud800"}', "line 1 has no column text"),
    ],
)
def test_unusable_file_is_explained(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_text(str(path), "evaluate.text_path")
    assert str(caught.value).startswith(f"evaluate.text_path={str(path)!r}: ")


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(UserError, match="Is a directory"):
        read_text(str(tmp_path), "evaluate.text_path")


def dataset_folder(tmp_path, documents, split="test", column="text"):
    """A folder that `datasets` takes for one split."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    lines = [json.dumps({column: document}) for document in documents]
    (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return str(folder)


def test_a_dataset_folder_is_its_rows_joined_by_blank_lines(tmp_path):
    folder = dataset_folder(tmp_path, [" = Title = \n", "", "one\u2028two"])
    assert load_text(folder, "evaluate.text_") == " = Title = \n\n\n\n\none\u2028two"
    path = tmp_path / "some.txt"
    path.write_text("plain")
    assert load_text(str(path), "evaluate.text_") == "plain"


def test_the_split_of_a_dataset_is_the_one_asked_for(tmp_path):
    folder = dataset_folder(tmp_path, ["seen"], split="train")
    assert load_text(folder, "evaluate.text_", split="train") == "seen"
    with pytest.raises(
        UserError, match=r"^evaluate\.text_split='test': .*no such split. Set train"
    ):
        load_text(folder, "evaluate.text_")


@pytest.mark.parametrize(
    ("documents", "column", "message"),
    [
        (["a"], "content", r"^evaluate\.text_path='.*no column text \(it has content\)"),
        ([5], "text", r"^evaluate\.text_path='.*more than text"),
        (["", " "], "text", r"^evaluate\.text_path='.*holds no text"),
    ],
)
def test_an_unusable_dataset_is_explained(tmp_path, documents, column, message):
    with pytest.raises(UserError, match=message):
        load_text(dataset_folder(tmp_path, documents, column=column), "evaluate.text_")


def test_a_hub_dataset_that_cannot_be_had_is_explained():
    with pytest.raises(
        UserError, match=r"^evaluate\.text_path='owner/name': .*HF_HUB_OFFLINE is set"
    ):
        load_text("owner/name", "evaluate.text_")


@pytest.mark.parametrize("path", ["nowhere.txt", "data/nowhere.txt", "./a/b", "name", "a/b/c"])
def test_what_is_neither_text_nor_a_hub_id_is_seen_without_loading(path):
    with pytest.raises(UserError, match=r"^evaluate\.text_path: .* no Hub id; set a text file"):
        check_text_source(path, "evaluate.text_path")


def test_hub_ids_and_what_is_on_disk_pass(tmp_path):
    for path in ("Salesforce/wikitext", str(tmp_path)):
        check_text_source(path, "evaluate.text_path")
