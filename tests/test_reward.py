"""Cost, budget and satisfaction; the modified reward in its forms; the advantages (method, sections 1, 3, 4 (c), 6)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmdp.reward import (
    BUDGET_FORMS,
    FORMS,
    check_budget,
    cumulative_cost,
    discount_factors,
    group_advantages,
    modified_reward,
    token_advantages,
    trajectory_budget,
)

SEEDS = st.integers(0, 2**31 - 1)
SIZES = st.floats(0, 5)
DISCOUNTS = st.sampled_from([1.0, 0.99, 0.9, 0.5])
LIMITS = st.one_of(st.floats(0, 20), st.just(math.inf), st.just(0.0))


# ---- cost and budget ----


def remaining_budget(cost, mask, limit, form="total", discount=1.0):
    """z_t = d - C_t, (B, T)."""
    return trajectory_budget(limit, mask, form).to(cost.dtype)[:, None] - cumulative_cost(cost, mask, discount)


def satisfied(*arguments):
    """Whether each trajectory keeps its budget, (B,)."""
    return remaining_budget(*arguments)[:, -1] >= 0


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


@given(trajectories(), LIMITS, st.sampled_from(BUDGET_FORMS), DISCOUNTS)
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
        first, second = (remaining_budget(cost, mask, limit, form) for form in BUDGET_FORMS)
        assert torch.equal(first, second)


@pytest.mark.parametrize("form", BUDGET_FORMS)
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
    for form in BUDGET_FORMS:
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


# ---- the modified reward ----


def random_batch(seed: int, rows: int = 5, columns: int = 8):
    """(task_reward, cost, mask): an empty completion, a full one, tokens of a tool in between, garbage off the mask."""
    draw = torch.Generator().manual_seed(seed)
    mask = (torch.rand(rows, columns, generator=draw) < 0.7).long()
    mask[0], mask[1] = 0, 1
    cost = torch.rand(rows, columns, generator=draw, dtype=torch.float64).masked_fill(mask == 0, math.nan)
    return torch.rand(rows, generator=draw, dtype=torch.float64), cost, mask


def written_out(task, cost, mask, budget, lam, penalty, form, phi, discount):
    """Section 3, one trajectory and one token at a time: rewards of one row."""
    rewards, spent, steps, exhausted = [0.0] * len(cost), 0.0, [t for t in range(len(cost)) if mask[t]], False
    last = steps[-1] if steps else 0
    for order, t in enumerate(steps):
        spent += discount**order * cost[t]
        if form == "lagrangian":
            rewards[t] -= lam * discount**order * cost[t]
        elif form == "exhausted" and spent > budget:
            rewards[t] -= lam * phi[t] + (0.0 if exhausted else penalty)
            exhausted = True
    if form in ("overshoot", "hinge") and spent > budget:
        rewards[last] -= penalty + lam * (spent - budget)
    if form == "soft_hinge":
        limit, k = max(budget, 1e-9), 10.0
        softplus = [max(x, 0.0) + math.log1p(math.exp(-abs(x))) for x in (k * (spent / limit - 1), -k)]
        rewards[last] -= lam * limit / k * (softplus[0] - softplus[1])
    if form in ("lagrangian", "hinge", "soft_hinge") or spent <= budget:
        rewards[last] += task
    return rewards


@given(SEEDS, st.sampled_from(FORMS), SIZES, SIZES, st.floats(0, 4), st.sampled_from([1.0, 0.9]), st.booleans())
@settings(max_examples=150, deadline=None)
def test_reward_is_the_formula_written_out(seed, form, lam, penalty, limit, discount, own_phi):
    task, cost, mask = random_batch(seed)
    phi = cost.square() if own_phi and form == "exhausted" else None
    budget = trajectory_budget(limit, mask).double()
    given_reward = modified_reward(
        task, cost, mask, budget, lam=lam, penalty=penalty, form=form, phi=phi, discount=discount
    )
    expected = [
        written_out(
            task[row].item(),
            cost[row].tolist(),
            mask[row].tolist(),
            budget[row].item(),
            lam,
            penalty,
            form,
            (cost if phi is None else phi)[row].tolist(),
            discount,
        )
        for row in range(len(task))
    ]
    torch.testing.assert_close(given_reward.reward, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(given_reward.total, given_reward.reward.sum(1))
    spent = cumulative_cost(cost, mask, discount)
    assert torch.equal(given_reward.over, spent > budget[:, None])


@given(SEEDS, st.sampled_from(FORMS), st.floats(0, 3), st.floats(0, 4), st.sampled_from([1.0, 0.9]))
@settings(max_examples=100, deadline=None)
def test_weight_is_minus_the_derivative_of_the_reward_by_the_divergence(seed, form, lam, limit, discount):
    """By autograd through the total, at a point where no trajectory crosses: over_t is constant there."""
    task, cost, mask = random_batch(seed)
    budget = trajectory_budget(limit, mask)
    cost = cost.nan_to_num(0.0).requires_grad_()
    modified = modified_reward(task, cost, mask, budget, lam=lam, penalty=1.0, form=form, discount=discount)
    (derivative,) = torch.autograd.grad(modified.total.sum(), cost, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(modified.weight.detach(), -derivative)
    assert (modified.weight >= 0).all()
    assert (modified.weight[mask == 0] == 0).all()


@given(SEEDS, st.sampled_from(FORMS), st.sampled_from(["total", "per_token"]))
@settings(max_examples=60, deadline=None)
def test_without_penalties_and_with_an_infinite_budget_it_is_grpos_reward_exactly(seed, form, budget_form):
    task, cost, mask = random_batch(seed)
    budget = trajectory_budget(math.inf, mask, budget_form)
    plain = modified_reward(task, cost, mask, budget, lam=0.0, penalty=0.0, form=form)
    assert torch.equal(plain.total, task)
    assert (plain.weight == 0).all()
    assert not plain.over[mask.sum(1) > 0].any()
    for row in range(len(task)):  # R stands at the student's last token, at the first column where there is none
        last = mask[row].nonzero()[-1].item() if mask[row].any() else 0
        assert plain.reward[row, last] == task[row]


@given(SEEDS, st.sampled_from(["exhausted", "overshoot", "hinge"]), SIZES, SIZES)
@settings(max_examples=60, deadline=None)
def test_an_infinite_budget_is_never_charged_whatever_the_penalties(seed, form, lam, penalty):
    task, cost, mask = random_batch(seed)
    modified = modified_reward(task, cost, mask, trajectory_budget(math.inf, mask), lam=lam, penalty=penalty, form=form)
    assert torch.equal(modified.total, task)
    assert (modified.weight == 0).all()


@given(SEEDS, st.sampled_from(["exhausted", "overshoot"]), SIZES, SIZES, st.floats(0, 4))
@settings(max_examples=60, deadline=None)
def test_violators_earn_no_task_reward_and_the_others_all_of_it(seed, form, lam, penalty, limit):
    task, cost, mask = random_batch(seed)
    budget = trajectory_budget(limit, mask)
    totals = [
        modified_reward(reward, cost, mask, budget, lam=lam, penalty=penalty, form=form).total
        for reward in (task, torch.zeros_like(task))
    ]
    violated = cumulative_cost(cost, mask)[:, -1] > budget
    torch.testing.assert_close(totals[0][~violated], task[~violated])
    assert torch.equal(totals[0][violated], totals[1][violated])
    assert (totals[0][violated] <= 0).all()


@pytest.mark.parametrize("form", ["exhausted", "overshoot"])
def test_the_constant_penalty_is_charged_once(form):
    cost, mask = torch.tensor([[1.0, 1.0, 1.0, 5.0]]), torch.tensor([[1, 1, 1, 0]])
    modified = modified_reward(torch.ones(1), cost, mask, torch.tensor([0.5]), lam=0.0, penalty=3.0, form=form)
    assert modified.total.item() == -3.0
    first = {"exhausted": [-3.0, 0.0, 0.0, 0.0], "overshoot": [0.0, 0.0, -3.0, 0.0]}[form]
    assert modified.reward.tolist() == [first]


def test_the_constant_penalty_is_charged_once_to_a_cost_that_goes_up_and_down():
    """The estimator k1 may be negative: a trajectory can exhaust its budget, recover, and exhaust it again."""
    cost = torch.tensor([[2.0, -1.5, 2.0, -2.0]])
    modified = modified_reward(torch.ones(1), cost, torch.ones(1, 4), torch.tensor([1.0]), lam=0.0, penalty=3.0)
    assert modified.over.tolist() == [[True, False, True, False]]
    assert modified.reward.tolist() == [[-3.0, 0.0, 0.0, 1.0]]


def crossing(form: str, excess: float, lam=2.0, penalty=0.0, reward=1.0) -> float:
    """The total of a trajectory of costs 0.4, 0.3, 0.3 + excess whose budget is 1.0, in float64."""
    cost = torch.tensor([[0.4, 0.3, 0.3 + excess]], dtype=torch.float64)
    return modified_reward(
        torch.tensor([reward], dtype=torch.float64),
        cost,
        torch.ones(1, 3),
        torch.tensor([1.0]),
        lam=lam,
        penalty=penalty,
        form=form,
    ).total.item()


def test_overshoot_charges_continuously_at_a_crossing_and_the_exhausted_form_jumps_by_lambda_phi():
    """With R = n = 0, so that the charge is all there is; R and n are jumps of both forms (next test)."""
    step = 1e-9
    below, above = (crossing("overshoot", sign * step, reward=0.0) for sign in (-1, 1))
    assert below == 0.0
    assert above == pytest.approx(0.0, abs=3 * step)
    below, above = (crossing("exhausted", sign * step, reward=0.0) for sign in (-1, 1))
    assert below - above == pytest.approx(2.0 * 0.3, abs=1e-8)


@pytest.mark.parametrize(("form", "phi"), [("exhausted", 0.3), ("overshoot", 0.0)])
def test_task_reward_and_constant_penalty_are_lost_at_a_crossing_in_both_forms(form, phi):
    below, above = (crossing(form, sign * 1e-9, penalty=0.7) for sign in (-1, 1))
    assert below - above == pytest.approx(1.0 + 0.7 + 2.0 * phi, abs=1e-8)


def test_hinge_keeps_the_task_reward_and_is_continuous_at_a_crossing_but_for_the_constant_penalty():
    below, above = (crossing("hinge", sign * 1e-9) for sign in (-1, 1))
    assert below == 1.0
    assert above == pytest.approx(1.0, abs=3e-9)
    assert crossing("hinge", 0.2) == pytest.approx(1.0 - 2.0 * 0.2)
    below, above = (crossing("hinge", sign * 1e-9, penalty=0.7) for sign in (-1, 1))
    assert below - above == pytest.approx(0.7, abs=1e-8)


@pytest.mark.parametrize("cost", [0.3, 1.0, 1.4])
def test_soft_hinge_lies_between_lagrangian_and_hinge_and_its_weight_is_the_slope_of_its_charge(cost):
    def charge(cost, **terms):
        paid = torch.tensor([[cost]], dtype=torch.float64)
        found = modified_reward(torch.zeros(1), paid, torch.ones(1, 1), torch.ones(1), lam=2.0, **terms)
        return -float(found.total), float(found.weight)

    soft = {"form": "soft_hinge", "sharpness": 7.0, "offset": -0.5}
    slope = (charge(cost + 1e-6, **soft)[0] - charge(cost - 1e-6, **soft)[0]) / 2e-6
    assert charge(cost, **soft)[1] == pytest.approx(slope, rel=1e-6)
    assert charge(0.0, **soft)[0] == 0
    flat = charge(cost, form="soft_hinge", sharpness=1e-6, offset=-0.5)[0]
    assert flat == pytest.approx(2.0 / (1 + math.exp(0.5)) * cost, rel=1e-4)
    sharp = charge(cost, form="soft_hinge", sharpness=1e4, offset=0.0)[0]
    assert sharp == pytest.approx(charge(cost, form="hinge")[0], abs=1e-3)


def test_overshoot_and_hinge_charge_the_tokens_that_spent_the_budget_and_exhausted_only_those_after():
    cost, mask = torch.tensor([[0.6, 0.6, 0.6]]), torch.ones(1, 3)
    weights = {
        form: modified_reward(torch.ones(1), cost, mask, torch.tensor([1.0]), lam=2.0, form=form).weight.tolist()
        for form in FORMS
    }
    price = 2.0 / (1 + math.exp(-10.0 * 0.8))
    assert weights.pop("soft_hinge") == [[pytest.approx(price)] * 3]
    assert weights == {
        "exhausted": [[0.0, 2.0, 2.0]],
        "overshoot": [[2.0] * 3],
        "hinge": [[2.0] * 3],
        "lagrangian": [[2.0] * 3],
    }


def test_lagrangian_pays_whatever_the_budget_and_discounts_the_cost():
    cost, mask = torch.tensor([[1.0, 1.0, 1.0]]), torch.ones(1, 3)
    for limit in (0.0, math.inf):
        modified = modified_reward(
            torch.ones(1), cost, mask, torch.tensor([limit]), lam=0.5, form="lagrangian", discount=0.5
        )
        assert modified.reward.tolist() == [[-0.5, -0.25, 0.875]]
        torch.testing.assert_close(modified.weight, 0.5 * discount_factors(mask, 0.5))


def test_per_token_and_total_budgets_give_the_same_reward_where_they_are_the_same_number():
    task, cost, mask = random_batch(3)
    mask[:], cost = 1, cost.nan_to_num(0.5)
    for form in FORMS:
        first, second = (
            modified_reward(task, cost, mask, trajectory_budget(limit, mask, name), lam=1.0, penalty=0.5, form=form)
            for limit, name in ((2.0, "total"), (0.25, "per_token"))
        )
        assert torch.equal(first.reward, second.reward)
        assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_completion_keeps_its_task_reward_at_a_budget_of_nothing(form):
    cost, mask = torch.full((1, 3), math.nan), torch.zeros(1, 3)
    modified = modified_reward(torch.tensor([0.25]), cost, mask, torch.zeros(1), lam=1.0, penalty=1.0, form=form)
    assert modified.reward.tolist() == [[0.25, 0.0, 0.0]]
    assert (modified.weight == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_completion_cut_at_the_limit_is_paid_at_its_last_token(form):
    modified = modified_reward(torch.ones(1), torch.zeros(1, 3), torch.ones(1, 3), torch.ones(1), lam=1.0, form=form)
    assert modified.reward.tolist() == [[0.0, 0.0, 1.0]]


def test_a_completion_without_task_reward_is_still_charged_where_it_violates():
    """NaN says that no reward function scored it: a violator's reward does not depend on that."""
    cost, mask, unscored = torch.ones(2, 2), torch.ones(2, 2), torch.full((2,), math.nan)
    for form in ("exhausted", "overshoot"):
        total = modified_reward(unscored, cost, mask, torch.tensor([0.5, 9.0]), lam=1.0, form=form).total
        assert total[0] < 0
        assert total[1].isnan()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": -1.0}, "0 or more"),
        ({"lam": 1.0, "penalty": -1.0}, "0 or more"),
        ({"lam": math.nan}, "0 or more"),
        ({"lam": 1.0, "form": "cliff"}, "'cliff'"),
        ({"lam": 1.0, "form": "overshoot", "phi": torch.ones(1, 2)}, "no Phi of its own"),
        ({"lam": 1.0, "form": "hinge", "phi": torch.ones(1, 2)}, "no Phi of its own"),
        ({"lam": 1.0, "form": "lagrangian", "phi": torch.ones(1, 2)}, "no Phi of its own"),
    ],
)
def test_what_has_no_meaning_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        modified_reward(torch.ones(1), torch.ones(1, 2), torch.ones(1, 2), torch.ones(1), **options)


