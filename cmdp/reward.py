"""The modified reward and the group advantage (method, sections 3 and 6).

A reward has two parts that a trainer treats differently. Its value, token by token, enters the policy gradient as any
reward would. Where it charges a divergence, that divergence also depends on the student directly, and the
`weight` says with which factor its gradient enters the objective (the single-step part of section 4 (c)).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

BUDGET_FORMS = ("total", "per_token")
FORMS = ("exhausted", "overshoot", "hinge", "lagrangian")
CREDITS = ("sequence", "return_to_go", "length_normalised")


def check_budget(limit: float, form: str = "total") -> None:
    """Raise `ValueError` unless `limit` is a number of nats >= 0 (infinity allowed) and `form` is known."""
    if form not in BUDGET_FORMS:
        raise ValueError(f"The budget is stated as one of {BUDGET_FORMS}, not {form!r}.")
    if math.isnan(limit) or limit < 0:
        raise ValueError(f"The budget must be 0 nats or more (infinity for none), but it is {limit}.")


def discount_factors(mask: Tensor, discount: float = 1.0) -> Tensor:
    """gamma^(t-1) at the t-th of the student's tokens, 0 off the mask. (B, T) -> (B, T)."""
    mask = mask.to(torch.get_default_dtype() if not mask.is_floating_point() else mask.dtype)
    return mask * discount ** (mask.cumsum(dim=1) - 1).clamp(min=0)


def cumulative_cost(cost: Tensor, mask: Tensor, discount: float = 1.0) -> Tensor:
    """C_t = sum_{k<=t} gamma^(k-1) c(s_k), in nats; constant after the last token.

    Args:
        cost: (B, T), nats. Must be finite on the mask; what stands off the mask is ignored.
        mask: (B, T), 1 on the student's own tokens.
        discount: gamma.
    """
    cost = cost.masked_fill(mask == 0, 0.0)
    return (cost * discount_factors(mask.to(cost.dtype), discount)).cumsum(dim=1)


def trajectory_budget(limit: float, mask: Tensor, form: str = "total") -> Tensor:
    """The budget d of each trajectory, in nats: (B,).

    `total` grants `limit` nats to the trajectory; `per_token` grants `limit` nats for each of its L tokens, which is
    known, and so checked, only at its end.
    """
    check_budget(limit, form)
    if form == "total":
        return torch.full((mask.shape[0],), float(limit), device=mask.device)
    length = mask.sum(dim=1)
    # an empty completion has budget 0 and cost 0, also where the limit is infinite (inf * 0 is no number)
    return torch.where(length > 0, limit * length.clamp(min=1), 0.0).to(torch.get_default_dtype())


def remaining_budget(cost: Tensor, mask: Tensor, limit: float, form: str = "total", discount: float = 1.0) -> Tensor:
    """z_t = d - C_t, in nats: (B, T). It never rises where the cost is >= 0; z_T >= 0 is satisfaction."""
    budget = trajectory_budget(limit, mask, form).to(cost.dtype)
    return budget[:, None] - cumulative_cost(cost, mask, discount)


def satisfied(cost: Tensor, mask: Tensor, limit: float, form: str = "total", discount: float = 1.0) -> Tensor:
    """Whether each trajectory keeps its budget, C <= d: (B,) of bool. Its mean is the CSR."""
    return remaining_budget(cost, mask, limit, form, discount)[:, -1] >= 0


class ModifiedReward(NamedTuple):
    """What `modified_reward` gives for B trajectories of T tokens."""

    reward: Tensor  # r~_t, (B, T)
    task: Tensor  # what of it charges no divergence: task reward and penalty n, (B, T)
    weight: Tensor  # what multiplies grad Phi(s_t) in -grad J~, (B, T), >= 0
    over: Tensor  # whether the budget is exhausted once step t is paid, (B, T) of bool

    @property
    def total(self) -> Tensor:
        """sum_t r~_t, (B,)."""
        return self.reward.sum(dim=1)


