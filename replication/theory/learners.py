"""Every method as a policy gradient on token trees (method, sections 6 and 7), to be judged by the exact optimum.

A learner goes through the package's own reward and advantage, as the trainer for language models does. With the exact
gradient every sequence counts with its probability; else G sequences are drawn for each tree and step, and the baseline
is their mean. One optimiser, one start and one number of steps serve all; a method is what `signal` returns and, for
the one that sees the remaining budget, its table of parameters. A row is one student on one tree: rows differ in
budget, strength and learning rate, so that a whole sweep trains at once.
"""

import torch
from torch import Tensor

from cmdp.divergence import divergence_from_logits, sampled_divergence
from cmdp.reward import ModifiedReward, cumulative_cost, group_advantages, modified_reward
from replication.theory import STRENGTH
from replication.theory.tabular import Trees, sequences


def signal(
    method: str, reward: Tensor, cost: Tensor, mask: Tensor, budget: Tensor, strength: Tensor
) -> tuple[Tensor, Tensor]:
    """What the policy gradient credits, and with what weight the divergence of each step is descended.

    Args:
        reward: R, (B,); cost, mask: (B, T); budget, strength: (B,). The strength of `dual` is its multiplier.

    Returns:
        The returns, (B,) for the whole sequence or (B, T) token by token, and the weight of grad Phi(s_t), (B, T).
    """
    nothing = torch.zeros_like(reward)

    def parts(task: Tensor, **settings) -> ModifiedReward:
        return modified_reward(task, cost, mask, budget, **settings)

    def scaled(form: str, which: str = "lam") -> tuple[Tensor, Tensor]:
        """The form with each row's own strength: r~ is affine in lam and in n, so two evaluations give them all."""
        off, on = (parts(reward, form=form, **({"lam": 0.0} | {which: value})) for value in (0.0, 1.0))
        return off.total + strength * (on.total - off.total), strength[:, None] * on.weight

    match method.removesuffix("-margin"):
        case "grpo":
            free = parts(reward, form="lagrangian", lam=0.0)
            return free.total, free.weight
        case "gkd":  # as its authors train it, no gradient passes through sampling: the single-step part alone
            return nothing, parts(nothing, form="lagrangian", lam=1.0).weight
        case "kdrl":  # likewise for its k2 term: the policy gradient sees the task reward alone
            return reward, strength[:, None] * parts(nothing, form="lagrangian", lam=1.0).weight
        case "minillm":
            distil = parts(nothing, form="lagrangian", lam=1.0)
            after = distil.reward.sum(1, keepdim=True) - distil.reward.cumsum(1)  # sum_{k>t}
            left = mask.sum(1, keepdim=True) - mask.cumsum(1)  # how many tokens: its length normalisation
            return after / left.clamp(min=1), distil.weight
        case "gkd-grpo" | "dual":
            return scaled("lagrangian")
        case "saute-constant" | "saute-augmented":
            return scaled("exhausted", "penalty")
        case "cmdp":
            return scaled("exhausted")
        case "cmdp-hinge":
            return scaled("hinge")
        case "cmdp-overshoot" | "worst-case":  # worst-case: the cost is each step's excess, the budget 0
            return scaled("overshoot")
    raise ValueError(f"A learner is one of {tuple(STRENGTH)}, not {method!r}.")


