"""Token trees, on which everything can be computed exactly (method, sections 2 to 5).

A tree is a language model small enough to enumerate: V tokens, at most H per sequence, every prefix a state. N trees
of one shape are held together, along the leading dimension. Policies are logits (N, S, V). All is float64, in nats.
"""

from collections import namedtuple
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from cmdp.divergence import divergence_from_logits
from cmdp.reward import modified_reward

ETA_MAX = 1e8  # a tilt so strong that it is the argmax, for values scaled to [0, 1]
CHUNK = 2**15  # tilting problems solved at once: few enough for the processor's cache


class Paths(NamedTuple):
    """The shape of a tree: S states in order of depth (0 the root) and L complete sequences of at most H tokens."""

    child: Tensor  # (S, V): the next state, or -1 - l where sequence l ends
    depth: Tensor  # (S,)
    state: Tensor  # (L, H): s_t; 0 off the mask
    action: Tensor  # (L, H): a_t; 0 off the mask
    mask: Tensor  # (L, H): 1 on the tokens of the sequence

    def levels(self) -> list[np.ndarray]:
        """State indices by depth, deepest first."""
        return [np.flatnonzero(self.depth.numpy() == depth) for depth in range(int(self.depth.max()), -1, -1)]


class Trees(NamedTuple):
    """N problems of one shape."""

    paths: Paths
    teacher: Tensor  # log pi_T, (N, S, V)
    reward: Tensor  # R in [0, 1], (N, L)

    def repeat(self, times: int) -> "Trees":
        """Each tree `times` times in a row: (N, ...) -> (N times, ...)."""
        return Trees(self.paths, *(x.repeat_interleave(times, dim=0) for x in self[1:]))


Sequences = namedtuple("Sequences", "logp cost prob")  # of the L sequences under a policy, as `sequences` says


def enumerate_paths(vocab: int, depth: int, eos: bool = True) -> Paths:
    """Every prefix and every sequence of at most `depth` tokens; with `eos`, token V - 1 ends a sequence early."""
    child, ends, prefixes = [], [], [()]
    for state, prefix in enumerate(prefixes):  # grows while it is read: breadth first
        child.append([])
        for action in range(vocab):
            longer = (*prefix, (state, action, 1))
            ended = len(longer) == depth or (eos and action == vocab - 1)
            child[state].append(-1 - len(ends) if ended else len(prefixes))
            (ends if ended else prefixes).append(longer)
    steps = torch.zeros(len(ends), depth, 3, dtype=torch.long)
    for row, path in enumerate(ends):
        steps[row, : len(path)] = torch.tensor(path)
    return Paths(torch.tensor(child), torch.tensor([len(prefix) for prefix in prefixes]), *steps.unbind(-1))


def make_trees(parameters: dict, number: int = 0, stream: int = 1, shape: tuple | list = ()) -> Trees:
    """Random trees: teacher logits ~ N(0, sharpness^2); a sequence has R = 1 with probability `success`, else 0. By
    default the held-out trees, which judge the learners. `stream`: of random numbers; `shape`: as `enumerate_paths`."""
    tree, source = parameters["tree"], generator(parameters, stream)
    number = number or parameters["learners"]["test_trees"]
    paths = enumerate_paths(*(shape or (tree["vocab"], tree["depth"])))
    logits = tree["sharpness"] * torch.randn(number, *paths.child.shape, generator=source, dtype=torch.float64)
    reward = torch.rand(number, len(paths.state), generator=source, dtype=torch.float64) < tree["success"]
    return Trees(paths, logits.log_softmax(-1), reward.double())


def generator(parameters: dict, stream: int) -> torch.Generator:
    """A generator of random numbers for the study's seed and this stream."""
    seed = np.random.SeedSequence([parameters["seed"], stream]).generate_state(1)[0]
    return torch.Generator().manual_seed(int(seed))


def budget_grid(parameters: dict, limit: float, levels: int | None = None) -> np.ndarray:
    """Budgets from 0 to `limit`, denser near 0, where V(s, z) rises like a square root."""
    return limit * np.linspace(0, 1, levels or parameters["grid"]["levels"]) ** parameters["grid"]["power"]


