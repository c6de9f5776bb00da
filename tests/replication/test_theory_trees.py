"""Token trees: exact values, the budgeted optimum, the guarantees of section 4, the learners' gradients."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cmdp.divergence import divergence_from_logits
from cmdp.reward import trajectory_budget
from replication.theory import FORMS, LEARNERS
from replication.theory.guarantees import two_tokens, without_budget
from replication.theory.learners import learn, see_budget
from replication.theory.trees import (
    Trees,
    budgeted_policy,
    budgeted_values,
    enumerate_paths,
    generator,
    make_trees,
    modified_objective,
    outcome,
    outcomes,
    over_budget,
    sequences,
    soft_optimum,
    tilt,
)

SEEDS = st.integers(0, 2**31 - 1)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(seed, number=3, vocab=3, depth=3, eos=True):
    parameters = {"seed": seed, "tree": {"sharpness": 1.0, "success": 0.4}}
    trees = make_trees(parameters, number, 0, (vocab, depth, eos))
    return trees, trees.teacher + torch.randn(
        trees.teacher.shape, generator=generator(parameters, 1), dtype=torch.float64
    )


def pick(trees, row):
    return Trees(trees.paths, trees.teacher[[row]], trees.reward[[row]])


def full(value, number):
    return torch.full((number,), value, dtype=torch.float64)


def quadratic(limit, levels):
    return limit * np.linspace(0, 1, levels) ** 2


# ------------------------------------------------------------------------------------------------ enumeration


@pytest.mark.parametrize("eos", [True, False])
def test_paths_are_every_sequence_once(eos):
    vocab, depth = 3, 3
    paths = enumerate_paths(vocab, depth, eos)
    written = {tuple(a[m == 1].tolist()) for a, m in zip(paths.action, paths.mask, strict=True)}
    expected = set()
    for word in itertools.product(range(vocab), repeat=depth):
        end = word.index(vocab - 1) + 1 if eos and vocab - 1 in word else depth
        expected.add(word[:end])
    assert len(paths.action) == len(written)
    assert written == expected
    for row, (state, action, mask) in enumerate(zip(paths.state, paths.action, paths.mask, strict=True)):
        here = 0
        for t in range(int(mask.sum())):
            assert state[t] == here
            assert paths.depth[here] == t
            here = int(paths.child[here, action[t]])
        assert here == -1 - row


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_exact_values_agree_with_a_walk_down_the_tree(seed):
    trees, logits = make(seed, number=1)
    found = outcome(trees, logits, 0.4)
    policy = logits.softmax(-1)[0]
    cost = divergence_from_logits(logits, trees.teacher)[0]
    reward = violation = mean = probability = 0.0
    todo = [(0, 1.0, 0.0)]
    while todo:
        state, reach, spent = todo.pop()
        spent += float(cost[state])
        for token, child in enumerate(trees.paths.child[state].tolist()):
            mass = reach * float(policy[state, token])
            if child >= 0:
                todo.append((child, mass, spent))
                continue
            probability += mass
            reward += mass * float(trees.reward[0, -1 - child])
            violation += mass * (spent > 0.4)
            mean += mass * spent
    assert probability == pytest.approx(1)
    assert [float(found[k]) for k in ("reward", "violation", "cost")] == pytest.approx([reward, violation, mean])
    assert float(modified_objective(trees, logits, math.inf, "exhausted", lam=0.0)[0]) == pytest.approx(reward)


# -------------------------------------------------------------------------------------- section 5: the optimum


@given(SEEDS, st.floats(1e-4, 3.0))
@settings(max_examples=30, deadline=None)
def test_tilt_brackets_the_best_policy_in_a_kl_ball(seed, kappa):
    rng = np.random.default_rng(seed)
    teacher, values = rng.dirichlet(np.ones(3)), rng.random(3) * rng.choice([1.0, 1e-6])
    policy, lower, upper = (x[..., 0] for x in tilt(teacher[:, None], values[:, None], np.array([kappa])))
    kl = (policy * np.log(np.where(policy > 0, policy, 1) / teacher)).sum()
    assert kl <= kappa + 1e-9
    assert policy.sum() == pytest.approx(1)
    assert policy @ values == pytest.approx(lower)
    assert lower <= upper + 1e-12
    assert upper - lower <= 1e-6 * np.ptp(values) + 1e-12
    other = rng.dirichlet(np.ones(3), size=2000)  # no policy in the ball does better
    inside = (other * np.log(other / teacher)).sum(1) <= kappa
    assert (other[inside] @ values).max(initial=0.0) <= upper + 1e-12


@given(SEEDS, st.sampled_from([0.05, 0.2, 0.6]), st.booleans())
@settings(max_examples=6, deadline=None)
def test_the_budgeted_policy_attains_its_value_and_never_violates(seed, budget, eos):
    trees, _ = make(seed, eos=eos)
    grid = quadratic(budget, 31)
    lower, upper = budgeted_values(trees, grid), budgeted_values(trees, grid, "upper")
    assert (lower <= upper + 1e-12).all()
    assert (np.diff(lower, axis=-1) >= -1e-12).all()
    for level in (0, 12, 30):
        logits, _ = budgeted_policy(trees, grid, lower, level)
        found = outcome(trees, logits, grid[level])
        np.testing.assert_allclose(found["reward"], lower[:, 0, level], atol=1e-9)
        assert found["violation"].max() == 0
        assert (found["worst"] <= grid[level] + 1e-9).all()
    teacher = outcome(trees, trees.teacher, 0.0)["reward"]
    np.testing.assert_allclose(lower[:, 0, 0], teacher)  # no budget: the teacher


def test_the_bracket_closes_as_the_grid_is_refined():
    trees, _ = make(0)
    brackets = []
    for levels in (11, 21, 41, 81):
        grid = quadratic(0.3, levels)
        brackets.append([budgeted_values(trees, grid, b)[:, 0, -1] for b in ("lower", "upper")])
    gaps = [upper - lower for lower, upper in brackets]
    for coarse, fine in itertools.pairwise(gaps):
        assert (fine < 0.7 * coarse).all()
    for coarse, fine in itertools.combinations(brackets, 2):  # every lower end is below every upper end
        assert (coarse[0] <= fine[1]).all()
        assert (fine[0] <= coarse[1]).all()


@given(SEEDS, st.floats(0.05, 5.0))
@settings(max_examples=10, deadline=None)
def test_the_soft_optimum_attains_its_value_and_no_policy_beats_it(seed, lam):
    trees, logits = make(seed)

    def value(policy):
        found = outcome(trees, policy, 1.0)
        return found["reward"] - lam * found["cost"]

    values, optimum = soft_optimum(trees, lam)
    best = values[:, 0]
    torch.testing.assert_close(value(optimum), best)
    each = [soft_optimum(pick(trees, row), lam)[1][0] for row in range(3)]
    torch.testing.assert_close(soft_optimum(trees, full(lam, 3))[1], torch.stack(each))
    for policy in (logits, trees.teacher, 0.5 * (logits + optimum)):
        assert (value(policy) <= best + 1e-12).all()


def test_nothing_beats_the_budgeted_optimum_by_random_search():
    trees, _ = make(1, number=1, vocab=2, depth=2, eos=False)
    upper = budgeted_values(trees, quadratic(0.2, 41), "upper")[0, 0, -1]
    lower = budgeted_values(trees, quadratic(0.2, 41))[0, 0, -1]
    source = torch.Generator().manual_seed(0)
    policies = trees.teacher + torch.randn(1, 20000, 3, 2, generator=source, dtype=torch.float64)
    found = outcomes(trees, policies, 0.2)
    best = found["reward"][found["violation"] == 0].max()
    assert lower - 0.05 < best <= upper


# --------------------------------------------------------------------------------------- section 4: guarantees


@given(SEEDS)
@settings(max_examples=6, deadline=None)
def test_a_the_maximiser_among_all_policies_never_violates_at_any_penalty(seed):
    """Stronger than the bound: from the state that would exceed the budget on, the teacher is always available."""
    trees, _ = make(seed, number=1, vocab=2, depth=2, eos=False)
    grid = np.arange(1, 16) / 16
    teacher = grid[np.random.default_rng(seed).integers(15, size=3)]
    trees = trees._replace(teacher=torch.from_numpy(np.log(np.stack([teacher, 1 - teacher], -1)))[None])
    every = np.array(list(itertools.product(grid, repeat=3)))
    many, policies = trees.repeat(len(every)), torch.from_numpy(np.log(np.stack([every, 1 - every], -1)))
    found = outcome(many, policies, 0.15)
    violation = found["violation"]
    feasible = found["within"][violation == 0].max()
    for strengths in ({"penalty": 0.01, "lam": 0.0}, {"penalty": 0.0, "lam": 0.01}, {"penalty": 9.0, "lam": 3.0}):
        for form in ("exhausted", "overshoot"):
            value, _ = modified_objective(many, policies, 0.15, form, **strengths)
            assert violation[value.argmax()] == 0
            torch.testing.assert_close(value.max(), feasible)


@given(SEEDS, st.floats(0.05, 0.5), st.floats(0.0, 50.0), st.floats(0.0, 3.0))
@settings(max_examples=20, deadline=None)
def test_a_the_bound_holds_in_any_class_that_contains_a_feasible_policy(seed, budget, n, lam):
    trees, logits = make(seed)
    lines = torch.linspace(0, 1, 60, dtype=torch.float64)[:, None, None, None]
    policies = torch.lerp(trees.teacher, logits, lines).transpose(0, 1).flatten(0, 1)  # teacher first
    many = trees.repeat(60)
    found = outcome(many, policies, budget)
    value = modified_objective(many, policies, budget, "exhausted", lam=lam, penalty=n)[0].view(3, 60)
    within, p = found["within"].view(3, 60), found["violation"].view(3, 60)
    for row, best in enumerate(value.argmax(1)):
        feasible = within[row][p[row] == 0].max()
        assert p[row, best] <= (1 - feasible) / (1 + n) + 1e-9
        assert within[row, best] >= feasible + n * p[row, best] - 1e-9


def test_a_the_bound_is_tight_for_a_budget_per_token():
    """Whether the root has overspent is known only once it is known how many tokens there are."""
    found = two_tokens(0.1, 20000)
    within, violation = found["within"][0], found["violation"][0]
    feasible = within[violation == 0].max()
    assert violation[within.argmax()] > 0.19  # at n = 0 the maximiser violates
    n = 0.0
    while violation[(within - n * violation).argmax()] > 0:
        kept = violation[(within - n * violation).argmax()], (1 - feasible) / (1 + n)
        assert kept[0] <= kept[1]
        n += 0.001
    assert kept[0] / kept[1] > 0.998
    assert n == pytest.approx(0.438, abs=0.01)
    # the tree's budgets are the package's own
    mask = enumerate_paths(2, 2).mask
    torch.testing.assert_close(trajectory_budget(0.1, mask, "per_token").double(), 0.1 * mask.sum(1).double())


def test_b_a_policy_that_does_not_see_z_earns_as_much():
    trees, _ = make(3, number=2, vocab=2, depth=3, eos=False)
    grid = quadratic(0.2, 121)
    lower, upper = (budgeted_values(trees, grid, b)[:, 0, -1] for b in ("lower", "upper"))
    for row in range(2):
        unaware = without_budget(pick(trees, row), 0.2, 3, np.random.default_rng(row))
        assert lower[row] - 1e-4 <= unaware <= upper[row] + 1e-6


@given(SEEDS, st.sampled_from(FORMS), st.floats(0.1, 5.0), st.floats(0.0, 2.0))
@settings(max_examples=20, deadline=None)
def test_c_the_gradient_away_from_crossings(seed, form, lam, n):
    trees, logits = make(seed)
    budget, step = 0.4, 1e-6
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ahead, behind = logits + step * direction, logits - step * direction
    calm = (over_budget(trees, ahead, budget) == over_budget(trees, behind, budget)).flatten(1).all(1)
    formula = (modified_objective(trees, logits, budget, form, lam=lam, penalty=n)[1] * direction).sum((1, 2))
    value = [modified_objective(trees, x, budget, form, lam=lam, penalty=n)[0] for x in (ahead, behind)]
    torch.testing.assert_close(formula[calm], ((value[0] - value[1]) / (2 * step))[calm], rtol=1e-5, atol=1e-7)


def test_c_what_jumps_at_a_crossing_and_what_does_not():
    """One token, two of them, teacher uniform: the budget is crossed where KL(x) = d, and R = 1 is forfeited there."""
    paths = enumerate_paths(2, 1, eos=False)
    trees = Trees(paths, torch.full((2, 1, 2), 0.5).double().log(), torch.tensor([[1.0, 0.0]] * 2).double())
    low, high, d = 0.5, 1.0, 0.1
    for _ in range(60):
        x = (low + high) / 2
        kl = math.log(2) + x * math.log(x) + (1 - x) * math.log(1 - x)
        low, high = (x, high) if kl < d else (low, x)
    x = torch.tensor([low - 1e-9, low + 1e-9], dtype=torch.float64)
    policies = torch.stack([x, 1 - x], -1).log()[:, None]

    def across(form):
        value, _ = modified_objective(trees, policies, d, form, lam=2.0)
        return float(value[1] - value[0])

    assert across("exhausted") == pytest.approx(-low - 2.0 * d, abs=1e-6)  # R, and lam Phi of the whole step
    assert across("overshoot") == pytest.approx(-low, abs=1e-6)  # its penalty does not jump, its R does
    assert across("hinge") == pytest.approx(0, abs=1e-6)
    for form in FORMS:  # and none of the formulas sees any of it
        _, slope = modified_objective(trees, policies, d, form, lam=2.0)
        assert slope.abs().max() < 3


def test_d_meeting_the_budget_on_average_lets_many_trajectories_violate_it():
    trees, _ = make(5, number=20, depth=4)
    shares = []
    for row in range(20):
        tree, low, high = pick(trees, row), 1e-2, 1e2
        for _ in range(40):
            lam = math.sqrt(low * high)
            cost = float(outcome(tree, soft_optimum(tree, lam)[1], 0.2)["cost"])
            low, high = (lam, high) if cost > 0.2 else (low, lam)
        found = outcome(tree, soft_optimum(tree, high)[1], 0.2)
        assert float(found["cost"]) <= 0.2
        shares.append(float(found["violation"]))
    assert max(shares) > 0.5
    assert np.median(shares) > 0.2


# --------------------------------------------------------------------------------------------- the exact penalty


@given(SEEDS)
@settings(max_examples=4, deadline=None)
def test_the_hinge_is_an_exact_penalty_from_the_greatest_price_on(seed):
    trees, _ = make(seed, vocab=2, depth=3, eos=False)
    grid = quadratic(0.2, 41)
    values = budgeted_values(trees, grid)
    best, (_, price) = values[:, 0, -1], budgeted_policy(trees, grid, values, 40)
    earned = np.stack([budgeted_values(trees, grid, price=p)[:, 0, -1] for p in (0.05, 0.5, 5.0, 500.0)])
    assert (np.diff(earned, axis=0) <= 1e-12).all()
    assert (earned >= best - 1e-12).all()
    for row in range(3):  # a little more than the greatest price is enough, half of the root's is too little
        finite = price[row][np.isfinite(price[row])]
        above = budgeted_values(trees, grid, price=1.05 * finite.max() + 1e-9)[row, 0, -1]
        assert above - best[row] < 2e-3
        if 1e-2 < price[row, 0] < np.inf and best[row] < 0.95:
            below = budgeted_values(trees, grid, price=price[row, 0] / 2)[row, 0, -1]
            assert below > best[row] + 1e-5


def test_the_price_is_the_slope_of_the_optimum_and_a_martingale():
    """What a nat more would earn at a state is the mean, over the student's tokens, of what it earns after them."""
    trees, _ = make(2, number=24, vocab=2, depth=2, eos=False)
    grid = quadratic(0.3, 401)
    values = budgeted_values(trees, grid)
    logits, price = budgeted_policy(trees, grid, values, 400)
    slope = (values[:, 0, 400] - values[:, 0, 398]) / (grid[400] - grid[398])
    after = (logits.exp()[:, 0].numpy() * np.where(np.isfinite(price), price, np.nan)[:, 1:]).sum(1)
    # not where the grid resolves no price, or where all that follows a token earns the same: it has no price
    rich = np.isfinite(after) & np.isfinite(price[:, 0]) & (slope > 0.05) & (price > 0).all(1)
    assert rich.sum() >= 3
    np.testing.assert_allclose(price[rich, 0], slope[rich], rtol=0.05)
    np.testing.assert_allclose(after[rich], price[rich, 0], rtol=0.15)


