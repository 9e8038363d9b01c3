"""The teacher term, the format reward, the mix and functions by dotted path."""

import pickle
import sys
import time

import pytest
import torch

from rewards.correctness import Correctness, exact
from rewards.dotted import load_function
from rewards.format import Format
from rewards.mix import build_rewards
from rewards.teacher_kl import combine, teacher_advantages


def log_probs(*shape, seed):
    return -torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 4


def test_teacher_advantages_by_hand():
    student = torch.tensor([[-1.0, -2.0, -0.5, -9.0]])
    teacher = torch.tensor([[-3.0, -1.0, -0.5, -0.1]])
    mask = torch.tensor([[1, 1, 1, 1]])
    got = teacher_advantages(student, teacher, mask, weight=0.5, clip=3.0)
    torch.testing.assert_close(got, torch.tensor([[-1.0, 0.5, 0.0, 1.5]]), atol=0, rtol=0)


def test_token_the_teacher_likes_more_gets_more():
    student, teacher = log_probs(3, 5, seed=0), log_probs(3, 5, seed=1)
    mask = torch.ones(3, 5, dtype=torch.bool)
    before = teacher_advantages(student, teacher, mask, weight=1.0, clip=100.0)
    teacher[1, 2] += 0.25
    after = teacher_advantages(student, teacher, mask, weight=1.0, clip=100.0)
    assert after[1, 2] - before[1, 2] == pytest.approx(0.25, abs=1e-6)
    assert (after != before).sum() == 1


def test_identical_models_teach_nothing():
    same = log_probs(2, 4, seed=0)
    got = teacher_advantages(same, same.clone(), torch.ones(2, 4), weight=3.0, clip=5.0)
    assert torch.equal(got, torch.zeros(2, 4))


def test_padding_is_zero_whatever_stands_there():
    student, teacher = log_probs(2, 4, seed=0), log_probs(2, 4, seed=1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])  # the last 1 is the end token
    clean = teacher_advantages(student, teacher, mask, weight=1.0, clip=5.0)
    student[mask == 0] = -torch.inf
    teacher[mask == 0] = torch.nan
    got = teacher_advantages(student, teacher, mask, weight=1.0, clip=5.0)
    assert torch.equal(got, clean)
    assert (got[mask == 0] == 0).all()
    assert (got[mask == 1] != 0).all()


def test_no_gradient_flows_and_dtypes_may_differ():
    student = log_probs(2, 3, seed=0).requires_grad_()
    teacher = log_probs(2, 3, seed=1).bfloat16()
    got = teacher_advantages(student, teacher, torch.ones(2, 3), weight=1.0, clip=5.0)
    assert not got.requires_grad
    assert got.dtype == torch.float32


def test_policy_gradient_is_the_gradient_of_the_reverse_kl():
    # One token, vocabulary of 5: the sum over y of p_s(y) a(y) grad log p_s(y) is -grad KL.
    logits = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    teacher = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits.requires_grad_()
    teacher = teacher.log_softmax(0)
    student = logits.log_softmax(0)
    advantage = teacher_advantages(
        student[None], teacher[None], torch.ones(1, 5), weight=1.0, clip=100.0
    )[0]
    surrogate = (student.exp().detach() * advantage * student).sum()
    kl = (student.exp() * (student - teacher)).sum()
    (policy_gradient,) = torch.autograd.grad(surrogate, logits, retain_graph=True)
    (kl_gradient,) = torch.autograd.grad(kl, logits)
    torch.testing.assert_close(policy_gradient, -kl_gradient)


def test_combine_adds_to_each_token():
    got = combine(torch.tensor([1.0, -2.0]), torch.tensor([[0.5, 0.0, 0.0], [-0.5, 0.25, 0.0]]))
    assert torch.equal(got, torch.tensor([[1.5, 1.0, 1.0], [-2.5, -1.75, -2.0]]))


@pytest.fixture
def user_folder(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "limit = 3\n\ndef brevity(prompts, completions, **kwargs):\n"
        "    return [-float(len(c)) for c in completions]\n"
    )
    (tmp_path / "my_broken.py").write_text("1 / 0\n")
    (tmp_path / "my_needy.py").write_text("import no_such_package_at_all\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    yield tmp_path
    for name in ("my_rewards", "my_broken", "my_needy"):
        sys.modules.pop(name, None)


def test_mix_builds_functions_and_weights_in_order(user_folder):
    functions, weights = build_rewards(["my_rewards:brevity", "correctness"], [0.1, 2.0], exact)
    assert weights == [0.1, 2.0]
    assert functions[0](prompts=["p"], completions=["abc"]) == [-3.0]
    assert isinstance(functions[1], Correctness)
    assert functions[1](prompts=["p"], completions=["1"], answer=["1"]) == [1.0]
    assert build_rewards(["correctness"], None, exact)[1] == [1.0]
    (form,), _ = build_rewards(["format"], None, exact, format_pattern=r"\A\d+\Z")
    assert form(["p"] * 2, ["12", "12\n"]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("pattern", "completion", "reward"),
    [
        (r"#### -?\d+\Z", "so\n#### 42", 1),
        (r"#### -?\d+\Z", "#### 42 apples", 0),
        (r"\A<think>.*</think>.+\Z", "<think>a\nb</think>c", 0),
        (r"(?s)\A<think>.*</think>.+\Z", "<think>a\nb</think>c", 1),
        ("", "", 1),
        ("\ud800\x00", "a\ud800\x00", 1),
        ("[0-9]", "٤٢", 0),
    ],
)
def test_format_by_hand(pattern, completion, reward):
    function = Format(pattern)
    assert function.__name__ == "format"
    assert function(prompts=["p"], completions=[completion], answer=["1"]) == [float(reward)]
    assert function(["p"], [[{"role": "assistant", "content": completion}]]) == [float(reward)]


def test_format_with_an_exponential_expression_does_not_hang():
    function, logged = Format("(a+)+b", seconds=0.3), {}
    start = time.monotonic()
    texts = ["aab", "a" * 50, "ab"]
    assert function(["p"] * 3, texts, log_metric=logged.__setitem__) == [1.0, 0.0, 1.0]
    assert time.monotonic() - start < 10
    assert logged == {"rewards/format/timed_out": 1 / 3, "rewards/format/failed": 0.0}
    copy = pickle.loads(pickle.dumps(function))
    assert copy(["p"], ["aab"]) == [1.0]


def test_format_refuses_what_is_no_expression():
    with pytest.raises(ValueError, match=r"^'\(' is no regular expression: missing \)"):
        Format("(")
    with pytest.raises(ValueError, match="is no regular expression: the repetition number"):
        Format("a{99999999999}")
    with pytest.raises(ValueError, match=r"^'format' needs a regular expression"):
        build_rewards(["format"], None, exact)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("my_rewards", "write module:function"),
        (":fn", "write module:function"),
        ("my_rewards:", "write module:function"),
        ("my_reward:brevity", "no module my_reward, neither installed nor in the current folder"),
        ("my_rewards.sub:brevity", "no module my_rewards.sub"),
        ("my_rewards:brevty", "has no brevty; did you mean brevity?"),
        ("my_rewards:limit", "is a int, not a function"),
        ("my_broken:fn", "importing my_broken fails with ZeroDivisionError: division by zero"),
        ("my_needy:fn", "imports no_such_package_at_all, which is not installed"),
        ("..my_rewards:brevity", "fails with TypeError"),
    ],
)
def test_dotted_path_errors(user_folder, path, message):
    with pytest.raises(ValueError, match=r"^'") as caught:
        load_function(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(repr(path))