def sequences(trees: Trees, logits: Tensor) -> Sequences:
    """Enumerate the policies, (N, S, V), differentiable in them: log pi(a_t | s_t) and c(s_t), (N, L, H), 0 off the
    mask, and the probability of each sequence, (N, L)."""
    paths, vocab = trees.paths, logits.shape[-1]
    shape, on = (len(logits), *paths.state.shape), paths.mask != 0
    logp = logits.log_softmax(-1).flatten(1).index_select(1, (paths.state * vocab + paths.action).flatten())
    cost = divergence_from_logits(logits, trees.teacher).index_select(1, paths.state.flatten())
    logp, cost = (torch.where(on, x.view(shape), 0.0) for x in (logp, cost))
    return Sequences(logp, cost, logp.sum(-1).exp())


def outcome(trees: Trees, logits: Tensor, budget: float | Tensor) -> dict[str, Tensor]:
    """Exact reward and cost of one policy per tree, (N,): E[R], P(C > d), E[R 1{C <= d}], E[C], max C over reachable
    sequences, E[max(0, C - d)], and c(s_1), the cost of the first token.

    The budget d is a number, (N, 1) or, if it differs between sequences, (N, L); up to 1e-9 nats over it is rounding.
    """
    _, cost, prob = sequences(trees, logits)
    total, reward = cost.sum(-1), prob * trees.reward
    over = total > budget + 1e-9
    return {
        "reward": reward.sum(1),
        "violation": (prob * over).sum(1),
        "within": reward.masked_fill(over, 0.0).sum(1),
        "cost": (prob * total.nan_to_num(posinf=0.0)).sum(1),
        "worst": total.masked_fill(prob == 0, 0.0).amax(1),
        "excess": (prob * (total - budget).clamp(min=0).nan_to_num(posinf=0.0)).sum(1),
        "first": cost[:, 0, 0],
    }


def outcomes(trees: Trees, policies: Tensor, budget: float | Tensor) -> dict[str, np.ndarray]:
    """`outcome` of C policies per tree, (N, C, S, V); each (N, C)."""
    found = outcome(trees.repeat(policies.shape[1]), policies.flatten(0, 1), budget)
    return {name: value.view(policies.shape[:2]).numpy() for name, value in found.items()}


def over_budget(trees: Trees, logits: Tensor, budget: float) -> Tensor:
    """Whether C_t > d at each step, (N, L, H)."""
    return sequences(trees, logits).cost.cumsum(-1) > budget


def modified_objective(trees: Trees, logits: Tensor, budget: float, form: str, **strengths) -> tuple[Tensor, Tensor]:
    """J~ = E[sum_t r~_t] by enumeration (section 4), (N,), and its gradient by the formula of section 4 (c), the
    long-term part with returns to go, (N, S, V)."""
    logits = logits.detach().requires_grad_()
    seq = sequences(trees, logits)
    prob, cost, mask = seq.prob.detach(), seq.cost.detach(), trees.paths.mask.repeat(len(logits), 1)
    limit = torch.full((prob.numel(),), budget, dtype=cost.dtype)
    parts = modified_reward(trees.reward.flatten(), cost.flatten(0, 1), mask, limit, form=form, **strengths)
    to_go = parts.reward.flip(1).cumsum(1).flip(1).view(cost.shape)
    surrogate = seq.logp * to_go - seq.cost * parts.weight.view(cost.shape)
    (prob * surrogate.sum(-1)).sum().backward()
    return (prob * parts.total.view(prob.shape)).sum(1), logits.grad


def soft_optimum(trees: Trees, lam: ArrayLike) -> tuple[Tensor, Tensor]:
    """The soft Lagrangian's optimum for lambda, a number or (N,) (section 5): max E[R] - lam E[C] from each state on,
    V(s) = lam log sum_a pi_T(a) exp(V(s a) / lam), (N, S), and the policy that attains it, logits (N, S, V)."""
    lam = torch.as_tensor(lam, dtype=torch.float64).reshape(-1, 1, 1)
    # the states, then the ends from the last on, as `child` counts them
    values = torch.cat([torch.zeros_like(trees.teacher[..., 0]), trees.reward.flip(1)], dim=1)
    for states in trees.paths.levels():
        after = values[:, trees.paths.child[states]] / lam
        values[:, states] = lam[:, 0] * (trees.teacher[:, states] + after).logsumexp(-1)
    return values[:, : trees.teacher.shape[1]], trees.teacher + values[:, trees.paths.child] / lam


