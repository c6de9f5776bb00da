"""Every method as settings of one trainer (method, section 7), so that they differ in nothing else."""

# What each method fixes of `CMDPConfig`; what it leaves open (lam, penalty, learning_rate, ...) is tuned. Without
# long_term the divergence is charged by its own gradient alone, not through the sampling of what follows: so do GKD
# (arXiv 2306.13649, section 3), with or without a reward, and KDRL (arXiv 2506.02208).
METHODS = {
    "grpo": {"reward_form": "lagrangian", "lam": 0.0},
    "gkd": {"reward_form": "lagrangian", "lam": 1.0, "task_weight": 0.0, "long_term": False},
    "gkd-grpo": {"reward_form": "lagrangian", "long_term": False},
    "dual": {"reward_form": "lagrangian", "long_term": False},
    "minillm": {"reward_form": "lagrangian", "lam": 1.0, "task_weight": 0.0, "credit": "length_normalised"},
    "kdrl": {"reward_form": "lagrangian", "divergence": "k2", "long_term": False},
    "saute-constant": {"reward_form": "exhausted", "lam": 0.0},
    "cmdp": {"reward_form": "exhausted"},
    "cmdp-overshoot": {"reward_form": "overshoot"},
    "cmdp-hinge": {"reward_form": "hinge", "long_term": False},
    "cmdp-adaptive": {"reward_form": "hinge", "long_term": False, "csr_target": 0.98, "lam": 1.0},
    "cmdp-chance": {"reward_form": "soft_hinge", "long_term": False, "lam": 3.0, "csr_target": 0.97, "dual_rate": 0.5},
    "worst-case": {"reward_form": "overshoot"},
}
TRL = ("trl-grpo", "trl-gkd")  # TRL's own GRPOTrainer and DistillationTrainer
START = "sft"  # the student before training


def check_method(name: str) -> str:
    """`name`, if it is a method. Raises `ValueError` otherwise."""
    known = (START, *METHODS, *TRL)
    if name not in known:
        raise ValueError(f"There is no method {name!r}. Methods: {', '.join(known)}.")
    return name
