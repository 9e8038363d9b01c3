"""The head in chunks and the frozen teacher: the same numbers as whole logits, in less memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.models.chunked_head import ChunkedHead, chunked_head, score_completions
from pipeline.models.teacher import completion_log_probs, completion_targets

VOCAB_SIZE = 97
IDS = torch.randint(3, VOCAB_SIZE, (5, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],  # an empty completion
        [0, 0, 0, 1, 1, 1, 1, 1, 0],
    ]
)
LENGTH = 5  # of the completions


def model(seed=0, tied=False):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            initializer_range=0.3,
            tie_word_embeddings=tied,
        )
    ).eval()


def plain_log_probs(reference, temperature=1.0):
    """(B, T, V), from a forward pass with whole logits."""
    logits = reference(input_ids=IDS, attention_mask=MASK).logits[:, -LENGTH - 1 : -1]
    return (logits / temperature).log_softmax(-1)


class LargestLogits(TorchDispatchMode):
    """Notes the most elements of a floating-point result as wide as the vocabulary."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.is_floating_point():
                is_weight = tensor.shape == (VOCAB_SIZE, 16)
                if (
                    VOCAB_SIZE in tensor.shape
                    and not is_weight
                    and tensor.shape != (16, VOCAB_SIZE)
                ):
                    self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
@pytest.mark.parametrize("tokens_at_once", [1, 4, 1000])
def test_teacher_log_probs_in_chunks(micro_batch_size, tokens_at_once):
    teacher = model()
    expected = plain_log_probs(teacher, 0.7).gather(-1, IDS[:, -LENGTH:, None]).squeeze(-1)
    chunked_head(teacher).max_logits = tokens_at_once * VOCAB_SIZE + 3
    found = completion_log_probs(
        teacher, IDS, MASK, LENGTH, micro_batch_size=micro_batch_size, temperature=0.7
    )
    mask = MASK[:, -LENGTH:]
    torch.testing.assert_close(found, expected * mask, atol=1e-5, rtol=1e-5)
    assert not found.requires_grad


@pytest.mark.parametrize("top_k", [1, 7, 96, 97, 200, None])
def test_teacher_targets_are_the_largest_probabilities_and_the_rest(top_k):
    teacher = model()
    expected = plain_log_probs(teacher, 0.7)
    chunked_head(teacher).max_logits = 4 * VOCAB_SIZE
    found, indices = completion_targets(
        teacher, IDS, MASK, LENGTH, micro_batch_size=2, temperature=0.7, top_k=top_k
    )
    present = MASK[:, -LENGTH:].bool()
    assert (found[~present] == 0).all()
    found, expected = found[present], expected[present]
    if top_k is None or top_k >= VOCAB_SIZE:
        assert indices is None
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        return
    largest, at = expected.topk(top_k)
    assert torch.equal(indices[present], at)
    torch.testing.assert_close(found[:, :-1], largest, atol=1e-5, rtol=1e-5)
    rest = expected.exp().scatter(-1, at, 0.0).sum(-1)
    torch.testing.assert_close(found[:, -1].exp(), rest, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_no_more_logits_than_stated_exist_at_once(with_gradient):
    reader = model()
    limit = 3 * VOCAB_SIZE
    chunked_head(reader).max_logits = limit
    with LargestLogits() as seen:
        if with_gradient:
            scores = score_completions(
                reader,
                reader.lm_head,
                IDS,
                MASK,
                LENGTH,
                lambda logits, _: logits.log_softmax(-1)[:, :2],
            )
            scores.sum().backward()
        else:
            completion_log_probs(reader, IDS, MASK, LENGTH, micro_batch_size=5)
            completion_targets(reader, IDS, MASK, LENGTH, micro_batch_size=5, top_k=4)
    assert limit - VOCAB_SIZE < seen.largest <= limit


def test_no_logits_wait_for_the_backward_pass():
    reader = model()
    chunked_head(reader).max_logits = 3 * VOCAB_SIZE
    waiting = []

    def pack(tensor):
        waiting.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        score_completions(
            reader,
            reader.lm_head,
            IDS,
            MASK,
            LENGTH,
            lambda logits, _: logits.log_softmax(-1)[:, :2],
        )
    assert waiting
    assert not any(shape[-1:] == (VOCAB_SIZE,) for shape in waiting)


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_in_chunks_are_those_of_whole_logits(tied):
    reference, chunked = model(tied=tied), model(tied=tied)
    head = chunked_head(chunked)
    head.max_logits = 3 * VOCAB_SIZE
    present = MASK[:, -LENGTH:].bool()
    tokens = IDS[:, -LENGTH:][present]

    def score(logits, chosen):
        log_probs = logits.log_softmax(-1)
        sampled = log_probs.gather(-1, tokens[chosen, None]).squeeze(-1)
        return torch.stack([sampled, (log_probs.exp() * log_probs).sum(-1)], -1)

    scores = score_completions(chunked, head, IDS, MASK, LENGTH, score)
    assert scores.shape == (5, LENGTH, 2)
    whole = score(reference(IDS, MASK).logits[:, -LENGTH - 1 : -1][present], slice(None))
    torch.testing.assert_close(scores[present], whole, atol=1e-5, rtol=1e-5)
    factors = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1))
    (scores[present] * factors).sum().backward()
    (whole * factors).sum().backward()
    for (name, weight), other in zip(
        chunked.named_parameters(), reference.parameters(), strict=True
    ):
        torch.testing.assert_close(weight.grad, other.grad, atol=1e-5, rtol=1e-4, msg=name)


def test_a_batch_without_completion_tokens_gives_zeros_and_a_gradient_of_zero():
    reader = model()
    mask = MASK.clone()
    mask[:, -LENGTH:] = 0
    head = chunked_head(reader)
    scores = score_completions(reader, head, IDS, mask, LENGTH, lambda logits, _: logits[:, :2])
    assert torch.equal(scores, torch.zeros(5, LENGTH, 2))
    scores.sum().backward()
    assert not reader.lm_head.weight.grad.any()
    assert not completion_log_probs(reader, IDS, mask, LENGTH, micro_batch_size=2).any()


@pytest.mark.parametrize("tied", [False, True])
def test_the_new_head_is_the_old_one_to_everybody_else(tied):
    before = model(tied=tied)
    logits, names = before(IDS).logits, list(before.state_dict())
    weight = before.lm_head.weight
    head = chunked_head(before)
    assert isinstance(before.lm_head, ChunkedHead)
    assert chunked_head(before) is head is before.get_output_embeddings()
    assert before.lm_head.weight is weight
    assert (before.lm_head.weight is before.model.embed_tokens.weight) == tied
    assert list(before.state_dict()) == names
    assert torch.equal(before(IDS).logits, logits)
    assert not before.lm_head.training
    with pytest.raises(ZeroDivisionError), head.scoring(MASK.bool(), lambda *_: 1 / 0):
        before(IDS)
    assert torch.equal(before(IDS).logits, logits), "scoring ends, whatever happens in it"