def tilt(teacher: np.ndarray, values: np.ndarray, kappa: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """max over pi with KL(pi || pi_T) <= kappa of sum_a pi(a) v(a), many problems at once (section 5).

    The maximiser is pi ~ pi_T exp(eta v) with KL = kappa. eta is found by Newton's method inside a bracket, on
    sqrt(2 KL) for small kappa and else on the logit of KL / max KL: each is nearly linear in eta there.

    Takes v, (V, ...), and the teacher's pi_T, (V, ...), and kappa in nats, (...), broadcast to it. Returns a policy
    with KL <= kappa, (V, ...), what it earns, and an upper bound on what any such policy earns, the dual
    (log E_T exp(eta v) + kappa) / eta, (...). They hold however far Newton got.
    """
    kappa = np.broadcast_to(kappa, values.shape[1:])
    low, spread = values.min(0), np.ptp(values, axis=0)
    flat = (spread < 1e-14) | (kappa <= 0)
    unit = (values - low) / np.where(spread < 1e-14, 1.0, spread)  # values scaled to [0, 1]
    with np.errstate(all="ignore"):  # degenerate problems are overwritten at the end
        most = -np.log((teacher * (unit == 1)).sum(0))  # KL of the argmax: a larger budget buys nothing
        free = kappa >= most
        root, goal = np.sqrt(2 * kappa), np.log(kappa / (most - kappa))
        lo, hi = np.where(free, ETA_MAX, 0.0), np.full(kappa.shape, ETA_MAX)
        eta = np.minimum(root / np.sqrt((teacher * unit**2).sum(0) - (teacher * unit).sum(0) ** 2), ETA_MAX)
        eta = np.where(free, ETA_MAX, np.where(np.isfinite(eta), eta, 1.0))
        for _ in range(12):
            weight = teacher * np.exp(eta * (unit - 1))
            total = weight.sum(0)
            mean = (weight * unit).sum(0) / total
            slope = eta * ((weight * unit**2).sum(0) / total - mean**2)  # dKL / d eta
            kl = eta * (mean - 1) - np.log(total)
            feasible = kl <= kappa
            lo, hi = np.where(feasible, np.maximum(eta, lo), lo), np.where(feasible, hi, np.minimum(eta, hi))
            near = eta - (np.sqrt(2 * kl) - root) * np.sqrt(2 * kl) / slope
            far = eta - (np.log(kl / (most - kl)) - goal) * kl * (most - kl) / (most * slope)
            newton = np.where(kappa < most / 8, near, far)
            middle = np.where(hi < ETA_MAX, (lo + hi) / 2, 4 * eta + 1)
            eta = np.where((newton >= lo) & (newton <= hi), newton, np.minimum(middle, ETA_MAX))
        last = eta * (1 - 1e-9)  # rounding must not make a good last iterate infeasible
        lo = np.where(_tilted(teacher, unit, last)[1] <= kappa, np.maximum(last, lo), lo)
        policy = np.where(flat, teacher, _tilted(teacher, unit, lo)[0])
        dual = np.where(lo > 0, lo, eta)
        upper = 1 + (np.log((teacher * np.exp(dual * (unit - 1))).sum(0)) + kappa) / dual
    upper = np.clip(np.nan_to_num(upper, nan=1.0), 0.0, 1.0)
    lower = (policy * values).sum(0)
    return policy, lower, np.where(flat, lower, np.maximum(low + spread * upper, lower))


def _tilted(teacher: np.ndarray, unit: np.ndarray, eta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """pi ~ pi_T exp(eta u) and KL(pi || pi_T): (V, ...), (...)."""
    weight = teacher * np.exp(eta * (unit - 1))
    policy = weight / weight.sum(0)
    return policy, (policy * (np.log(np.where(policy > 0, policy, 1.0)) - np.log(teacher))).sum(0)


def budgeted_values(trees: Trees, grid: np.ndarray, bound: str = "lower", price: ArrayLike | None = None) -> np.ndarray:
    """V(s, z) by backward recursion (section 5): (N, S + L, K): states, then the ends at -1 - l as in `Paths.child`.

    `grid`: budgets in nats, ascending from 0, (K,). A state that has z_j may leave z_r <= z_j to its children, and
    spends kappa = z_j - z_r on its own tilt. `lower` leaves levels of the grid alone: the value of a policy that exists
    and never violates. `upper` rounds the remainder up to the next level: no policy that satisfies the constraint earns
    more. With `price`, lambda, a number or (N,), it solves the hinge form max E[R - lambda max(0, C - z)] instead;
    beyond the budget that is the soft Lagrangian, whose value is known.
    """
    child, teacher = trees.paths.child.numpy(), trees.teacher.exp().numpy()
    number, states, _ = teacher.shape
    values = np.concatenate([np.zeros((number, states)), trees.reward.flip(1).numpy()], axis=1)
    values = np.repeat(values[:, :, None], len(grid), axis=2)
    if price is not None:
        price = np.full(number, price)
        soft, policy = soft_optimum(trees, price)
        soft, soft_spend = soft.numpy(), divergence_from_logits(policy, trees.teacher).numpy()
    for batch in trees.paths.levels():
        have, leave = np.tril_indices(len(grid))  # all pairs r <= j, ordered by j
        if (child[batch] < 0).all():  # a last token leaves nothing
            have, leave = np.arange(len(grid)), np.zeros(len(grid), dtype=int)
        first = np.flatnonzero(np.diff(have, prepend=-1))  # where each j begins
        spend = grid[have] - grid[leave if bound == "lower" else np.maximum(leave - 1, 0)]
        pairs = np.stack(np.meshgrid(range(number), batch, indexing="ij")).reshape(2, -1)
        for n, s in np.split(pairs, range(0, pairs.shape[1], max(1, CHUNK // len(have)))[1:], axis=1):
            after = values[n, child[s].T]  # (V, M, K)
            _, lower, upper = tilt(teacher[n, s].T[:, :, None], after[:, :, leave], spend)
            best = np.maximum.reduceat(lower if bound == "lower" else upper, first, axis=1)
            if price is not None:  # exceed the budget at this very state, where the soft optimum would
                beyond = soft[n, s, None] + price[n, None] * grid
                best = np.maximum(best, np.where(soft_spend[n, s, None] > grid, beyond, -np.inf))
            values[n, s] = best
    return values


def budgeted_policy(trees: Trees, grid: np.ndarray, values: np.ndarray, level: int) -> tuple[Tensor, np.ndarray]:
    """The policy that attains the `values` of `budgeted_values(trees, grid)` from the budget grid[level] on, logits
    (N, S, V), and the price of a nat at each state, 1 / eta = dV(s, z) / dz, (N, S). The policy does not see z: what
    remains at a state follows from the state (section 2)."""
    child, teacher = trees.paths.child.numpy(), trees.teacher.exp().numpy()
    policy, price = np.empty_like(teacher), np.zeros(teacher.shape[:2])
    has = np.full(values.shape[:2], level)  # z on arrival, as a level of the grid
    for batch in reversed(trees.paths.levels()):
        n, s = np.stack(np.meshgrid(range(len(teacher)), batch, indexing="ij")).reshape(2, -1)
        row, j, after = np.arange(len(n)), has[n, s][:, None], values[n, child[s].T]  # after: (V, M, K)
        options, earned, _ = tilt(teacher[n, s].T[:, :, None], after, np.maximum(grid[j] - grid, 0.0))
        left = np.where(np.arange(len(grid)) <= j, earned, -np.inf).argmax(1)
        policy[n, s] = options[:, row, left].T
        with np.errstate(divide="ignore", invalid="ignore"):  # log pi / pi_T = eta v + const
            tilted = np.ptp(np.log(policy[n, s] / teacher[n, s]), axis=1)
            price[n, s] = np.nan_to_num(np.ptp(after[:, row, left], axis=0) / tilted, posinf=np.inf)
        has[n, child[s].T] = left
    return torch.from_numpy(policy).log(), price
