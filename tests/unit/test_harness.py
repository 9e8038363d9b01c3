"""lm-evaluation-harness on the model in memory: toy tasks in a folder, offline, against a loop."""

import json
import math
import random
import sys

import numpy as np
import pytest
import torch
import yaml

from pipeline.config_loading import load_config
from pipeline.data.arithmetic import generate_rows
from pipeline.errors import UserError
from pipeline.evaluation import harness
from pipeline.evaluation.harness import TaskScore, open_harness_tasks, zero_shot_scores
from pipeline.models.loading import load_model, load_tokenizer
from tests.unit.tiny_models import tiny

DOCUMENTS = [  # of the bundled task, but for the last, which asks for a wrong answer
    {"question": question, "choices": ["59", answer, "0713"], "gold": int(index < 6)}
    for index, (question, answer) in enumerate(generate_rows(7, 0, "test"))
]


def write_task(folder, name, **changes):
    """A multiple-choice task of `DOCUMENTS`, as a user would write it."""
    data = write_documents(folder / "documents.jsonl", DOCUMENTS)
    values = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(values | changes))


def write_documents(path, documents):
    path.write_text("".join(json.dumps(document) + "\n" for document in documents))
    return str(path)


EXAMPLES = [
    {"question": question, "choices": ["59", answer, "0713"], "gold": 1}
    for question, answer in generate_rows(5, 0, "train")
]


