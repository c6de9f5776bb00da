"""What a budget can buy on chains of slips, against brute force and exact token trees."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cmdp.ceiling import bernoulli_kl, spend
from cmdp.storage import read_yaml
from replication import ceiling
from replication.theory import trees

ROOT = Path(__file__).parents[2]
GRID = np.linspace(0.001, 0.999, 999)
P = np.array([[0.5, 0.8, 1.0], [0.3, 0.6, 0.9], [0.85, 0.85, 1.0], [0.7, 1.0, 1.0]])


def chain(p: np.ndarray) -> trees.Trees:
    """Chains of two steps as token trees: token 0 is the right step, and only two right steps are rewarded."""
    paths = trees.enumerate_paths(2, 2, eos=False)
    teacher = torch.empty(len(p), len(paths.child), 2, dtype=torch.float64)
    teacher[:] = torch.tensor([0.4, 0.6]).log()  # after a slip, what comes is of no matter
    first, after = 0, int(paths.child[0, 0])
    for step, state in enumerate((first, after)):
        teacher[:, state] = torch.from_numpy(np.log(np.stack([p[:, step], 1 - p[:, step]], axis=1)))
    reward = torch.zeros(len(p), len(paths.state), dtype=torch.float64)
    reward[:, -1 - int(paths.child[after, 0])] = 1.0
    return trees.Trees(paths, teacher, reward)


@pytest.mark.parametrize("budget", [0.05, 0.3, 0.8])
def test_the_budgeted_optimum_is_that_of_brute_force(budget):
    p = P[:2, :2]
    a = ceiling.budgeted_optimum(p, budget)
    for own, (first, second) in zip(a, p, strict=True):
        cost = bernoulli_kl(GRID[:, None], first) + bernoulli_kl(GRID[None], second)
        best = np.where(cost <= budget, GRID[:, None] * GRID[None], 0).max()
        assert own.prod() == pytest.approx(best, abs=2e-3)
        assert own.prod() >= best - 1e-9
    assert bernoulli_kl(a, p).sum(axis=1) == pytest.approx(budget, abs=1e-6)


def test_the_budgeted_optimum_is_that_of_dynamic_programming_on_the_token_tree():
    p, budget = P[:2, :2], 0.3
    grid = budget * np.linspace(0, 1, 161) ** 2
    lower, upper = (trees.budgeted_values(chain(p), grid, bound)[:, 0, -1] for bound in ("lower", "upper"))
    right = ceiling.budgeted_optimum(p, budget).prod(axis=1)
    assert (lower <= right + 1e-9).all()
    assert (right <= upper + 1e-9).all()
    assert (upper - lower < 0.01).all()


@pytest.mark.parametrize("lam", [0.1, 0.5, 2.0])
def test_soft_optimum_and_outcome_are_those_of_the_token_tree(lam):
    p, budget = P[:2, :2], 0.3
    tree = chain(p)
    found = trees.outcome(tree, trees.soft_optimum(tree, lam)[1], budget)
    a = ceiling.soft_optimum(p, lam)
    own = ceiling.outcome(a, p, budget)
    assert a.prod(axis=1) == pytest.approx(found["reward"].numpy())
    assert own.accuracy == pytest.approx(found["reward"].mean().item())
    assert own.cost == pytest.approx(found["cost"].mean().item())
    assert own.csr == pytest.approx(1 - found["violation"].mean().item())


def test_missing_steps_cost_nothing_and_change_nothing():
    wide = np.concatenate([P[2:3, :2], np.ones((1, 2))], axis=1)
    for optimum, strength in ((ceiling.soft_optimum, 0.5), (ceiling.budgeted_optimum, 0.3)):
        narrow = optimum(P[2:3, :2], strength)
        assert optimum(wide, strength) == pytest.approx(np.concatenate([narrow, np.ones((1, 2))], axis=1))
    assert ceiling.by_design([0.5, 0.2], [1, 2]).tolist() == [[0.5, 1.0], [0.5, 0.5], [0.8, 1.0], [0.8, 0.8]]


def test_no_policy_on_chains_beats_the_ceiling_and_the_budgeted_one_keeps_its_budget():
    for budget in (0.05, 0.3, 1.2):
        a = ceiling.budgeted_optimum(P, budget)
        assert (a.prod(axis=1) <= spend(budget, P.prod(axis=1)) + 1e-9).all()
        assert ceiling.outcome(a, P, budget).csr == 1
    soft = ceiling.soft_optimum(P, 0.4)  # a reward of 0 or 1: the tilt that attains kl(a || q)
    cost = [ceiling.outcome(soft[[row]], P[[row]], 1.0).cost for row in range(len(P))]
    assert bernoulli_kl(soft.prod(axis=1), P.prod(axis=1)) == pytest.approx(cost)
    assert ceiling.outcome(ceiling.budgeted_optimum(P, 9.0), P, 9.0).accuracy == 1  # every prompt is free


def test_a_contest_needs_prompts_that_differ_and_a_teacher_that_slips():
    task = read_yaml(ROOT / "params.yaml")["task"]
    slips, steps = task["slips"].values(), task["steps"]
    p = ceiling.by_design(slips, steps)
    assert p.shape == (len(slips) * len(steps), max(steps))
    table = ceiling.contests(p, slips, steps).set_index(["experiment", "budget"])
    pd.testing.assert_frame_equal(table.loc["measured"], table.loc["design"])
    gaps = table["gap"].xs(0.5, level="budget")
    assert 0.06 < gaps["design"] < 0.08
    assert gaps["one kind of prompt"] < 0.01
    assert abs(gaps["careful"]) < 1e-9
    assert (table["budgeted"] <= table["ceiling"] + 1e-9).all()
    assert (table["teacher"] <= table["soft"]).all()


def test_prices_rise_with_the_budget_and_lie_within_their_intervals():
    found = ceiling.prices(np.repeat(P, 5, axis=0))
    assert list(found) == ["budget", "ceiling", "low", "high", "budgeted", "soft", "soft_lambda"]
    for name in ("ceiling", "budgeted", "soft"):
        assert (found[name].diff().dropna() >= -1e-9).all(), name
    assert ((found["low"] <= found["ceiling"]) & (found["ceiling"] <= found["high"])).all()
    q = np.repeat(P, 5, axis=0).prod(axis=1)
    assert found["ceiling"].to_numpy() == pytest.approx([spend(budget, q).mean() for budget in found["budget"]])


@pytest.mark.parametrize("cost", [0.02, 0.2, 0.6])
def test_the_ceiling_at_a_mean_cost_deals_the_nats_out_as_brute_force_does(cost):
    q = np.array([0.2, 0.6])
    a = np.linspace(0, 1, 2001)
    spent = (bernoulli_kl(a[:, None], q[0]) + bernoulli_kl(a[None], q[1])) / 2
    best = np.where(spent <= cost, (a[:, None] + a[None]) / 2, 0).max()
    found = ceiling.at_mean_cost(q, cost)
    assert best - 1e-9 <= found <= best + 1e-3
    assert found >= spend(cost, q).mean() - 1e-9  # as many nats for each prompt is one way to deal them


def test_the_ceiling_at_a_mean_cost_at_its_ends():
    q = np.array([0.0, 0.3, 1.0])
    assert ceiling.at_mean_cost(q, 0.0) == pytest.approx(q.mean())
    assert ceiling.at_mean_cost(q, 100.0) == pytest.approx(2 / 3)  # what the teacher never does cannot be bought


def sampled(run: str, right: list[float], cost: list[float]) -> pd.DataFrame:
    """Two seeds of one sample per prompt."""
    rows = [(run, seed, prompt, right[prompt], cost[prompt], 5) for seed in (0, 1) for prompt in range(len(right))]
    frame = pd.DataFrame(rows, columns=["run", "seed", "prompt", "right", "cost", "tokens"])
    return frame.assign(correct=0)


def test_an_account_says_what_the_nats_bought():
    q, a = np.array([0.2, 0.6]), np.array([0.5, 0.7])
    useful = bernoulli_kl(a, q)
    table = pd.concat([sampled("teacher", [*q], [0.0, 0.0]), sampled("own", [*a], [*(useful + 0.1)])])
    found = ceiling.accounts(table, {"own": 0.25, "teacher": 0.5}).set_index("run")
    assert list(found.columns) == [
        *("budget", "accuracy", "low", "high", "cost", "ceiling", "share", "useful", "wasted", "csr", "seeds")
    ]
    own = found.loc["own"]
    assert own["accuracy"] == pytest.approx(0.6)
    assert own["useful"] == pytest.approx(useful.mean())
    assert own["wasted"] == pytest.approx(0.1)
    assert own["ceiling"] == pytest.approx(ceiling.at_mean_cost(q, useful.mean() + 0.1))
    assert own["share"] == pytest.approx(0.6 / own["ceiling"])
    assert (own["csr"], own["budget"], own["seeds"]) == ((useful + 0.1 <= 0.25).mean(), 0.25, 2)
    assert found.loc["teacher", ["accuracy", "ceiling", "share", "useful", "wasted"]].tolist() == pytest.approx(
        [0.4, 0.4, 1.0, 0.0, 0.0]
    )


def test_nats_are_useful_by_seed():
    """Of two seeds that differ, the nats of the better count; those of the worse bought nothing."""
    table = pd.concat([sampled("teacher", [0.5], [0.0]), sampled("own", [0.5], [0.2])])
    table.loc[table["run"] == "own", "right"] = [0.3, 0.7]
    found = ceiling.accounts(table, {"own": 0.5}).iloc[0]
    assert found["useful"] == pytest.approx(bernoulli_kl(0.7, 0.5) / 2)


def test_the_measured_teacher_is_read_from_its_run():
    exact = pd.DataFrame({"run": ["teacher", "teacher", "sft"], "step_1": [0.5, 0.6, 0.1], "step_2": [0.4, None, 0.1]})
    assert ceiling.measured(exact).tolist() == [[0.5, 0.4], [0.6, 1.0]]