# ------------------------------------------------------------------------------------------------- the learners

STEPS = {"steps": 1, "margin": 0.03, "bins": 5}


@pytest.mark.parametrize(
    ("method", "form"), [("cmdp", "exhausted"), ("cmdp-overshoot", "overshoot"), ("cmdp-hinge", "hinge")]
)
@pytest.mark.parametrize("samples", [0, 4000])
def test_a_learner_climbs_the_gradient_of_its_objective(method, form, samples):
    """Adam's first step is the sign of the gradient: that of section 4 (c), where that is not small."""
    trees, start = make(0)
    budget = full(0.4, 3)
    source = torch.Generator().manual_seed(0)
    end = learn(trees, start, budget, method, full(2.0, 3), full(0.01, 3), samples=samples, generator=source, **STEPS)
    _, gradient = modified_objective(trees, start, 0.4, form, lam=2.0)
    clear = gradient.abs() > (0.03 if samples else 1e-6)
    assert clear.sum() > 15
    assert ((end - start).sign() == gradient.sign())[clear].all()


@pytest.mark.parametrize("method", LEARNERS)
@pytest.mark.parametrize("samples", [0, 8])
def test_every_method_trains_and_repeats_itself(method, samples):
    trees, start = make(0)

    def train():
        source = torch.Generator().manual_seed(1)
        settings = {"steps": 20, "samples": samples, "margin": 0.03, "bins": 5, "generator": source}
        return learn(trees, start, full(0.3, 3), method, full(1.0, 3), full(0.1, 3), **settings)

    end = train()
    assert end.isfinite().all()
    assert (end - start).abs().max() > 0.1
    assert torch.equal(end, train())


