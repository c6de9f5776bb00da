"""The ceiling of a budget: attained by a tilt, above every policy, and how its estimate errs."""

import numpy as np
import pytest
import torch

from cmdp import ceiling
from cmdp.ceiling import account, bernoulli_kl, price_list, spend, suggest
from cmdp.models import build_model, build_tokenizer
from replication.theory import trees

SIZES = {"seed": 0, "tree": {"vocab": 3, "depth": 3, "sharpness": 1.0, "success": 0.3}}


@pytest.fixture(scope="module")
def forest() -> trees.Trees:
    made = trees.make_trees(SIZES, 12)
    return made._replace(reward=made.reward.index_fill(1, torch.tensor([0]), 1.0))  # something can be bought


def pass_rates(forest: trees.Trees) -> np.ndarray:
    return (trees.sequences(forest, forest.teacher).prob * forest.reward).sum(1).numpy()


@pytest.mark.parametrize(
    ("a", "q", "nats"), [(0.5, 0.5, 0), (1, 0.25, np.log(4)), (0, 0.25, np.log(4 / 3)), (1, 0, np.inf)]
)
def test_the_divergence_of_right_and_wrong(a, q, nats):
    assert bernoulli_kl(a, q) == pytest.approx(nats)


def test_spending_a_budget_inverts_the_divergence():
    q = np.linspace(0.01, 0.99, 50)
    for budget in (0.01, 0.3, 2.0):
        a = spend(budget, q)
        free = -np.log(q) <= budget
        assert (a[free] == 1).all()
        assert bernoulli_kl(a[~free], q[~free]) == pytest.approx(budget)
        assert (a >= q).all()
    assert spend(0.0, q) == pytest.approx(q)
    assert spend([0.5, 0.5], [0.0, 1.0]).tolist() == [0.0, 1.0]  # nothing to buy, nothing to spend on


@pytest.mark.parametrize("lam", [0.05, 0.3, 2.0])
def test_the_soft_optimum_of_a_right_or_wrong_reward_lies_on_the_ceiling(forest, lam):
    """It is the teacher tilted by exp(R / lambda), which attains the bound: no nat is wasted."""
    found = trees.outcome(forest, trees.soft_optimum(forest, lam)[1], 1.0)
    cost, reward = found["cost"].numpy(), found["reward"].numpy()
    assert reward == pytest.approx(spend(cost, pass_rates(forest)), abs=1e-6)
    assert account(reward, pass_rates(forest), cost)["wasted"] == pytest.approx(0, abs=1e-9)


def test_the_budgeted_optimum_and_any_policy_stay_under_the_ceiling(forest):
    q = pass_rates(forest)
    for budget in (0.1, 0.5):
        best = trees.budgeted_values(forest, budget * np.linspace(0, 1, 21) ** 2)[:, 0, -1]
        assert (best <= spend(budget, q) + 1e-9).all()
        assert (best > q).all()
    for seed in range(20):
        noise = torch.randn(forest.teacher.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = trees.outcome(forest, forest.teacher + 0.1 * seed * noise, 1.0)
        assert (found["reward"].numpy() <= spend(found["cost"].numpy(), q) + 1e-9).all()


def test_a_language_model_tilted_by_the_reward_attains_the_ceiling():
    """All completions of two tokens of a small model: KL in nats, and the reward is whether they are alike."""
    tokenizer = build_tokenizer([*"abc"])
    model = build_model(tokenizer, layers=1, hidden=16, heads=2, seed=0).double()
    size, prompt = len(tokenizer), tokenizer("a b", add_special_tokens=False).input_ids
    with torch.no_grad():
        ids = torch.tensor([[*prompt, token] for token in range(size)])
        logps = model(ids).logits[..., :size].log_softmax(-1)
    joint = (logps[0, -2][:, None] + logps[:, -1]).exp().numpy()  # (first token, second token)
    assert joint.sum() == pytest.approx(1)
    right = np.eye(size, dtype=bool)
    q = joint[right].sum()
    for eta in (0.5, 2.0):
        tilted = joint * np.exp(eta * right)
        tilted /= tilted.sum()
        nats = (tilted * np.log(tilted / joint)).sum()
        assert tilted[right].sum() == pytest.approx(spend(nats, q))
        uneven = tilted * (1 + 0.2 * np.arange(size))  # the same nats spent otherwise buy less
        uneven /= uneven.sum()
        assert uneven[right].sum() < spend((uneven * np.log(uneven / joint)).sum(), q)


def test_the_jackknife_takes_out_the_bias_of_sampled_pass_rates():
    source, samples = np.random.default_rng(0), 8
    q = source.uniform(0.2, 0.6, 20_000)
    prices = price_list(source.binomial(samples, q), samples, budgets=(0.1, 0.3)).set_index("budget")
    for budget in (0.1, 0.3):
        exact, row = spend(budget, q).mean(), prices.loc[budget]
        assert exact - row["plug_in"] > 0.01  # too low: a(d; q) is concave in q
        assert abs(exact - row["ceiling"]) < (exact - row["plug_in"]) / 2
        assert row["low"] < row["ceiling"] < row["high"]
    assert prices.loc[0.0, "ceiling"] == pytest.approx(q.mean(), abs=0.01)


def test_the_interval_covers_the_ceiling_as_often_as_it_says():
    source, inside = np.random.default_rng(1), 0
    population = spend(0.3, source.beta(4, 4, 200_000)).mean()
    for seed in range(100):
        right = source.binomial(32, source.beta(4, 4, 100))
        row = price_list(right, 32, budgets=(0.3,), seed=seed).iloc[-1]
        inside += row["low"] <= population <= row["high"]
    assert 88 <= inside <= 100


def test_one_sample_is_too_few():
    with pytest.raises(ValueError, match="two samples per prompt or more"):
        price_list(np.array([0, 1]), 1)


def test_the_suggested_budget_is_the_smallest_that_buys_most_of_what_can_be_bought():
    prices = price_list(np.array([2, 3, 4, 5]), 8)
    budget = suggest(prices)
    gained = prices.set_index("budget")["ceiling"] - prices["ceiling"].iloc[0]
    assert gained[budget] >= ceiling.BOUGHT * gained.iloc[-1]
    assert (gained[gained.index < budget] < ceiling.BOUGHT * gained.iloc[-1]).all()


def test_an_account_of_sampled_rates_has_a_lower_end():
    source = np.random.default_rng(2)
    a, q = source.binomial(4, 0.6, 500) / 4, source.binomial(4, 0.4, 500).clip(1, 3) / 4
    found = account(a, q, np.full(500, 0.5))
    assert found["cost"] == pytest.approx(0.5)
    assert found["useful"] + found["wasted"] == pytest.approx(0.5)
    assert found["useful_at_least"] < bernoulli_kl(0.6, 0.4) * 1.3 < found["useful"]
