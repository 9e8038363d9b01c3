r"""The pull towards the teacher, in one of three places: per-token advantage, reward, loss.

The student p_s samples a completion y of T tokens; p_t is the teacher at the same prefix, both at
the sampling temperature. The log ratio of a sampled token, d_t = log p_s(y_t) - log p_t(y_t) in
nats, is the k1 estimator of the reverse KL(p_s || p_t). Below, A = (r - mean of the group) /
(std of the group + 1e-4) is GRPO's advantage (arXiv 2402.03300) and rho_t = p_s(y_t) / p_old(y_t);
GRPO descends -min(rho_t A_t, clip(rho_t, 1 - eps_low, 1 + eps_high) A_t).

**advantage**   A_t = A - weight * clamp(d_t, -clip, clip)

    grad E[d_t] = E[d_t grad log p_s(y_t)], so this is policy gradient on the per-token reverse KL;
    "k1 in reward" is the form whose gradient is that KL's (Liu et al. 2025, arXiv 2510.01555).
    Added to GRPO it joins distillation and RL (KDRL, Xu et al. 2025, arXiv 2506.02208); without a
    reward it is on-policy distillation (Agarwal et al. 2023, arXiv 2306.13649, reverse KL).
    scale_rewards: added after it, so never divided by a spread. In a group of equal rewards A is 0
    and the term alone teaches; its size is at most weight * clip, A's spread is 1.
    Clipping: with num_iterations 1, rho_t is 1 and nothing is clipped. Beyond, the sign of the sum
    A_t decides: above 0 the token's gradient is 0 where rho_t > 1 + eps_high, below 0 where
    rho_t < 1 - eps_low, for both parts at once. d_t is of the present student, not of p_old:
    E_old[rho_t d_t grad log p_s] = E_s[d_t grad log p_s], the gradient at the weights as they are.

**reward**   r = sum_k weight_k r_k + weight * -mean_t clamp(d_t, -clip, clip)

    The mean over the completion's tokens, not the sum. The sum is the KL of whole completions, but
    it grows with T: it would drown a reward of 0 or 1, and as d_t is positive on average, make
    completions short. The mean is nats per token whatever T.
    scale_rewards: part of r, so only its differences inside a group act. `none` leaves weight *
    (r_kl - its group's mean); `batch` divides that by one number; `group` divides by the spread of
    r in the group, and where all other rewards are equal the weight cancels: the term alone makes
    an advantage of spread 1, however small its differences are (until 1e-4).
    Clipping: all tokens share one A, whose sign decides.

**loss**   GRPO's loss + weight * mean_t KL_t, over the vocabulary at each completion token

    forward: KL(p_t || p_s) (Hinton et al. 2015, arXiv 1503.02531); reverse: KL(p_s || p_t).
    The mean is over all tokens of the optimizer step. scale_rewards and clipping do not touch it:
    its gradient always flows, with the same size in a dead group, and `clip` has no part in it.
    For large vocabularies the teacher's k most probable tokens stay single and the rest becomes one
    bucket, in p_t and p_s alike. Merging outcomes never raises a KL (log-sum inequality), so the
    result is a lower bound, equal to the KL where the rest holds one token.

Left out: how a token changes the states of later ones (discount 0 in advantage, fixed prefixes in
loss), and in advantage and reward the vocabulary beyond the sampled token.
"""

import torch
from torch import Tensor


def teacher_advantages(
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    completion_mask: Tensor,
    weight: float,
    clip: float,
) -> Tensor:
    """Compute -weight * clamp(d_t) for every completion token.

    Both log-probabilities must be taken at the same temperature.

    Args:
        student_log_probs: log p_s of the sampled tokens in nats, (B, T) float.
        teacher_log_probs: log p_t of the same tokens in nats, (B, T) float.
        completion_mask: True or 1 for completion tokens up to and with the end token, 0 for
            padding, (B, T).
        weight: Advantage per nat, >= 0.
        clip: Bound of the log ratio in nats per token, > 0.

    Returns:
        (B, T) in the student's dtype, without gradient; exactly 0 where the mask is 0, whatever
        the log-probabilities there.
    """
    return -weight * log_ratios(student_log_probs, teacher_log_probs, completion_mask).clamp(
        -clip, clip
    )


def combine(advantages: Tensor, teacher_advantages: Tensor) -> Tensor:
    """Add a completion's group-normalised advantage to each of its tokens' teacher advantage.

    Args:
        advantages: A, after `scale_rewards`, (B,).
        teacher_advantages: The term per token, (B, T).

    Returns:
        A_t, (B, T). At padding it equals A; the loss masks it there.
    """
    return advantages.unsqueeze(1) + teacher_advantages


def sequence_rewards(
    student_log_probs: Tensor, teacher_log_probs: Tensor, completion_mask: Tensor, clip: float
) -> Tensor:
    """Compute -mean_t clamp(d_t) for every completion.

    Args:
        student_log_probs: As in `teacher_advantages`, as are the other arguments.
        teacher_log_probs: (B, T).
        completion_mask: (B, T).
        clip: Bound of the log ratio in nats per token, > 0.

    Returns:
        (B,) nats per token, without gradient; 0 for an empty completion.
    """
    ratios = log_ratios(student_log_probs, teacher_log_probs, completion_mask).clamp(-clip, clip)
    return -ratios.sum(-1) / completion_mask.sum(-1).clamp(min=1)


def log_ratios(
    student_log_probs: Tensor, teacher_log_probs: Tensor, completion_mask: Tensor
) -> Tensor:
    """d_t in nats, (B, T) in the student's dtype, without gradient; 0 where the mask is 0."""
    assert student_log_probs.shape == teacher_log_probs.shape == completion_mask.shape
    ratios = student_log_probs.detach() - teacher_log_probs.detach().to(student_log_probs)
    return ratios.masked_fill(~completion_mask.bool(), 0.0)


def vocabulary_kl(
    student_log_probs: Tensor, teacher_log_probs: Tensor, direction: str = "forward"
) -> Tensor:
    """KL between two distributions over the same outcomes, token by token.

    Args:
        student_log_probs: log p_s, (N, K) nats.
        teacher_log_probs: log p_t, (N, K) nats; no gradient flows to it.
        direction: `forward` for KL(p_t || p_s), `reverse` for KL(p_s || p_t).

    Returns:
        (N,) nats, differentiable in the student.
    """
    assert direction in ("forward", "reverse")
    teacher = teacher_log_probs.detach()
    if direction == "forward":
        return (teacher.exp() * (teacher - student_log_probs)).sum(-1)
    return (student_log_probs.exp() * (student_log_probs - teacher)).sum(-1)


def merge_rest(log_probs: Tensor, indices: Tensor) -> Tensor:
    """Keep some outcomes of a distribution and merge all others into one.

    Args:
        log_probs: (N, V) nats.
        indices: Outcomes to keep, (N, k) int64, k < V, each once.

    Returns:
        (N, k + 1): theirs in the order given, then the log of the probability of the rest, summed
        without cancellation.
    """
    kept = log_probs.gather(-1, indices)
    rest = log_probs.scatter(-1, indices, -float("inf")).logsumexp(-1, keepdim=True)
    return torch.cat([kept, rest], -1)
