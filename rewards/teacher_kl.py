r"""Teacher KL as a per-token advantage: reverse KL to the teacher on the student's own samples.

With y_t sampled from the student p_s, the gradient of the per-token reverse KL is

    grad E[log p_s(y_t) - log p_t(y_t)] = E[(log p_s(y_t) - log p_t(y_t)) grad log p_s(y_t)]

so descending it is policy gradient with the detached advantage

    a_t = -weight * clamp(log p_s(y_t) - log p_t(y_t), -clip, clip)

The log ratio is the k1 estimator on the sampled token; "k1 in reward" is the form whose gradient is
that of the reverse KL (Liu et al. 2025, arXiv 2510.01555). Adding it to GRPO's advantage joins
distillation and RL in one objective (KDRL, Xu et al. 2025, arXiv 2506.02208); without a reward it
is on-policy distillation (Agarwal et al. 2023, arXiv 2306.13649, reverse KL).

How it meets GRPO's advantage A = (r - mean of the group) / std of the group:

    A_t = A + a_t      added after `scale_rewards`, never divided by the group's spread

A has no unit and a spread of 1; a_t is in nats times `weight`, and `clip` bounds it to
+-weight * clip nats per token. In a group whose rewards are all equal A is 0 and a_t alone teaches.

Left out: a token's effect on the log ratios of later tokens (discount 0), and the vocabulary
beyond the sampled token.
"""

from torch import Tensor


def teacher_advantages(
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    completion_mask: Tensor,
    weight: float,
    clip: float,
) -> Tensor:
    """Compute a_t for every completion token.

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
    assert student_log_probs.shape == teacher_log_probs.shape == completion_mask.shape
    log_ratio = student_log_probs.detach() - teacher_log_probs.detach().to(student_log_probs)
    log_ratio = log_ratio.masked_fill(~completion_mask.bool(), 0.0)
    return -weight * log_ratio.clamp(-clip, clip)


def combine(advantages: Tensor, teacher_advantages: Tensor) -> Tensor:
    """Add a completion's group-normalised advantage to each of its tokens' teacher advantage.

    Args:
        advantages: A, after `scale_rewards`, (B,).
        teacher_advantages: a_t, (B, T).

    Returns:
        A_t, (B, T). At padding it equals A; the loss masks it there.
    """
    return advantages.unsqueeze(1) + teacher_advantages