@pytest.fixture
def with_examples(tmp_path):
    """The toy task with a split to draw examples from, and another that wants none."""
    files = {"test": write_documents(tmp_path / "test.jsonl", DOCUMENTS)}
    files["train"] = write_documents(tmp_path / "train.jsonl", EXAMPLES)
    changes = {"dataset_kwargs": {"data_files": files}, "training_split": "train"}
    changes["fewshot_delimiter"] = "|"
    write_task(tmp_path, "shown", **changes)
    write_task(tmp_path, "never", num_fewshot=0, **changes)
    return str(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two toy tasks and two groups of both."""
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "toy_norm")
    write_task(folder, "toy_plain", metric_list=[{"metric": "acc"}])
    groups = {
        "toy_scored": {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}]},
        "toy_unscored": {},
    }
    for name, extra in groups.items():
        group = {"group": name, "task": ["toy_norm", "toy_plain"], **extra}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(group))
    return str(folder)


@pytest.fixture(scope="module")
def tasks(folder):
    return open_harness_tasks(["toy_plain", "toy_norm"], folder)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("bundled")


@torch.no_grad()
def log_likelihood(model, tokenizer, question: str, choice: str) -> float:
    """One token at a time."""
    seen, total = tokenizer(question)["input_ids"], 0.0
    for token in tokenizer(choice, add_special_tokens=False)["input_ids"]:
        total += model(torch.tensor([seen])).logits[0, -1].log_softmax(-1)[token].item()
        seen = [*seen, token]
    return total


def accuracy(model, tokenizer, by_length: bool) -> float:
    right = 0
    for document in DOCUMENTS:
        scores = [
            log_likelihood(model, tokenizer, document["question"], choice)
            / (len(choice) if by_length else 1)
            for choice in document["choices"]
        ]
        right += scores.index(max(scores)) == document["gold"]
    return right / len(DOCUMENTS)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_are_those_of_a_plain_loop_and_tasks_serve_many_models(tasks, tokenizer, batch_size):
    found = {}
    for name, model in {
        "bundled": load_model("bundled"),
        "other": tiny(tokenizer, seed=1),
    }.items():
        scores = zero_shot_scores(model, tokenizer, tasks, batch_size=batch_size, seed=0)
        assert list(scores) == ["toy_plain", "toy_norm"]
        for score, metric in zip(scores.values(), ("acc", "acc_norm"), strict=True):
            value = accuracy(model, tokenizer, by_length=metric == "acc_norm")
            error = math.sqrt(value * (1 - value) / (len(DOCUMENTS) - 1))
            wanted = TaskScore(metric, pytest.approx(value), pytest.approx(error), len(DOCUMENTS))
            assert score == wanted
        found[name] = [score.value for score in scores.values()]
    assert found["bundled"] != found["other"], "the documents do not tell the models apart"


def test_random_state_and_model_stay_as_they_were(tasks, tokenizer):
    model = tiny(tokenizer, seed=2)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    wanted = random.random(), np.random.random(), torch.rand(1).item()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    zero_shot_scores(model, tokenizer, tasks, batch_size=2, seed=0)
    assert (random.random(), np.random.random(), torch.rand(1).item()) == wanted
    assert not model.training
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_a_group_with_a_score_of_its_own_stands_for_its_tasks(folder, tasks, tokenizer):
    assert open_harness_tasks(["toy_unscored"], folder).names == ["toy_norm", "toy_plain"]
    scored = open_harness_tasks(["toy_scored"], folder)
    assert scored.names == ["toy_scored"]
    model = tiny(tokenizer, seed=1)
    plain = zero_shot_scores(model, tokenizer, tasks, batch_size=4, seed=0)["toy_plain"]
    (score,) = zero_shot_scores(model, tokenizer, scored, batch_size=4, seed=0).values()
    assert (score.metric, score.num_documents) == ("acc", 2 * len(DOCUMENTS))
    assert score.value == pytest.approx(plain.value)
    with pytest.raises(UserError, match=r"Duplicate task 'toy_norm'"):
        open_harness_tasks(["toy_scored", "toy_norm"], folder)


@pytest.mark.parametrize(
    ("result", "wanted"),
    [
        (
            {"acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.25},
            ("acc_norm", 0.25, None),
        ),
        ({"acc,none": 0.5, "acc_stderr,none": 0.1}, ("acc", 0.5, 0.1)),
        (
            {
                "likelihood_diff,none": 3.5,
                "pct_stereotype,none": 0.6,
                "pct_stereotype_stderr,none": 1,
            },
            ("pct_stereotype", 0.6, 1.0),
        ),
        ({"bleu,none": 12.5, "bleu_stderr,none": "N/A", "chrf,none": 1}, ("bleu", 12.5, None)),
        (
            {
                "exact_match,strict": 0.1,
                "exact_match,flexible": 0.2,
                "exact_match_stderr,strict": 0.3,
            },
            ("exact_match", 0.1, 0.3),
        ),
    ],
)
def test_one_metric_stands_for_a_task(result, wanted):
    score = harness._score({"alias": "x", "name": "x", "sample_len": 9, **result}, 5)
    assert score == TaskScore(*wanted, 9, 5)


def test_what_the_folder_holds_needs_no_index_of_the_harness_s_own(folder):
    for name in ("toy_norm", "toy_scored"):
        assert harness._manager([name], folder).all_subtasks == ["toy_norm", "toy_plain"]


@pytest.mark.slow
def test_shipped_tasks_exist_and_a_misspelt_one_is_refused_with_the_nearest():
    """Reads the harness's own index once, which takes about 12 seconds."""
    names = load_config("configs/zero_shot.yaml", {}).evaluate.zero_shot
    index = harness._index(None, include_defaults=True)
    assert len(names) == 10
    assert set(names) <= set(index.all_subtasks)
    for wrong, near in {"piqq": "piqa", "0": "a name that"}.items():
        with pytest.raises(UserError, match=rf"^evaluate\.zero_shot: '{wrong}': .* Set {near}"):
            open_harness_tasks([wrong])


def test_data_that_cannot_be_loaded_is_one_sentence(tmp_path):
    write_task(tmp_path, "lost", dataset_kwargs={"data_files": {"test": "nowhere.jsonl"}})
    with pytest.raises(UserError, match=r"^evaluate\.zero_shot: lost: cannot be loaded: .*nowhere"):
        open_harness_tasks(["lost"], str(tmp_path))


def test_a_task_that_runs_generated_code_is_refused(tmp_path):
    write_task(tmp_path, "coding", unsafe_code=True)
    with pytest.raises(UserError, match=r"^evaluate\.zero_shot: coding: runs generated code"):
        open_harness_tasks(["coding"], str(tmp_path))


def test_without_the_harness_the_way_to_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"^evaluate\.zero_shot: needs lm-eval.*'\.\[eval\]'"):
        open_harness_tasks(["piqa"])


