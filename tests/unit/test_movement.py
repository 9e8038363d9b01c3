"""The movement rule; stochastic rounding: unbiased, to neighbours, the same on any shard."""

import pytest
import torch

from pipeline.sparsity.movement import MovementRule
from pipeline.sparsity.stochastic import phases, random_bits, round_to_bf16, rounding_key

CPU = torch.device("cpu")


def rounded(values, key=0, offset=0):
    n = values.numel()
    target = torch.empty(n, dtype=torch.bfloat16)
    bits = random_bits(torch.empty(n, dtype=torch.int32), phases(n, CPU), key, offset)
    round_to_bf16(target, values.clone(), bits)
    return target


def neighbours(values):
    """The two bf16 numbers around each fp32 number: smaller and larger in magnitude."""
    low = values.view(torch.int32).bitwise_and(-(2**16))
    exact = values.view(torch.int32) == low
    high = torch.where(exact, low, low + 2**16)
    return low.view(torch.float32), high.view(torch.float32)


def test_an_observation_counts_half_after_the_half_life():
    assert MovementRule(half_life_steps=7.0).decay ** 7 == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kept": "weight"}, "movement.kept: 'weight' is unknown; set one of gradient, sq"),
        ({"pruned": "gradient"}, "movement.pruned: 'gradient' is unknown; set one of proposed, n"),
        ({"half_life_steps": 0.0}, "movement.half_life_steps: 0.0 forgets"),
        ({"half_life_steps": float("nan")}, "movement.half_life_steps: nan"),
        ({"dtype": torch.float16}, "movement.dtype: torch.float16; set float32 or bfloat16"),
        ({"kept": "displacement", "dtype": torch.bfloat16}, "of which bf16 keeps nothing"),
    ],
)
def test_a_rule_that_cannot_be_followed_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        MovementRule(**{"half_life_steps": 10.0} | values)


def test_rounding_goes_to_neighbours_only_and_to_both():
    torch.manual_seed(0)
    values = torch.cat([torch.randn(20_000), torch.randn(20_000) * 1e-30, torch.zeros(10)])
    low, high = neighbours(values)
    found = rounded(values, rounding_key("w", 3, "before")).float()
    assert ((found == low) | (found == high)).all()
    assert (found != low).float().mean() == pytest.approx(0.5, abs=0.02)


def test_what_bf16_holds_stays_what_it_is():
    values = torch.randn(5000).bfloat16().float()
    for key in (0, 1, 12345, 2**32 - 1):
        assert torch.equal(rounded(values, key).float(), values)


def test_rounding_is_unbiased_for_each_element():
    """Over steps each element's mean is its value, within the spread of the draws."""
    torch.manual_seed(0)
    values, num_steps = torch.randn(500), 4000
    low, high = neighbours(values)
    share = (values - low) / (high - low)
    total = torch.zeros(500)
    for step in range(num_steps):
        total += (rounded(values, rounding_key("w", step, "before")).float() != low).float()
    deviation = (total / num_steps - share) / (share * (1 - share) / num_steps).sqrt()
    assert deviation.abs().max() < 4.5
    assert deviation.mean().abs() < 0.3


def test_successive_steps_draw_independently():
    draws = torch.stack(
        [
            random_bits(
                torch.empty(8, dtype=torch.int32), phases(8, CPU), rounding_key("w", step, "s"), 5
            )
            for step in range(4000)
        ]
    ).double()
    correlation = torch.corrcoef(torch.stack([draws[:-1, 3], draws[1:, 3]]))[0, 1]
    assert abs(correlation) < 0.06
    assert draws.mean() == pytest.approx(2**15, rel=0.02)
    assert draws.min() >= 0
    assert draws.max() < 2**16


def test_rounding_does_not_depend_on_the_sharding():
    values = torch.randn(10_001)
    key = rounding_key("layers.3.weight", 17, "after")
    whole = rounded(values, key)
    for cuts in ([1], [4096], [3, 5000, 10_000]):
        parts = values.tensor_split(cuts)
        offsets = [0, *cuts]
        found = [rounded(p, key, o) for p, o in zip(parts, offsets, strict=True)]
        assert torch.equal(torch.cat(found), whole)
    assert not torch.equal(rounded(values, key, 1), whole)


def test_offsets_beyond_32_bits_are_drawn_too():
    assert rounded(torch.randn(10), 2**32 - 1, 2**40 + 3).isfinite().all()


def test_names_steps_and_streams_have_keys_of_their_own():
    keys = {
        rounding_key(name, step, stream)
        for name in ("a", "b", "a1")
        for step in (0, 1, 10)
        for stream in ("before", "after")
    }
    assert len(keys) == 18
