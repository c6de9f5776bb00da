"""Cost and budget of a trajectory, the modified reward and the advantages (method, sections 1, 3 and 6).

The modified reward enters the policy gradient as any reward does. A divergence that it charges also depends on the
student directly: `weight` is the factor of that gradient (the single-step part of section 4 (c)).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

BUDGET_FORMS = ("total", "per_token")
FORMS = ("exhausted", "overshoot", "hinge", "soft_hinge", "lagrangian")
CREDITS = ("sequence", "return_to_go", "length_normalised")


def check_budget(limit: float, form: str = "total") -> None:
    """Raise `ValueError` unless `limit` is 0 nats or more (infinity allowed) and `form` is known."""
    if form not in BUDGET_FORMS:
        raise ValueError(f"The budget is stated as one of {BUDGET_FORMS}, not {form!r}.")
    if not limit >= 0:
        raise ValueError(f"The budget must be 0 nats or more (infinity for none), but it is {limit}.")


def discount_factors(mask: Tensor, discount: float = 1.0) -> Tensor:
    """gamma^(t-1) at the student's t-th token, 0 off the mask: (B, T) -> (B, T)."""
    mask = mask if mask.is_floating_point() else mask.to(torch.get_default_dtype())
    return mask * discount ** (mask.cumsum(dim=1) - 1).clamp(min=0)


def cumulative_cost(cost: Tensor, mask: Tensor, discount: float = 1.0) -> Tensor:
    """C_t = sum_{k<=t} gamma^(k-1) c(s_k), in nats: (B, T), (B, T) -> (B, T). `mask` is 1 on the student's
    own tokens; what `cost` holds elsewhere is ignored."""
    cost = cost.masked_fill(mask == 0, 0.0)
    return (cost * discount_factors(mask.to(cost.dtype), discount)).cumsum(dim=1)


def trajectory_budget(limit: float, mask: Tensor, form: str = "total") -> Tensor:
    """The budget d of each trajectory, in nats, (B,): `limit`, or where the form is `per_token` that for each of its
    tokens. Raises `ValueError` as `check_budget` does."""
    check_budget(limit, form)
    if form == "total":
        return torch.full((mask.shape[0],), float(limit), device=mask.device)
    length = mask.sum(dim=1)
    # an empty completion has budget 0, also where the limit is infinite (inf * 0 is NaN)
    return torch.where(length > 0, limit * length.clamp(min=1), 0.0).to(torch.get_default_dtype())


class ModifiedReward(NamedTuple):
    """What `modified_reward` gives for B trajectories of T tokens."""

    reward: Tensor  # r~_t, (B, T)
    task: Tensor  # r~_t without the divergence charged: task reward and penalty n, (B, T)
    weight: Tensor  # factor of grad Phi(s_t) in -grad J~, (B, T), >= 0
    over: Tensor  # whether C_t > d, (B, T) of bool

    @property
    def total(self) -> Tensor:
        """sum_t r~_t, (B,)."""
        return self.reward.sum(dim=1)


