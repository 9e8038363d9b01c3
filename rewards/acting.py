r"""How much each term of the reward mix acts: the angle between the advantages with and without it.

GRPO sees of a reward only its differences inside a group, and of those only the direction, up to
the spread it divides by. A term can have any weight and still do nothing: one that is equal for
all completions of a prompt, or one that is another term times a constant. So on a recorded batch

    acts(term) = 1 - cos(A, A'),    A'  the advantages of the same batch without the term

over all completion tokens of the live groups, those whose A is not 0 throughout. A term *acts* from
`ACTS` up; 0 is no influence at all, 1 is what a term has that acts alone, 2 reverses A.

    A[b, t] = (r[b] - mean of its group) / (spread + 1e-4) + term[b, t],    r = sum_k weight_k r_k

as in TRL's GRPOTrainer with `sum_then_normalize` (GRPO: arXiv 2402.03300). Left out: rewards that
are None, `normalize_then_sum`, and what stands in the loss itself, such as a KL over the
vocabulary: it is no part of A.
"""

import torch
from torch import Tensor

ACTS = 1e-3
"""From here a term acts: an angle of 2.6 degrees."""

ROUNDING = 1e-6
"""An advantage of this size is none: rounding, which a dead group's spread of 0 magnifies."""

SCALES = ("group", "batch", "none")


def group_advantages(
    rewards: Tensor, weights: list[float], group_size: int, scale_rewards: str = "group"
) -> Tensor:
    """GRPO's advantages of one batch.

    Args:
        rewards: One column per term, (B, K) float, groups one after the other.
        weights: K factors.
        group_size: Completions of one prompt; divides B.
        scale_rewards: TRL's: `group` divides by the spread (sample standard deviation) of each
            group, `batch` by that of all rewards, `none` by nothing.

    Returns:
        (B,), of the rewards' dtype.

    Raises:
        ValueError: A reward is not finite, or the groups do not fit the batch.
    """
    assert scale_rewards in SCALES
    assert rewards.size(1) == len(weights)
    if not torch.isfinite(rewards).all():
        raise ValueError("a recorded reward is not finite; record rewards that are numbers")
    if len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} completions do not make groups of {group_size}")
    total = (rewards * rewards.new_tensor(weights)).sum(1).view(-1, group_size)
    centred = total - total.mean(1, keepdim=True)
    if scale_rewards == "group":
        centred = centred / (total.std(1, keepdim=True) + 1e-4)
    elif scale_rewards == "batch":
        centred = centred / (total.std() + 1e-4)
    return centred.flatten()


def influences(
    rewards: dict[str, Tensor],
    weights: dict[str, float],
    group_size: int,
    completion_mask: Tensor,
    token_terms: dict[str, Tensor] | None = None,
    scale_rewards: str = "group",
) -> dict[str, float]:
    """1 - cosine between the advantages with and without each term.

    Args:
        rewards: Term to its rewards, (B,), groups one after the other.
        weights: Term to its factor.
        group_size: Completions of one prompt.
        completion_mask: 1 for completion tokens, (B, T).
        token_terms: Term to what it adds to each token's advantage, weight included, (B, T).
        scale_rewards: As in `group_advantages`.

    Returns:
        Term, of both kinds, to 1 - cosine in [0, 2]; 1 where without it no advantage is left.

    Raises:
        ValueError: No group is live, so that no term can be judged.
    """
    token_terms = token_terms or {}
    terms = [*rewards, *token_terms]

    def without(left_out: str | None) -> Tensor:
        names = [name for name in rewards if name != left_out]
        tokens = torch.zeros_like(completion_mask, dtype=torch.float64)
        if names:
            columns = torch.stack([rewards[name].double() for name in names], 1)
            factors = [weights[name] for name in names]
            tokens += group_advantages(columns, factors, group_size, scale_rewards).unsqueeze(1)
        tokens += sum(term.double() for name, term in token_terms.items() if name != left_out)
        return tokens * completion_mask

    whole = without(None).view(-1, group_size, completion_mask.size(1))
    live = (whole.abs() > ROUNDING).flatten(1).any(1)
    if not live.any():
        raise ValueError("no group of the recorded batch has an advantage; record another batch")
    return {name: _angle(whole[live], without(name).view_as(whole)[live]) for name in terms}


def _angle(first: Tensor, second: Tensor) -> float:
    """1 - cosine of two tensors taken as vectors; 1 where the second is 0."""
    if second.abs().max() <= ROUNDING:
        return 1.0
    first, second = first / first.norm(), second / second.norm()
    return 0.5 * (first - second).square().sum().item()  # exact for small angles