def see_budget(trees: Trees, table: Tensor, budget: Tensor) -> Tensor:
    """The policy of a student that is given z_t, as a function of the state: (N, S, Z, V) -> logits (N, S, V).

    Bin 0 of the Z is an exhausted budget, the others share [0, d] evenly. Which bin a state falls into follows from the
    costs before it (section 2), so it is found state by state from the root.
    """
    bins = table.shape[2]
    left = budget[:, None].repeat(1, table.shape[1])  # (N, S)
    chosen = torch.zeros_like(left, dtype=torch.long)
    rows = torch.arange(len(table))
    with torch.no_grad():
        for state, children in enumerate(trees.paths.child):
            share = left[:, state] / budget.clamp(min=1e-12)
            chosen[:, state] = torch.where(share < 0, 0, 1 + (share * (bins - 1)).long().clamp(max=bins - 2))
            cost = divergence_from_logits(table[rows, state, chosen[:, state]], trees.teacher[:, state])
            left[:, children[children >= 0]] = (left[:, state] - cost)[:, None]
    index = chosen[:, :, None, None].expand(-1, -1, 1, table.shape[3])
    return table.gather(2, index).squeeze(2)


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
    """Train one student a row and return their logits, (N, S, V).

    Args:
        start: the students' logits before distillation, (N, S, V).
        budget: d; strength: of the kind that `replication.theory.STRENGTH` names; learning_rate: Adam's, falling linearly to
            0 for every method; each (N,).
        samples: G sequences a row and step; 0 for the exact gradient.
        margin: methods named so aim at (1 - margin) d.
        bins: how many values of z `saute-augmented` tells apart.
    """
    number, depth = len(budget), trees.paths.state.shape[1]
    rows, everything = torch.arange(number)[:, None], torch.arange(len(trees.paths.state)).expand(number, -1)
    augmented = method == "saute-augmented"
    table = start[:, :, None].repeat(1, 1, bins, 1) if augmented else start.clone()
    momentum, scale = torch.zeros_like(table), torch.zeros_like(table)
    aim = budget * (1 - margin) if method.endswith("-margin") else budget
    own = torch.zeros_like(budget) if method == "dual" else strength
    if method == "worst-case":
        aim, step_budget = torch.zeros_like(budget), budget / depth
    for step in range(steps):
        table.requires_grad_()
        policy = see_budget(trees, table, budget) if augmented else table
        every = sequences(trees, policy)
        prob = every.prob.detach()
        if samples:
            drawn = torch.multinomial(prob, samples, replacement=True, generator=generator)  # (N, G)
            weight, (logp, cost) = torch.full_like(prob[:, :1], 1 / samples), (x[rows, drawn] for x in every)
        else:
            drawn, weight, (logp, cost) = everything, prob, every
        group = drawn.shape[1]
        mask, reward = trees.paths.mask[drawn].view(-1, depth), trees.reward.gather(1, drawn).flatten()
        logp, cost = logp.reshape(-1, depth), cost.reshape(-1, depth)
        phi = (cost - step_budget.repeat_interleave(group)[:, None]).clamp(min=0) if method == "worst-case" else cost
        returns, phi_weight = signal(
            method, reward, phi.detach(), mask, aim.repeat_interleave(group), own.repeat_interleave(group)
        )
        if method == "kdrl":  # its Phi is k2 of the sampled token
            index = (trees.paths.state * policy.shape[-1] + trees.paths.action)[drawn].flatten(1)
            teacher = trees.teacher.flatten(1).gather(1, index).view(-1, depth)
            phi = sampled_divergence(logp, torch.where(mask != 0, teacher, 0.0), "k2")
        if returns.dim() == 2:  # token by token, without a baseline
            credit = (returns * logp).sum(1)
        elif samples:
            credit = group_advantages(returns, samples) * logp.sum(1)
        else:
            returns = returns.view(number, group)
            credit = (returns - (weight * returns).sum(1, keepdim=True)).flatten() * logp.sum(1)
        objective = (weight * (credit - (phi_weight * phi).sum(1)).view(number, group)).sum()
        (gradient,) = torch.autograd.grad(objective, table)

        # Adam, with a learning rate a row
        momentum, scale = 0.9 * momentum + 0.1 * gradient, 0.999 * scale + 0.001 * gradient**2
        unbiased = (scale / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
        rate = (learning_rate * (1 - step / steps)).view(-1, *[1] * (table.dim() - 1))
        table = (table + rate * momentum / (1 - 0.9 ** (step + 1)) / unbiased).detach()
        if method == "dual":
            spent = cumulative_cost(cost.detach(), mask)[:, -1].view(number, group)
            own = (own + strength * ((weight * spent).sum(1) - budget)).clamp(min=0)
    return see_budget(trees, table, budget) if augmented else table
