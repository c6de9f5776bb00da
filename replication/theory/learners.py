"""Every method as a policy gradient on token trees (method, sections 6 and 7), to be judged by the exact optimum.

Reward and advantage are those of `cmdp.reward`; optimiser, start and number of steps are the same for all methods. A
row is one student on one tree: rows differ in budget, strength and learning rate, so that a whole sweep trains at once.
"""

import torch
from torch import Tensor

from cmdp.divergence import divergence_from_logits, sampled_divergence
from cmdp.reward import cumulative_cost, group_advantages, modified_reward
from replication.theory import LEARNERS
from replication.theory.trees import Trees, sequences


def signal(
    method: str, reward: Tensor, cost: Tensor, mask: Tensor, budget: Tensor, strength: Tensor
) -> tuple[Tensor, Tensor]:
    """The returns of the policy gradient, (B,) for the whole sequence or (B, T) per token, and the weight with which
    each step's divergence is descended, (B, T), from R, (B,), cost and mask, (B, T), budget and strength, (B,)."""
    on = mask.to(cost.dtype)
    if method == "grpo":
        return reward, torch.zeros_like(on)
    if method == "gkd":  # as published: no gradient passes through sampling
        return torch.zeros_like(reward), on
    if method == "kdrl":  # likewise for its k2 term
        return reward, strength[:, None] * on
    if method == "minillm":  # minus the mean cost of the later tokens: its length normalisation
        later = on.sum(1, keepdim=True) - on.cumsum(1)
        return (cost.cumsum(1) - cost.sum(1, keepdim=True)) / later.clamp(min=1), on
    form, parameter = LEARNERS[method]
    name = "penalty" if parameter == "n" else "lam"
    # r~ is affine in lam and in n: two evaluations give every row's own strength
    parts = ({"lam": 0.0} | {name: value} for value in (0.0, 1.0))
    off, unit = (modified_reward(reward, cost, mask, budget, form=form, **part) for part in parts)
    return off.total + strength * (unit.total - off.total), strength[:, None] * unit.weight


def see_budget(trees: Trees, table: Tensor, budget: Tensor) -> Tensor:
    """The policy of a student that is given z_t, as a function of the state: (N, S, Z, V) -> logits (N, S, V).

    Bin 0 of the Z is an exhausted budget, the others share [0, d] evenly; with one bin the student sees nothing. The
    bin of a state follows from the costs before it (section 2), so it is found state by state from the root.
    """
    bins, rows = table.shape[2], torch.arange(len(table))
    if bins == 1:
        return table[:, :, 0]
    left = budget[:, None].repeat(1, table.shape[1])  # (N, S)
    chosen = torch.zeros_like(left, dtype=torch.long)
    with torch.no_grad():
        for state, children in enumerate(trees.paths.child):
            share = left[:, state] / budget.clamp(min=1e-12)
            chosen[:, state] = torch.where(share < 0, 0, 1 + (share * (bins - 1)).long().clamp(max=bins - 2))
            cost = divergence_from_logits(table[rows, state, chosen[:, state]], trees.teacher[:, state])
            left[:, children[children >= 0]] = (left[:, state] - cost)[:, None]
    return table[rows[:, None], torch.arange(table.shape[1]), chosen]


def learn(
    trees: Trees,
    start: Tensor,
    budget: Tensor,
    method: str,
    strength: Tensor,
    learning_rate: Tensor,
    *,
    steps: int,
    samples: int,
    margin: float,
    bins: int,
    generator: torch.Generator,
) -> Tensor:
    """Train one student per row from the logits `start` and return their logits, (N, S, V), for budgets d, (N,), by
    `samples` sequences per row and step, or 0 for the exact gradient.

    `strength`, (N,), is the parameter that `LEARNERS` names; of `dual` the step of its multiplier. `learning_rate`,
    (N,), is Adam's, falling linearly to 0. Methods named so aim at (1 - `margin`) d; `saute-augmented` tells `bins`
    values of z apart. Raises `ValueError` for an unknown method.
    """
    if method not in LEARNERS:
        raise ValueError(f"A learner is one of {tuple(LEARNERS)}, not {method!r}.")
    number, depth = len(budget), trees.paths.state.shape[1]
    rows, everything = torch.arange(number)[:, None], torch.arange(len(trees.paths.state)).expand(number, -1)
    table = start[:, :, None].repeat(1, 1, bins if method == "saute-augmented" else 1, 1)
    momentum, scale, none = torch.zeros_like(table), torch.zeros_like(table), torch.zeros_like(budget)
    worst_case = method == "worst-case"
    aim = budget * (1 - margin) if method.endswith("-margin") else none if worst_case else budget
    own = none if method == "dual" else strength
    for step in range(steps):
        table.requires_grad_()
        policy = see_budget(trees, table, budget)
        logp, cost, prob = sequences(trees, policy)
        drawn, weight = everything, prob.detach()
        if samples:
            drawn = torch.multinomial(weight, samples, replacement=True, generator=generator)  # (N, G)
            weight = torch.full_like(weight[:, :1], 1 / samples)
        group, reward = drawn.shape[1], trees.reward.gather(1, drawn).flatten()
        drawn_steps = logp[rows, drawn], cost[rows, drawn], trees.paths.mask[drawn]
        logp, cost, mask = (x.reshape(-1, depth) for x in drawn_steps)
        phi = (cost - (budget / depth).repeat_interleave(group)[:, None]).clamp(min=0) if worst_case else cost
        each = (x.repeat_interleave(group) for x in (aim, own))
        returns, phi_weight = signal(method, reward, phi.detach(), mask, *each)
        if method == "kdrl":  # its Phi is k2 of the sampled token
            index = (trees.paths.state * policy.shape[-1] + trees.paths.action)[drawn].flatten(1)
            teacher = trees.teacher.flatten(1).gather(1, index).view(-1, depth)
            phi = sampled_divergence(logp, torch.where(mask != 0, teacher, 0.0), "k2")
        if returns.dim() == 1:  # less a baseline: the group's mean or, with all sequences at hand, the exact mean
            mean = (weight * returns.view(number, group)).sum(1).repeat_interleave(group)
            returns = (group_advantages(returns, samples) if samples else returns - mean)[:, None]
        objective = (weight * (returns * logp - phi_weight * phi).sum(1).view(number, group)).sum()
        (gradient,) = torch.autograd.grad(objective, table)

        # Adam, with a learning rate per row
        momentum, scale = 0.9 * momentum + 0.1 * gradient, 0.999 * scale + 0.001 * gradient**2
        unbiased = (scale / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
        rate = (learning_rate * (1 - step / steps)).view(-1, 1, 1, 1)
        table = (table + rate * momentum / (1 - 0.9 ** (step + 1)) / unbiased).detach()
        if method == "dual":
            spent = cumulative_cost(cost.detach(), mask)[:, -1].view(number, group)
            own = (own + strength * ((weight * spent).sum(1) - budget)).clamp(min=0)
    return see_budget(trees, table, budget)