def prompts_of(monkeypatch, model, tokenizer, tasks):
    """Context and choice of each request that reaches the model, and the scores."""
    from lm_eval.models.huggingface import HFLM

    seen, likelihoods = [], HFLM.loglikelihood

    def watched(self, requests, **options):
        seen.extend(request.args for request in requests)
        return likelihoods(self, requests, **options)

    monkeypatch.setattr(HFLM, "loglikelihood", watched)
    scores = zero_shot_scores(model, tokenizer, tasks, batch_size=4, seed=0)
    monkeypatch.undo()
    return seen, scores


def test_prompts_begin_with_solved_examples_the_same_for_every_model(
    with_examples, tokenizer, monkeypatch
):
    tasks = open_harness_tasks(["shown", "never"], with_examples, num_fewshot=2)
    model = load_model("bundled")
    seen, scores = prompts_of(monkeypatch, model, tokenizer, tasks)
    solved = {f"{row['question']}{row['choices'][1]}" for row in EXAMPLES}
    questions = {document["question"] for document in DOCUMENTS}
    shown = []
    for context, _ in seen:
        *examples, question = context.split("|")
        assert question in questions
        assert len(set(examples)) == len(examples)
        assert set(examples) <= solved
        shown.append(len(examples))
    requests = len(DOCUMENTS) * 3
    assert shown == [2] * requests + [0] * requests
    assert {name: score.num_fewshot for name, score in scores.items()} == {"shown": 2, "never": 0}
    right = 0
    for document in DOCUMENTS:
        context = next(c for c, _ in seen if c.endswith(f"|{document['question']}"))
        sums = [log_likelihood(model, tokenizer, context, c) for c in document["choices"]]
        lengths = [len(choice) for choice in document["choices"]]
        best = max(range(3), key=lambda i: sums[i] / lengths[i])
        right += best == document["gold"]
    assert scores["shown"].value == pytest.approx(right / len(DOCUMENTS))
    again, _ = prompts_of(monkeypatch, tiny(tokenizer, seed=1), tokenizer, tasks)
    assert again == seen


def test_examples_that_are_not_there_are_missed_before_anything_runs(with_examples):
    with pytest.raises(UserError, match=r"^evaluate\.num_fewshot: 6: shown: .*larger than pop"):
        open_harness_tasks(["never", "shown"], with_examples, num_fewshot=6)


def test_a_task_never_shows_the_document_it_asks(tmp_path, folder, tokenizer, monkeypatch):
    with pytest.raises(UserError, match=r"^evaluate\.num_fewshot: 1: toy_norm: .*fewshot_split"):
        open_harness_tasks(["toy_norm"], folder, num_fewshot=1)
    write_task(tmp_path, "apart", fewshot_split="test", fewshot_delimiter="|")
    tasks = open_harness_tasks(["apart"], str(tmp_path), num_fewshot=len(DOCUMENTS) - 1)
    seen, _ = prompts_of(monkeypatch, load_model("bundled"), tokenizer, tasks)
    for context, _ in seen:
        *examples, question = context.split("|")
        assert len(examples) == len(DOCUMENTS) - 1
        assert not any(example.startswith(question) for example in examples)


def test_prompts_that_lose_their_beginning_are_said_once(with_examples, tokenizer, caplog):
    model = tiny(tokenizer, seed=1)
    for num_fewshot, wanted in {0: 0, 5: 1}.items():
        caplog.clear()
        tasks = open_harness_tasks(["shown"], with_examples, num_fewshot=num_fewshot)
        zero_shot_scores(model, tokenizer, tasks, batch_size=4, seed=0)
        said = [record.getMessage() for record in caplog.records]
        assert len([line for line in said if "32 tokens lost their beginning" in line]) == wanted
        assert not any("Truncating" in line for line in said)
