"""Token trees, on which everything can be computed exactly (method, sections 2 to 5).

A tree is a language model small enough to enumerate: V tokens, at most H of them, every prefix a state. N random trees
of one shape are held together, the tree being the leading dimension. Policies are logits (N, S, V); a policy may put
zero on a token (logit -inf). Gradients are torch's; the dynamic programs are in NumPy. All is float64, in nats.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cmdp.divergence import divergence_from_logits
from cmdp.reward import ModifiedReward, modified_reward

ETA_MAX = 1e8  # a tilt so strong that it is the argmax, for values scaled to [0, 1]
CHUNK = 2**15  # tilting problems solved at once: few enough for the processor's cache


class Paths(NamedTuple):
    """The shape of a tree: S states in order of depth (0 the root) and L complete sequences of at most H tokens."""

    child: Tensor  # (S, V): the next state, or -1 - l where sequence l ends
    depth: Tensor  # (S,)
    state: Tensor  # (L, H): s_t; 0 off the mask
    action: Tensor  # (L, H): a_t; 0 off the mask
    mask: Tensor  # (L, H): 1 on the tokens of the sequence


class Trees(NamedTuple):
    """N problems of one shape."""

    paths: Paths
    teacher: Tensor  # log pi_T, (N, S, V)
    reward: Tensor  # R in [0, 1], (N, L)


class Optimum(NamedTuple):
    """The policy that attains V(s_0, d)."""

    logits: Tensor  # (N, S, V)
    remaining: np.ndarray  # z on arrival at each state, nats, (N, S)
    price: np.ndarray  # 1 / eta, what one more nat would earn there: dV(s, z)/dz, (N, S)


class Sequences(NamedTuple):
    """What a policy does on each of the L sequences; (N, L, H) is 0 off the mask."""

    logp: Tensor  # log pi(a_t | s_t), (N, L, H)
    cost: Tensor  # c(s_t), (N, L, H)

    @property
    def prob(self) -> Tensor:
        """The probability of each sequence, (N, L)."""
        return self.logp.sum(-1).exp()


def enumerate_paths(vocab: int, depth: int, eos: bool = True) -> Paths:
    """Every prefix and every sequence of at most `depth` tokens; with `eos`, token V - 1 ends a sequence early."""
    child, level, ends = [], [], []
    prefixes: list[tuple[tuple[int, int], ...]] = [()]
    for state, prefix in enumerate(prefixes):  # grows as it is read: breadth first
        level.append(len(prefix))
        child.append([])
        for action in range(vocab):
            longer = (*prefix, (state, action))
            if len(longer) == depth or (eos and action == vocab - 1):
                child[state].append(-1 - len(ends))
                ends.append(longer)
            else:
                child[state].append(len(prefixes))
                prefixes.append(longer)
    steps = torch.zeros(len(ends), depth, 3, dtype=torch.long)
    for row, path in enumerate(ends):
        steps[row, : len(path)] = torch.tensor([(s, a, 1) for s, a in path])
    return Paths(torch.tensor(child), torch.tensor(level), *steps.unbind(-1))


def random_trees(number: int, paths: Paths, sharpness: float, success: float, generator: torch.Generator) -> Trees:
    """Teacher logits ~ N(0, sharpness^2); R = 1 on a random share `success` of the sequences, 0 on the others."""
    shape = (number, *paths.child.shape)
    logits = sharpness * torch.randn(shape, generator=generator, dtype=torch.float64)
    reward = torch.rand(number, len(paths.state), generator=generator, dtype=torch.float64) < success
    return Trees(paths, logits.log_softmax(-1), reward.double())


def repeat(trees: Trees, times: int) -> Trees:
    """Each tree `times` times in a row: (N, ...) -> (N times, ...)."""
    return Trees(
        trees.paths, trees.teacher.repeat_interleave(times, dim=0), trees.reward.repeat_interleave(times, dim=0)
    )


def take(trees: Trees, rows: slice) -> Trees:
    """The trees in `rows`."""
    return Trees(trees.paths, trees.teacher[rows], trees.reward[rows])


# ---------------------------------------------------------------------------------------------- exact evaluation


def sequences(trees: Trees, logits: Tensor, kind: str = "reverse_kl") -> Sequences:
    """Enumerate a policy, (N, S, V); differentiable in it."""
    paths, vocab = trees.paths, logits.shape[-1]
    shape, on = (len(logits), *paths.state.shape), paths.mask != 0
    logp = logits.log_softmax(-1).flatten(1).index_select(1, (paths.state * vocab + paths.action).flatten())
    cost = divergence_from_logits(logits, trees.teacher, kind).index_select(1, paths.state.flatten())
    return Sequences(torch.where(on, logp.view(shape), 0.0), torch.where(on, cost.view(shape), 0.0))


def outcome(trees: Trees, logits: Tensor, budget: Tensor, tolerance: float = 1e-9) -> dict[str, Tensor]:
    """What a policy earns and spends, exactly; each (N,).

    Args:
        budget: d, (N,), or (N, L) for one that differs between sequences.
        tolerance: nats above d that are rounding, not violation.

    Returns:
        reward: E[R]; violation: P(C > d); within: E[R 1{C <= d}]; cost: E[C]; worst: max C over reachable sequences;
        excess: E[max(0, C - d)]; first: c(s_1), what the first token alone spends.
    """
    seq = sequences(trees, logits)
    prob, total = seq.prob, seq.cost.sum(-1)
    budget = _each(budget, total.shape[1])
    over = total > budget + tolerance
    reward = prob * trees.reward
    return {
        "reward": reward.sum(1),
        "violation": (prob * over).sum(1),
        "within": reward.masked_fill(over, 0.0).sum(1),
        "cost": (prob * total.nan_to_num(posinf=0.0)).sum(1),
        "worst": total.masked_fill(prob == 0, 0.0).amax(1),
        "excess": (prob * (total - budget).clamp(min=0).nan_to_num(posinf=0.0)).sum(1),
        "first": seq.cost[:, 0, 0],
    }


def reward_of_sequences(trees: Trees, cost: Tensor, budget: Tensor, form: str, **strengths: float) -> ModifiedReward:
    """`modified_reward` of every sequence of every tree: cost (N, L, H) -> tensors of (N L, H).

    The budget is that of the tree, (N,), or of each sequence, (N, L), as when it is granted per token.
    """
    mask, budget = trees.paths.mask.repeat(len(cost), 1), _each(budget, cost.shape[1]).flatten()
    return modified_reward(trees.reward.flatten(), cost.flatten(0, 1), mask, budget, form=form, **strengths)


def _each(budget: Tensor, count: int) -> Tensor:
    """(N,) or (N, L) -> (N, L)."""
    return budget if budget.dim() == 2 else budget[:, None].expand(-1, count)


def modified_objective(trees: Trees, logits: Tensor, budget: Tensor, form: str, **strengths: float) -> Tensor:
    """J~ = E[sum_t r~_t] by enumeration (section 4): (N,)."""
    seq = sequences(trees, logits)
    parts = reward_of_sequences(trees, seq.cost, budget, form, **strengths)
    return (seq.prob * parts.total.view(seq.prob.shape)).sum(1)


def modified_gradient(trees: Trees, logits: Tensor, budget: Tensor, form: str, **strengths: float) -> Tensor:
    """The gradient of J~ as section 4 (c) writes it, long-term part with returns to go: (N, S, V)."""
    logits = logits.detach().requires_grad_()
    seq = sequences(trees, logits)
    parts = reward_of_sequences(trees, seq.cost.detach(), budget, form, **strengths)
    to_go = parts.reward.flip(1).cumsum(1).flip(1).view(seq.cost.shape)
    surrogate = seq.logp * to_go - seq.cost * parts.weight.view(seq.cost.shape)
    (seq.prob.detach() * surrogate.sum(-1)).sum().backward()
    return logits.grad


# ------------------------------------------------------------------------------------------ the soft Lagrangian


def soft_values(trees: Trees, lam: Tensor) -> Tensor:
    """max E[R] - lam E[C] from each state on (section 5), V(s) = lam log sum_a pi_T(a) exp(V(s a) / lam): (N, S)."""
    values = torch.zeros(trees.teacher.shape[:2], dtype=torch.float64)
    for states in _levels(trees.paths):
        after = _after(trees, values)[:, states] / lam[:, None, None]
        values[:, states] = lam[:, None] * (trees.teacher[:, states] + after).logsumexp(-1)
    return values


def soft_optimum(trees: Trees, lam: Tensor) -> Tensor:
    """The policy that attains `soft_values`, pi ~ pi_T exp(V(s a) / lam): logits (N, S, V), lam (N,)."""
    return trees.teacher + _after(trees, soft_values(trees, lam)) / lam[:, None, None]


def _after(trees: Trees, values: Tensor) -> Tensor:
    """The value of each token: that of the next state, or R where the sequence ends. (N, S) -> (N, S, V)."""
    both = torch.cat([values, trees.reward.flip(1)], dim=1)  # child -1 - l counts R from the end
    return both[:, trees.paths.child]


def _levels(paths: Paths) -> list[Tensor]:
    """State indices by depth, deepest first."""
    return [(paths.depth == h).nonzero()[:, 0] for h in range(int(paths.depth.max()), -1, -1)]


# --------------------------------------------------------------------------------------- the budgeted optimum, by DP


def tilt(
    teacher: np.ndarray, values: np.ndarray, kappa: np.ndarray, steps: int = 12
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """max over pi with KL(pi || pi_T) <= kappa of sum_a pi(a) v(a), M problems at once (section 5).

    The maximiser is pi ~ pi_T exp(eta v) with KL = kappa. eta is found by Newton's method inside a bracket, on
    sqrt(2 KL) for a small kappa and else on the logit of KL / max KL: each is nearly linear in eta there. However far
    it got, `lower` is attained by `policy`, which satisfies KL <= kappa, and `upper` is the dual bound
    min_eta (log E_T exp(eta v) + kappa) / eta at the last eta: both hold.

    Args:
        teacher: pi_T, (V, M); values: (V, M); kappa: nats, (M,). The vocabulary comes first, since NumPy reduces a
            short last axis slowly.

    Returns:
        policy (V, M), lower (M,), upper (M,).
    """
    low, spread = values.min(0), np.ptp(values, axis=0)
    flat = (spread < 1e-14) | (kappa <= 0)
    unit = (values - low) / np.where(spread < 1e-14, 1.0, spread)  # values scaled to [0, 1]
    with np.errstate(divide="ignore"):
        most = -np.log((teacher * (unit == 1)).sum(0))  # KL of the argmax: beyond it no budget is spent
    root = np.sqrt(2 * kappa)
    mean = (teacher * unit).sum(0)
    free = kappa >= most
    lo, hi = np.where(free, ETA_MAX, 0.0), np.full_like(kappa, ETA_MAX)
    with np.errstate(all="ignore"):  # degenerate problems are overwritten at the end
        eta = np.minimum(root / np.sqrt((teacher * unit**2).sum(0) - mean**2), ETA_MAX)
        goal = np.log(kappa / (most - kappa))
        eta = np.where(free, ETA_MAX, np.where(np.isfinite(eta), eta, 1.0))
        for _ in range(steps):
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
        last = eta * (1 - 1e-9)  # a hair inside, so that rounding does not make a good last iterate infeasible
        lo = np.where(_tilted_kl(teacher, unit, last)[1] <= kappa, np.maximum(last, lo), lo)
        policy, _ = _tilted_kl(teacher, unit, lo)
        dual = np.where(lo > 0, lo, eta)
        upper = 1 + (np.log((teacher * np.exp(dual * (unit - 1))).sum(0)) + kappa) / dual
        upper = np.clip(np.nan_to_num(upper, nan=1.0), 0.0, 1.0)
    policy = np.where(flat, teacher, policy)
    lower = (policy * values).sum(0)
    upper = np.where(flat, lower, np.maximum(low + spread * upper, lower))
    return policy, lower, upper


def _tilted_kl(teacher: np.ndarray, unit: np.ndarray, eta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """pi ~ pi_T exp(eta u) and KL(pi || pi_T): (V, M), (M,)."""
    weight = teacher * np.exp(eta * (unit - 1))
    policy = weight / weight.sum(0)
    return policy, (policy * (np.log(np.where(policy > 0, policy, 1.0)) - np.log(teacher))).sum(0)


def budgeted_values(trees: Trees, grid: np.ndarray, bound: str = "lower", price: Tensor | None = None) -> np.ndarray:
    """V(s, z) for every state and every budget of `grid` (section 5), by backward recursion: (N, S, K).

    A state that has z_j may leave z_r <= z_j to its children, and spends kappa = z_j - z_r on its own tilt.
    `lower` allows remainders on the grid alone: the value of a policy that exists and never violates. `upper` lets what
    remains count as the next level up: no policy that satisfies the constraint earns more. The optimum lies
    between.

    Args:
        grid: budgets in nats, ascending from 0, (K,).
        price: lambda, (N,): solve max E[R - lambda max(0, C - z)], the hinge form, in place of the constraint. What
            is left once the budget is exceeded is the soft Lagrangian, whose value is known.
    """
    teacher, reward = trees.teacher.exp().numpy(), trees.reward.numpy()
    number, states, vocab = teacher.shape
    levels = len(grid)
    have, leave = np.tril_indices(levels)  # all pairs r <= j, ordered by j
    first = np.arange(levels) * (np.arange(levels) + 1) // 2  # where each j begins
    spend = grid[have] - grid[leave if bound == "lower" else np.maximum(leave - 1, 0)]
    values = np.empty((number, states, levels))
    if price is not None:
        soft = soft_values(trees, price).numpy()
        soft_spend = divergence_from_logits(soft_optimum(trees, price), trees.teacher).numpy()
    for batch in _levels(trees.paths):
        children = trees.paths.child[batch].numpy()  # (B, V)
        deepest = bool((children < 0).all())
        pairs = levels if deepest else len(have)
        rows = [(n, b) for n in range(number) for b in range(len(batch))]
        for start in range(0, len(rows), max(1, CHUNK // pairs)):
            n, b = np.array(rows[start : start + max(1, CHUNK // pairs)]).T
            s = batch.numpy()[b]
            q = np.broadcast_to(teacher[n, s].T[:, :, None], (vocab, len(n), pairs)).reshape(vocab, -1)
            v = np.stack([_child_values(values, reward, n, children[b, a]) for a in range(vocab)])
            if deepest:  # a last token has nothing to leave: all is spent
                _, lower, upper = tilt(q, v.reshape(vocab, -1), np.tile(grid, len(n)))
                best = (lower if bound == "lower" else upper).reshape(len(n), levels)
            else:
                _, lower, upper = tilt(q, v[:, :, leave].reshape(vocab, -1), np.tile(spend, len(n)))
                chosen = (lower if bound == "lower" else upper).reshape(len(n), pairs)
                best = np.maximum.reduceat(chosen, first, axis=1)
            if price is not None:  # exceed what is left at this very state, where the soft optimum would
                beyond = soft[n, s][:, None] + price.numpy()[n][:, None] * grid
                best = np.maximum(best, np.where(soft_spend[n, s][:, None] > grid, beyond, -np.inf))
            values[n, s] = best
    return values


def budgeted_policy(trees: Trees, grid: np.ndarray, values: np.ndarray, level: int) -> Optimum:
    """The policy that attains `budgeted_values(..., "lower")` from the budget grid[level] on.

    It does not see z: what remains at a state follows from the state (section 2), and is returned beside it.
    """
    teacher, reward = trees.teacher.exp().numpy(), trees.reward.numpy()
    number, _, vocab = teacher.shape
    policy, has, price = np.empty_like(teacher), np.zeros(teacher.shape[:2], dtype=int), np.zeros(teacher.shape[:2])
    has[:, 0] = level
    for batch in reversed(_levels(trees.paths)):
        children = trees.paths.child[batch].numpy()
        n, b = (index.ravel() for index in np.indices((number, len(batch))))
        s = batch.numpy()[b]
        j = has[n, s]
        v = np.stack([_child_values(values, reward, n, children[b, a]) for a in range(vocab)])  # (V, M, K)
        spend = np.maximum(grid[j][:, None] - grid, 0.0)  # (M, K)
        q = np.broadcast_to(teacher[n, s].T[:, :, None], v.shape)
        options, earned, _ = tilt(q.reshape(vocab, -1), v.reshape(vocab, -1), spend.ravel())
        earned = np.where(np.arange(len(grid)) <= j[:, None], earned.reshape(spend.shape), -np.inf)
        left = earned.argmax(1)
        policy[n, s] = options.reshape(v.shape)[:, np.arange(len(n)), left].T
        with np.errstate(divide="ignore", invalid="ignore"):  # log pi / pi_T = eta v + const
            tilted = np.ptp(np.log(policy[n, s] / teacher[n, s]), axis=1)
            price[n, s] = np.nan_to_num(np.ptp(v[:, np.arange(len(n)), left], axis=0) / tilted, posinf=np.inf)
        for a in range(vocab):
            inner = children[b, a] >= 0
            has[n[inner], children[b, a][inner]] = left[inner]
    with np.errstate(divide="ignore"):
        return Optimum(torch.from_numpy(np.log(policy)), grid[has], price)


def _child_values(values: np.ndarray, reward: np.ndarray, n: np.ndarray, child: np.ndarray) -> np.ndarray:
    """V(s a, z) of one token for M states: (M, K); R, whatever z, where the sequence ends."""
    ended = reward[n, np.where(child < 0, -1 - child, 0)]
    return np.where((child < 0)[:, None], ended[:, None], values[n, np.maximum(child, 0)])
