"""Constrained distillation of a language model: task reward up, divergence from the teacher under a budget.

`divergence`, `reward` and `trainer` are the method, in this order; `methods` has the baselines, and `train` trains and
measures them all. `import cmdp` loads none of the heavy libraries.
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    """Load the trainer, and with it TRL and transformers, only when it is asked for."""
    if name in ("CMDPConfig", "CMDPTrainer"):
        from cmdp import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'cmdp' has no attribute {name!r}")