def test_a_row_trains_as_it_would_alone():
    trees, start = make(0)
    strength, rate = torch.tensor([0.5, 1.0, 2.0]).double(), torch.tensor([0.05, 0.1, 0.2]).double()
    settings = {"steps": 15, "samples": 0, "margin": 0.03, "bins": 5, "generator": torch.Generator()}
    together = learn(trees, start, full(0.3, 3), "cmdp-overshoot", strength, rate, **settings)
    for row in range(3):
        alone = learn(
            pick(trees, row), start[[row]], full(0.3, 1), "cmdp-overshoot", strength[[row]], rate[[row]], **settings
        )
        torch.testing.assert_close(alone[0], together[row])


def test_unknown_methods_are_refused():
    trees, start = make(0)
    with pytest.raises(ValueError, match="A learner is one of"):
        learn(trees, start, full(0.3, 3), "sac", full(1.0, 3), full(0.1, 3), samples=0, generator=None, **STEPS)


def test_a_student_that_sees_its_budget_reads_the_bin_that_its_costs_lead_to():
    trees, start = make(0, number=1)
    bins, budget = 4, full(0.5, 1)
    table = start[:, :, None] + torch.randn(1, start.shape[1], bins, start.shape[2]).double()
    policy = see_budget(trees, table, budget)
    cost = sequences(trees, policy).cost[0]
    for row in range(len(cost)):
        left = 0.5
        for t in range(int(trees.paths.mask[row].sum())):
            state = int(trees.paths.state[row, t])
            expected = 0 if left < 0 else 1 + min(int(left / 0.5 * (bins - 1)), bins - 2)
            assert torch.equal(policy[0, state], table[0, state, expected])
            left -= float(cost[row, t])


def test_learners_find_what_theory_says_they_must():
    """gkd ends at the teacher, gkd-grpo at the soft optimum, the hinge with a margin beside the budgeted optimum."""
    trees, start = make(4, number=6)
    settings = {"steps": 400, "samples": 0, "margin": 0.03, "bins": 5, "generator": torch.Generator()}

    def train(method, strength):
        logits = learn(trees, start, full(0.2, 6), method, full(strength, 6), full(0.1, 6), **settings)
        return outcome(trees, logits, 0.2)

    assert train("gkd", 0.0)["cost"].max() < 1e-3
    soft = train("gkd-grpo", 1.0)
    torch.testing.assert_close(soft["reward"] - soft["cost"], soft_optimum(trees, 1.0)[0][:, 0], rtol=0, atol=2e-3)
    best = budgeted_values(trees, quadratic(0.2, 61))[:, 0, -1]
    ours = train("cmdp-hinge-margin", 20.0)
    assert ours["violation"].max() < 0.01
    assert float(ours["reward"].sum()) > 0.97 * best.sum()