def modified_reward(
    task_reward: Tensor,
    cost: Tensor,
    mask: Tensor,
    budget: Tensor,
    *,
    lam: float,
    penalty: float = 0.0,
    form: str = "exhausted",
    phi: Tensor | None = None,
    discount: float = 1.0,
) -> ModifiedReward:
    """The reward that the student maximises, with over_t = 1{C_t > d}:

    - `exhausted` (section 3): r~_t = (1 - over_t) r_t - over_t (n_t + lam Phi_t), with n charged once, at the first
      exhausted token;
    - `overshoot` (ours): r~ = 1{C <= d} R - n 1{C > d} - lam max(0, C - d), at the last token. It charges every token
      of a violating trajectory, also those that spent the budget, and its penalty does not jump as theta moves a
      trajectory across the budget; the forfeited R does;
    - `hinge` (ours): r~ = R - n 1{C > d} - lam max(0, C - d), at the last token. With n = 0 nothing jumps: the exact
      penalty function of the constraint;
    - `lagrangian`: r~_t = r_t - lam gamma^(t-1) c_t. The budget plays no part: the soft constraint of the baselines.

    With an infinite budget and lam = penalty = 0 each is r_t: R at the last token, 0 before. An empty completion has no
    last token; its R stands at the first column, so that its total is what plain GRPO would give it.

    Args:
        task_reward: R in [0, 1], (B,).
        cost: c(s_t) >= 0 in nats, (B, T).
        mask: 1 on the student's own tokens, (B, T).
        budget: d in nats, (B,), as `trajectory_budget` gives it.
        lam: lambda >= 0, reward per nat.
        penalty: n >= 0, in units of reward.
        form: one of `FORMS`.
        phi: Phi(s_t), (B, T); the cost itself where it is not given. Only `exhausted` has a Phi of its own.
        discount: gamma of the cumulative cost.

    Raises:
        ValueError: an unknown form, lam or penalty below 0, or a phi that the form cannot use.
    """
    if form not in FORMS:
        raise ValueError(f"The reward's form is one of {FORMS}, not {form!r}.")
    if lam < 0 or penalty < 0:
        raise ValueError(f"lambda and the penalty n must be 0 or more, but they are {lam} and {penalty}.")
    if phi is not None and form != "exhausted":
        raise ValueError(f"The form {form!r} charges the cost itself and takes no Phi of its own.")

    on = mask != 0
    cost = cost.masked_fill(~on, 0.0)
    total = cumulative_cost(cost, mask, discount)
    over = total > budget[:, None].to(cost.dtype)
    violated = over[:, -1]
    # the last of the student's tokens; the first column of an empty completion
    last = (on * torch.arange(1, on.shape[1] + 1, device=on.device)).argmax(dim=1)
    task = torch.zeros_like(cost).scatter(1, last[:, None], task_reward[:, None].to(cost.dtype))

    if form == "lagrangian":
        weight = lam * discount_factors(mask.to(cost.dtype), discount)
        return ModifiedReward(task - weight * cost, task, weight, over)

    if form in ("overshoot", "hinge"):
        excess = torch.where(violated, total[:, -1] - budget.to(cost.dtype), 0.0)
        task = task if form == "hinge" else task.masked_fill(violated[:, None], 0.0)
        task = task.scatter_add(1, last[:, None], -penalty * violated[:, None].to(cost.dtype))
        reward = task.scatter_add(1, last[:, None], -lam * excess[:, None])
        weight = lam * discount_factors(mask.to(cost.dtype), discount) * violated[:, None]
        return ModifiedReward(reward, task, weight, over)

    charged = over & on
    first = charged & (charged.cumsum(dim=1) == 1)
    phi = cost if phi is None else phi.masked_fill(~on, 0.0)
    task = task.masked_fill(over, 0.0) - penalty * first
    return ModifiedReward(task - lam * phi * charged, task, lam * charged.to(cost.dtype), over)


def group_advantages(returns: Tensor, group_size: int, scale: bool = False, floor: float = 1e-4) -> Tensor:
    """A = sum_t r~_t minus the mean of its group (section 6; GRPO, arXiv 2402.03300).

    Groups are consecutive. A group in which all are equal, all violating ones included, has advantage 0. NaN marks a
    completion that no reward function could score: it is left out of its group's mean and gets advantage 0.

    Args:
        returns: (N,), N a multiple of `group_size`.
        group_size: G, completions a prompt.
        scale: divide by the group's standard deviation (G - 1 in the denominator) plus `floor`.
        floor: keeps the division finite where a group is all but equal.
    """
    groups = returns.view(-1, group_size)
    centred = groups - groups.nanmean(dim=1, keepdim=True)
    if scale:
        count = (~centred.isnan()).sum(dim=1, keepdim=True)
        variance = centred.square().nansum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + floor)
    return centred.nan_to_num(nan=0.0).view(-1)


def token_advantages(
    reward: Tensor,
    cost: Tensor,
    mask: Tensor,
    budget: Tensor,
    group_size: int,
    credit: str = "return_to_go",
    discount: float = 1.0,
) -> Tensor:
    """Advantages token by token: the return from t on minus a baseline that knows the state, (B, T).

    The baseline is a least-squares fit, over the batch's tokens, of that return on what s_t determines: the position,
    the cost so far and its excess over the budget, and on the mean return of the prompt's group. A baseline of the
    position alone collapses: tokens after a violation look good next to those of a trajectory that has yet to pay
    (section 6).

    Args:
        reward: what each token earns, (B, T). A trajectory with NaN gets advantage 0.
        cost, mask, budget: as for `modified_reward`.
        credit: `return_to_go`, sum_{k>=t} r_k; or `length_normalised`, the mean of r_k over the later tokens k > t, as
            in MiniLLM (arXiv 2306.08543, section 2.2), whose r_t is left to the single-step part.
    """
    on = (mask != 0) & ~reward.isnan().any(dim=1, keepdim=True)
    reward = reward.masked_fill(~on, 0.0)
    if not on.any():
        return torch.zeros_like(reward)
    returns = reward.flip(1).cumsum(1).flip(1)
    position = on.cumsum(1)
    if credit == "length_normalised":
        returns = (returns - reward) / (position[:, -1:] - position).clamp(min=1)
    group = returns[:, 0].view(-1, group_size).mean(1).repeat_interleave(group_size)
    before = cumulative_cost(cost, mask, discount) - cost.masked_fill(mask == 0, 0.0) * discount_factors(
        mask.to(cost.dtype), discount
    )
    limit = torch.where(budget.isinf(), 0.0, budget)[:, None].to(cost.dtype)
    features = [torch.ones_like(cost), position / on.shape[1], before, (before - limit).clamp(min=0.0), before > limit]
    features = torch.stack([x.to(cost.dtype) for x in (*features, group[:, None].expand_as(cost))], dim=-1)  # (B, T, 6)
    solution = torch.linalg.lstsq(
        features[on].double().cpu(), returns[on].double().cpu()[:, None], driver="gelsd"
    ).solution
    return (returns - (features.double() @ solution.to(features.device))[..., 0].to(cost.dtype)).masked_fill(~on, 0.0)