def modified_reward(
    task_reward,
    cost,
    mask,
    budget,
    *,
    lam,
    penalty=0.0,
    form="exhausted",
    phi=None,
    discount=1.0,
    sharpness=10.0,
    offset=0.0,
) -> ModifiedReward:
    """The reward that the student maximises (section 3), with over_t = 1{C_t > d}:

    - `exhausted`: r~_t = (1 - over_t) r_t - over_t (n_t + lam Phi_t); n is charged once, at the first exhausted token;
    - `overshoot` (ours): r~ = 1{C <= d} R - n 1{C > d} - lam max(0, C - d), at the last token: every token of a
      violating trajectory is charged. The penalty is continuous in theta; the forfeited R jumps;
    - `hinge` (ours): r~ = R - n 1{C > d} - lam max(0, C - d), at the last token. With n = 0 nothing jumps;
    - `soft_hinge` (ours): r~ = R - lam d/k (softplus(k (C/d - 1) + u) - softplus(u - k)), at the last token: a nat of a
      trajectory of cost C has the price lam sigmoid(k (C/d - 1) + u). As k falls to 0 it becomes the lagrangian with
      lam sigmoid(u), as k grows the hinge, with u/k of the budget as margin;
    - `lagrangian`: r~_t = r_t - lam gamma^(t-1) c_t, whatever the budget: the soft constraint of the baselines.

    r_t is R at the last token (the first column of an empty completion) and 0 elsewhere. Raises `ValueError` for an
    unknown form, lam or penalty below 0, or a phi that the form cannot use.

    Args:
        task_reward, budget: R in [0, 1], and d in nats from `trajectory_budget`, (B,).
        cost, mask: c(s_t) in nats, and 1 on the student's own tokens, (B, T).
        lam, penalty: lambda in reward per nat, and n in reward, both 0 or more.
        phi: Phi(s_t), (B, T), of the form `exhausted`; the cost by default.
        discount: gamma of the cumulative cost.
        sharpness, offset: k > 0 and u of the form `soft_hinge`.
    """
    if form not in FORMS:
        raise ValueError(f"The reward's form is one of {FORMS}, not {form!r}.")
    if not (lam >= 0 and penalty >= 0):
        raise ValueError(f"lambda and the penalty n must be 0 or more, but they are {lam} and {penalty}.")
    if phi is not None and form != "exhausted":
        raise ValueError(f"The form {form!r} charges the cost itself and takes no Phi of its own.")

    on = mask != 0
    cost = cost.masked_fill(~on, 0.0)
    total = cumulative_cost(cost, mask, discount)
    over = total > budget[:, None].to(cost.dtype)
    violated = over[:, -1:]
    last = (on * torch.arange(1, on.shape[1] + 1, device=on.device)).argmax(dim=1, keepdim=True)
    task = torch.zeros_like(cost).scatter(1, last, task_reward[:, None].to(cost.dtype))
    weight = lam * discount_factors(mask.to(cost.dtype), discount)
    if form == "lagrangian":
        return ModifiedReward(task - weight * cost, task, weight, over)
    if form == "soft_hinge":
        limit = budget[:, None].to(cost.dtype).clamp(min=1e-9, max=1e9)
        excess = sharpness * (total[:, -1:] / limit - 1) + offset
        charge = nn.functional.softplus(excess) - nn.functional.softplus(excess.new_tensor(offset - sharpness))
        weight = weight * torch.sigmoid(excess)
        return ModifiedReward(task.scatter_add(1, last, -lam * limit / sharpness * charge), task, weight, over)
    if form in ("overshoot", "hinge"):
        excess = torch.where(violated, total[:, -1:] - budget[:, None].to(cost.dtype), 0.0)
        task = task if form == "hinge" else task.masked_fill(violated, 0.0)
        task = task.scatter_add(1, last, -penalty * violated.to(cost.dtype))
        return ModifiedReward(task.scatter_add(1, last, -lam * excess), task, weight * violated, over)
    charged = over & on
    first = charged & (charged.cumsum(dim=1) == 1)
    phi = cost if phi is None else phi.masked_fill(~on, 0.0)
    task = task.masked_fill(over, 0.0) - penalty * first
    return ModifiedReward(task - lam * phi * charged, task, lam * charged.to(cost.dtype), over)


def group_advantages(returns: Tensor, group_size: int, scale: bool = False) -> Tensor:
    """A = sum_t r~_t minus the mean of its group (section 6; GRPO, arXiv 2402.03300): (N,) in consecutive groups.

    NaN marks a completion without a reward: it is left out of its group's mean and gets advantage 0. `scale` divides by
    the group's standard deviation (G - 1 in the denominator) plus 1e-4.
    """
    groups = returns.view(-1, group_size)
    centred = groups - groups.nanmean(dim=1, keepdim=True)
    if scale:
        count = (~centred.isnan()).sum(dim=1, keepdim=True)
        variance = centred.square().nansum(dim=1, keepdim=True) / (count - 1).clamp(min=1)
        centred = centred / (variance.sqrt() + 1e-4)
    return centred.nan_to_num(nan=0.0).view(-1)


def token_advantages(reward, cost, mask, budget, group_size, credit="return_to_go", discount=1.0) -> Tensor:
    """Advantages per token: the return from t on minus a baseline that knows the state, (N, T). The baseline is a
    least-squares fit over all tokens on position, cost so far, its excess over the budget, and the group's mean return.

    `reward` (N, T) is what each token earns, in whole, consecutive groups, NaN as in `group_advantages`; the rest is as
    for `modified_reward`. Under the credit `return_to_go` the return is sum_{k>=t} r_k; under `length_normalised` it is
    the mean of r_k over the later tokens k > t, as in MiniLLM (arXiv 2306.08543, section 2.2), which leaves r_t to the
    single-step part.
    """
    scored = ~reward.isnan().any(dim=1, keepdim=True)
    on = (mask != 0) & scored
    reward = reward.masked_fill(~on, 0.0)
    if not on.any():
        return torch.zeros_like(reward)
    returns = reward.flip(1).cumsum(1).flip(1)
    position = on.cumsum(1)
    if credit == "length_normalised":
        returns = (returns - reward) / (position[:, -1:] - position).clamp(min=1)
    group = returns[:, :1].masked_fill(~scored, torch.nan).view(-1, group_size).nanmean(1)
    group = group.repeat_interleave(group_size)[:, None].expand_as(cost)
    before = cumulative_cost(cost, mask, discount)
    before = before - cost.masked_fill(mask == 0, 0.0) * discount_factors(mask.to(cost.dtype), discount)
    limit = torch.where(budget.isinf(), 0.0, budget)[:, None].to(cost.dtype)
    features = (torch.ones_like(cost), position / on.shape[1], before, (before - limit).clamp(min=0.0), before > limit)
    features = torch.stack([x.to(cost.dtype) for x in (*features, group)], dim=-1)  # (N, T, 6)
    target = returns[on].double().cpu()[:, None]
    solution = torch.linalg.lstsq(features[on].double().cpu(), target, driver="gelsd").solution
    fitted = (features.double() @ solution.to(features.device))[..., 0].to(cost.dtype)
    return (returns - fitted).masked_fill(~on, 0.0)
