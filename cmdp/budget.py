"""What a trajectory has cost, what it may still cost, and whether it kept its budget (method, section 1).

All tensors are (B, T): one row a completion, one column a token, `mask` 1 on the student's own tokens and 0
elsewhere (padding, tokens that a tool wrote). A row whose mask is all zero is an empty completion: it costs
nothing and satisfies every budget. A completion cut at the length limit is charged for the tokens it has.
"""

import math

import torch
from torch import Tensor

FORMS = ("total", "per_token")


def check_budget(limit: float, form: str = "total") -> None:
    """Raise `ValueError` unless `limit` is a number of nats >= 0 (infinity allowed) and `form` is known."""
    if form not in FORMS:
        raise ValueError(f"The budget is stated as one of {FORMS}, not {form!r}.")
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
