"""Cost, budget and satisfaction: what holds for every trajectory, and the edges (method, section 1)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmdp.reward import (
    FORMS,
    check_budget,
    cumulative_cost,
    discount_factors,
    remaining_budget,
    satisfied,
    trajectory_budget,
)

DISCOUNTS = st.sampled_from([1.0, 0.99, 0.9, 0.5])
LIMITS = st.one_of(st.floats(0, 20), st.just(math.inf), st.just(0.0))


@st.composite
def trajectories(draw):
    """(cost, mask), (B, T): costs >= 0 with zeros among them, any mask, what stands off the mask is garbage."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    cost = torch.rand(rows, columns, generator=generator, dtype=torch.float64) * draw(st.sampled_from([0.1, 1.0, 30.0]))
    cost = cost * (torch.rand(rows, columns, generator=generator) < 0.8)
    mask = torch.rand(rows, columns, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    garbage = draw(st.sampled_from([0.0, 1e9, math.inf, math.nan]))
    return cost.masked_fill(~mask, garbage), mask.long()


@given(trajectories(), LIMITS, st.sampled_from(FORMS), DISCOUNTS)
@settings(max_examples=150, deadline=None)
def test_remaining_budget_never_rises_and_its_end_decides_satisfaction(trajectory, limit, form, discount):
    cost, mask = trajectory
    z = remaining_budget(cost, mask, limit, form, discount)
    assert not z.isnan().any()
    assert (z[:, 1:] <= z[:, :-1]).all()
    kept = satisfied(cost, mask, limit, form, discount)
    assert (kept == (z[:, -1] >= 0)).all()
    spent = cumulative_cost(cost, mask, discount)[:, -1]
    assert (kept == (spent <= trajectory_budget(limit, mask, form).double())).all()


@given(trajectories(), st.floats(0, 20), DISCOUNTS)
@settings(max_examples=100, deadline=None)
def test_sautes_recursion_has_the_sign_of_the_remaining_budget(trajectory, limit, discount):
    cost, mask = trajectory
    z = remaining_budget(cost, mask, limit, "total", discount)
    limit = trajectory_budget(limit, mask).double()  # as the module rounds it
    for row in range(len(cost)):
        state, factor = limit[row].item(), 1.0
        for t in range(cost.shape[1]):
            if mask[row, t]:
                state = (state - cost[row, t].item()) / discount
                factor *= discount
            assert state * factor == pytest.approx(z[row, t].item(), abs=1e-9)
            if abs(z[row, t]) > 1e-9:
                assert (state >= 0) == (z[row, t].item() >= 0)


@given(trajectories(), DISCOUNTS)
@settings(max_examples=60, deadline=None)
def test_cumulative_cost_counts_the_students_tokens_and_nothing_else(trajectory, discount):
    cost, mask = trajectory
    total = cumulative_cost(cost, mask, discount)
    for row in range(len(cost)):
        paid, tokens = 0.0, 0
        for t in range(cost.shape[1]):
            if mask[row, t]:
                paid += discount**tokens * cost[row, t].item()
                tokens += 1
            assert total[row, t].item() == pytest.approx(paid, abs=1e-9)


@given(trajectories(), st.floats(0, 5))
@settings(max_examples=60, deadline=None)
def test_per_token_is_total_times_length_and_bounds_the_mean(trajectory, delta):
    cost, mask = trajectory
    length = mask.sum(1)
    budgets = trajectory_budget(delta, mask, "per_token")
    torch.testing.assert_close(budgets, (delta * length).float())
    kept = satisfied(cost, mask, delta, "per_token")
    for row in range(len(cost)):
        alone = cost[row : row + 1], mask[row : row + 1]
        assert kept[row] == satisfied(*alone, budgets[row].item(), "total").item()
        if length[row]:
            mean = cost[row][mask[row] == 1].mean().item()
            if abs(mean - delta) > 1e-5:
                assert kept[row] == (mean <= delta)


def test_forms_agree_on_trajectories_of_one_token():
    cost, mask = torch.tensor([[0.5, 9.0], [2.0, 9.0]]), torch.tensor([[1, 0], [1, 0]])
    for limit in (0.0, 0.5, 1.0, math.inf):
        first, second = (remaining_budget(cost, mask, limit, form) for form in FORMS)
        assert torch.equal(first, second)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("limit", [0.0, 1.0, math.inf])
def test_an_empty_completion_costs_nothing_and_satisfies_every_budget(form, limit):
    cost, mask = torch.tensor([[math.nan, 3.0]]), torch.zeros(1, 2)
    z = remaining_budget(cost, mask, limit, form)
    assert not z.isnan().any()
    assert satisfied(cost, mask, limit, form).all()
    assert (cumulative_cost(cost, mask) == 0).all()


def test_a_completion_cut_at_the_limit_is_charged_for_the_tokens_it_has():
    cost = torch.full((2, 4), 0.5)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])  # the first never ended, the second did
    assert satisfied(cost, mask, 1.5).tolist() == [False, True]
    assert satisfied(cost, mask, 0.5, "per_token").tolist() == [True, True]


def test_a_budget_spent_to_the_last_nat_is_kept():
    cost, mask = torch.full((1, 4), 0.25), torch.ones(1, 4)
    assert satisfied(cost, mask, 1.0).item()
    assert not satisfied(cost, mask, 0.999).item()
    assert satisfied(torch.zeros(1, 4), mask, 0.0).item()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32])
def test_masks_of_every_type_mean_the_same(dtype):
    mask = torch.tensor([[1, 0, 1, 1]]).to(dtype)
    torch.testing.assert_close(discount_factors(mask, 0.5).float(), torch.tensor([[1.0, 0.0, 0.5, 0.25]]))
    assert cumulative_cost(torch.ones(1, 4), mask, 0.5).tolist() == [[1.0, 1.0, 1.5, 1.75]]
    assert trajectory_budget(2.0, mask, "per_token").tolist() == [6.0]


def test_a_whole_number_of_nats_is_still_a_number_of_nats():
    mask = torch.ones(2, 3, dtype=torch.long)
    for form in FORMS:
        assert trajectory_budget(5, mask, form).dtype == torch.float32
        assert trajectory_budget(math.inf, mask, form).tolist() == [math.inf] * 2


@pytest.mark.parametrize("limit", [-0.1, -math.inf, math.nan])
def test_a_budget_below_zero_or_no_number_is_refused(limit):
    with pytest.raises(ValueError, match="0 nats or more"):
        check_budget(limit)
    with pytest.raises(ValueError, match="0 nats or more"):
        trajectory_budget(limit, torch.ones(1, 1))


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="'weekly'"):
        remaining_budget(torch.ones(1, 1), torch.ones(1, 1), 1.0, "weekly")
