"""Constrained distillation of a language model: task reward up, divergence from the teacher under a budget.

The modules follow the method in order: `divergence` and `budget` say what a trajectory costs and may cost,
`reward` turns that into the modified reward, `tabular` solves small problems exactly, `trainer` trains a
language model, `tasks` and `evaluation` measure it. `import cmdp` loads none of the heavy libraries.
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    """Load the trainer, and with it TRL and transformers, only when it is asked for."""
    if name in ("CMDPConfig", "CMDPTrainer"):
        from cmdp import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'cmdp' has no attribute {name!r}")
