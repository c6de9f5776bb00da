"""Intervals cover what they should, pairs are paired, and budgets are read as they are stated."""

import numpy as np
import pandas as pd
import pytest

from cmdp.statistics import bootstrap, cells, interval, summarise, with_budget


def completions() -> pd.DataFrame:
    rows = [
        {"run": run, "seed": seed, "prompt": prompt, "decoding": decoding, "correct": (prompt + seed) % 2, "valid": 0}
        | {"tokens": 4 + prompt, "truncated": 0, "entropy": 0.5, "cost": prompt + scale * sample, "peak": 1.0}
        for run, scale in (("a", 0.0), ("b", 1.0))
        for seed in (0, 1)
        for prompt in range(3)
        for sample, decoding in ((0, "sampled"), (1, "sampled"), (0, "greedy"))
    ]
    return pd.DataFrame(rows)


def test_a_total_budget_compares_costs_and_a_per_token_budget_means():
    table = completions()
    total = with_budget(table, 1.0)
    assert total["satisfied"].tolist() == (table["cost"] <= 1.0).astype(int).tolist()
    per_token = with_budget(table, 0.2, "per_token")
    assert per_token["satisfied"].tolist() == (table["cost"] / table["tokens"] <= 0.2).astype(int).tolist()
    assert (total["correct_within"] == total["correct"] * total["satisfied"]).all()


def test_cells_are_means_over_the_samples_of_a_prompt():
    table = completions()
    sampled = table[(table["run"] == "b") & (table["decoding"] == "sampled")]
    assert cells(sampled, "cost").tolist() == [[0.5, 1.5, 2.5]] * 2


def test_the_interval_of_a_mean_covers_it_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        values = rng.normal(size=(12, 1)) + rng.normal(size=(12, 40))  # seeds differ, and so do prompts
        _, low, high = interval(values, seed=trial)
        hits += low <= 0 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_without_variation_the_interval_is_the_mean():
    assert interval(np.full((3, 5), 0.25)) == pytest.approx((0.25, 0.25, 0.25))


def test_differences_are_paired_over_seeds_and_prompts():
    rng = np.random.default_rng(1)
    hard = rng.uniform(size=(3, 30))
    difference = bootstrap(hard + 0.1, seed=5) - bootstrap(hard, seed=5)
    assert difference == pytest.approx(np.full(2000, 0.1))


def test_the_summary_has_every_measure_of_every_run():
    summary = summarise(completions(), 1.0)
    assert summary.groupby("run", sort=False)["measure"].nunique().to_dict() == {"a": 10, "b": 10}
    table = summary.set_index(["run", "measure"])
    assert table.loc[("a", "csr"), "mean"] == pytest.approx(2 / 3)
    assert table.loc[("b", "csr"), "mean"] == pytest.approx(1 / 2)
    assert table.loc[("a", "greedy_accuracy"), "mean"] == pytest.approx(0.5)
    assert (summary["low"] <= summary["mean"]).all()
    assert (summary["mean"] <= summary["high"]).all()
    assert (summary["seeds"] == 2).all()


def test_without_greedy_completions_there_is_no_greedy_accuracy():
    table = completions()
    summary = summarise(table[table["decoding"] == "sampled"], 1.0)
    assert "greedy_accuracy" not in set(summary["measure"])
    assert summary.groupby("run", sort=False)["measure"].nunique().to_dict() == {"a": 9, "b": 9}
