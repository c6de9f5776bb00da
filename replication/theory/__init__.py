"""What can be said of the method exactly, on token trees (method, sections 2 to 7); `cmdp theory` runs it all.

`trees` draws the random problems of `replication.theory.tabular`. `optimum`, `guarantees`, `crossings` and `contest`, in which the
policy gradients of `learners` meet the exact optimum, each return tables; `study` writes and summarises them. `figures`
and `tables` read those files, without torch, as does whatever else needs the names below.
"""

# each learner's strength, the one parameter of its own that is tuned; None: it has none
STRENGTH = {
    "grpo": None,
    "gkd": None,
    "minillm": None,
    "gkd-grpo": "lambda",
    "dual": "step",
    "kdrl": "beta",
    "saute-constant": "n",
    "saute-augmented": "n",
    "cmdp": "lambda",
    "cmdp-margin": "lambda",
    "cmdp-overshoot": "lambda",
    "cmdp-overshoot-margin": "lambda",
    "cmdp-hinge": "lambda",
    "cmdp-hinge-margin": "lambda",
    "worst-case": "lambda",
}
# the overshoot form; the hinge, which keeps R so that J~ never jumps; and a margin, for any form: aim at less than d,
# so that a learner that ends beside its aim is still within d
OURS = ("cmdp-margin", "cmdp-overshoot", "cmdp-overshoot-margin", "cmdp-hinge", "cmdp-hinge-margin")
FORMS = ("exhausted", "overshoot", "hinge")  # of the modified reward, those that know the budget