# ---- group advantages ----


@given(SEEDS, st.integers(2, 6), st.integers(1, 4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_advantages_sum_to_zero_in_each_group_and_keep_its_order(seed, size, groups, scale):
    returns = torch.randn(size * groups, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    advantages = group_advantages(returns, size, scale).view(groups, size)
    torch.testing.assert_close(advantages.sum(1), torch.zeros(groups, dtype=torch.float64))
    assert torch.equal(advantages.argsort(1), returns.view(groups, size).argsort(1))
    if not scale:
        torch.testing.assert_close(advantages, returns.view(groups, size) - returns.view(groups, size).mean(1, True))


@given(SEEDS, st.floats(-1e6, 1e6))
@settings(max_examples=60, deadline=None)
def test_advantages_do_not_see_what_a_whole_group_shares(seed, shift):
    returns = torch.randn(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    offset = torch.tensor([shift] * 4 + [0.0] * 4, dtype=torch.float64)
    torch.testing.assert_close(group_advantages(returns + offset, 4), group_advantages(returns, 4), rtol=0, atol=1e-8)


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7])
def test_a_group_of_equals_has_no_advantage(scale, value):
    assert group_advantages(torch.full((6,), value), 3, scale).abs().max() < 1e-2 * scale + 1e-6


@pytest.mark.parametrize("form", ["exhausted", "overshoot"])
def test_in_a_group_that_all_violates_the_lesser_violation_has_the_advantage(form):
    cost = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    modified = modified_reward(torch.ones(3), cost, torch.ones(3, 2), torch.zeros(3), lam=1.0, penalty=5.0, form=form)
    torch.testing.assert_close(group_advantages(modified.total, 3), torch.tensor([1.0, 0.0, -1.0]))
    constant = modified_reward(torch.ones(3), cost, torch.ones(3, 2), torch.zeros(3), lam=0.0, penalty=5.0, form=form)
    assert (group_advantages(constant.total, 3) == 0).all()  # the constant penalty alone says nothing here


def test_scaling_divides_by_the_sample_deviation_and_the_floor():
    returns = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    expected = (returns - returns.mean()) / (returns.std() + 1e-4)
    torch.testing.assert_close(group_advantages(returns, 3, True), expected)


@pytest.mark.parametrize("scale", [False, True])
def test_an_unscored_completion_is_left_out_of_its_group(scale):
    advantages = group_advantages(torch.tensor([1.0, math.nan, 3.0, 5.0, 5.0, 7.0]), 3, scale)
    assert advantages[1] == 0.0
    pair = group_advantages(torch.tensor([1.0, 3.0]), 2, scale)
    torch.testing.assert_close(advantages[[0, 2]], pair)
    others = group_advantages(torch.tensor([5.0, 5.0, 7.0]), 3, scale)
    torch.testing.assert_close(advantages[3:], others)


@pytest.mark.parametrize("scale", [False, True])
def test_groups_with_one_score_or_none_have_no_advantage(scale):
    nan = math.nan
    assert group_advantages(torch.tensor([nan, nan, nan, 2.0, nan, nan]), 3, scale).tolist() == [0.0] * 6


@pytest.mark.parametrize("unscored", [[], [1, 5, 6]], ids=["all scored", "some unscored"])
def test_token_advantages_are_the_residual_of_the_return_on_the_state(unscored):
    """A trajectory without a reward is neither in the fit nor in the mean of its group."""
    draw = torch.Generator().manual_seed(0)
    reward, cost = torch.randn(12, 6, generator=draw), torch.rand(12, 6, generator=draw)
    mask = (torch.arange(6) < torch.randint(1, 7, (12, 1), generator=draw)).long()
    budget = torch.full((12,), 1.2)
    unpaid = reward.clone()
    unpaid[unscored, 0] = torch.nan
    advantages = token_advantages(unpaid, cost, mask, budget, 4)
    assert (advantages[mask == 0] == 0).all()
    assert (advantages[unscored] == 0).all()

    reward = reward * mask
    to_go = torch.stack([reward[:, t:].sum(1) for t in range(6)], dim=1)
    so_far = torch.stack([(cost * mask)[:, :t].sum(1) for t in range(6)], dim=1)
    whole = to_go[:, 0].clone()
    whole[unscored] = torch.nan
    group = whole.view(3, 4).nanmean(1).repeat_interleave(4)[:, None].expand(12, 6)
    position = mask.cumsum(1) / 6
    state = [torch.ones(12, 6), position, so_far, (so_far - 1.2).clamp(min=0), (so_far > 1.2).float(), group]
    on = (mask == 1) & ~whole.isnan()[:, None]
    state = np.stack([x[on].double().numpy() for x in state], axis=1)
    target = to_go[on].double().numpy()
    expected = target - state @ np.linalg.lstsq(state, target, rcond=None)[0]
    np.testing.assert_allclose(advantages[on].numpy(), expected, atol=1e-5)


def test_length_normalised_credit_is_the_mean_of_what_comes_after():
    reward = torch.tensor([[1.0, 2.0, 6.0, 9.0], [0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    zero, budget = torch.zeros(2, 4), torch.full((2,), torch.inf)
    together = token_advantages(reward, zero, mask, budget, 2, "length_normalised")
    # the same fit, up to the target: 4 and 6 nats a later token, then nothing; zeros
    target = torch.tensor([4.0, 6.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    position = torch.tensor([1.0, 2, 3, 1, 2, 3, 4]) / 4
    state = torch.stack([torch.ones(7), position], dim=1)
    residual = target - state @ torch.linalg.lstsq(state, target[:, None]).solution[:, 0]
    torch.testing.assert_close(together[mask == 1], residual, atol=1e-5, rtol=1e-5)


def test_token_advantages_leave_out_what_no_reward_could_score():
    reward = torch.tensor([[0.0, torch.nan], [0.0, 1.0]])
    advantages = token_advantages(reward, torch.zeros(2, 2), torch.ones(2, 2), torch.ones(2), 2)
    assert (advantages[0] == 0).all()
    assert advantages.isfinite().all()
    assert (token_advantages(reward, torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(2), 2) == 0).all()
