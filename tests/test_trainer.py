"""The trainer: agreement with TRL's own, with the formulas written out, and with itself under every way to run it.

In one process: test_distributed.py has several.
"""

import copy
import functools
import gc
import itertools
import math
import warnings
import weakref

import pytest
import torch
from conftest import COMPLETIONS, EOS, MAX_LENGTH, PROMPTS, make_gpt2, score
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

from cmdp.divergence import divergence_from_logits
from cmdp.methods import METHODS
from cmdp.reward import FORMS, modified_reward
from cmdp.trainer import CMDPConfig, CMDPTrainer

GROUP = 4
BUDGET = 4.0  # nats: some of the fixed completions keep it, some do not (asserted below)
COMMON = {
    "learning_rate": 0.05,
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "max_completion_length": MAX_LENGTH,
    "lr_scheduler_type": "constant",
    "shuffle_dataset": False,
    "gradient_checkpointing": False,
    "bf16": False,
    "use_cpu": True,
    "report_to": [],
    "disable_tqdm": True,
    "save_strategy": "no",
    "logging_steps": 1,
}


def fixed(trainer_class):
    """`trainer_class` with `COMPLETIONS` in place of generation; records the loss and gradient of every step."""

    class Fixed(trainer_class):
        def _generate_single_turn(self, prompt_ids, *_, **__):
            first = self.accelerator.process_index * len(prompt_ids)
            ids = COMPLETIONS[first : first + len(prompt_ids)]
            return ids if trainer_class is DistillationTrainer else (ids, None)

        def training_step(self, *arguments, **options):
            loss = super().training_step(*arguments, **options)
            self.__dict__.setdefault("losses", []).append(loss.detach())
            return loss

    return Fixed


class Gradients(TrainerCallback):
    """Keeps the gradient of every optimisation step, by parameter name."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.steps.append(gradient_of(model))


def gradient_of(model) -> dict[str, torch.Tensor]:
    named = ((name.removeprefix("module."), p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: p.grad.clone() for name, p in named}


def rows(group: int = GROUP) -> list[dict[str, str]]:
    return [{"prompt": PROMPTS[index // group]} for index in range(len(COMPLETIONS))]


def build(student, teacher, tokenizer, out, trainer_class=CMDPTrainer, generate=False, peft_config=None, **options):
    """A trainer on the fixed completions, or with `generate` on its own."""
    options = {**COMMON, "output_dir": str(out), **options}
    recorded = Gradients()
    more = {
        "train_dataset": Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS * 8]),
        "processing_class": tokenizer,
        "peft_config": peft_config,
        "callbacks": [recorded],
    }
    kind = trainer_class if generate else fixed(trainer_class)
    if trainer_class is DistillationTrainer:
        args = DistillationConfig(**{"per_device_train_batch_size": 8, **options})
        trainer = kind(student, teacher, args=args, **more)
    else:
        options = {"per_device_train_batch_size": 8, "num_generations": GROUP, "loss_type": "dapo", **options}
        if trainer_class is GRPOTrainer:
            trainer = kind(student, score, args=GRPOConfig(**options), **more)
        else:
            trainer = kind(student, teacher, score, CMDPConfig(**options), **more)
    trainer.recorded = recorded.steps
    return trainer


def one_step(trainer, group: int = GROUP) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient on the fixed completions in one batch, without an optimiser."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(rows(group)))
    loss.backward()
    return loss.item(), gradient_of(trainer.model)


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Relative error of the whole gradient."""
    assert ours.keys() == theirs.keys()
    difference = sum((ours[name] - theirs[name]).double().square().sum() for name in ours)
    size = sum(theirs[name].double().square().sum() for name in ours)
    assert size > 0
    return (difference / size).sqrt().item()


# ---- positions ----


@pytest.mark.parametrize("divergence", ["reverse_kl", "k2"])
def test_padding_moves_no_learned_position_of_student_or_teacher(tokenizer, tmp_path, divergence):
    """Costs, and the divergence in the loss, are those of completions without padding."""
    student, teacher = make_gpt2(tokenizer, seed=0), make_gpt2(tokenizer, seed=1, hidden=24)
    cost = 0.0
    for row, completion in enumerate(COMPLETIONS):
        prompt = tokenizer(PROMPTS[row // GROUP], add_special_tokens=False).input_ids
        ids, at = torch.tensor([prompt + completion]), len(prompt) - 1
        with torch.no_grad():
            logits = [model(ids).logits[0, at:-1] for model in (student, teacher)]
        chosen = [x.log_softmax(-1).gather(-1, ids[0, at + 1 :, None])[:, 0] for x in logits]
        each = divergence_from_logits(*logits) if divergence == "reverse_kl" else (chosen[1] - chosen[0]).square() / 2
        cost += each.sum().item()
    options = {"reward_form": "lagrangian", "lam": 1.0, "divergence": divergence}
    trainer = build(student, teacher, tokenizer, tmp_path, **options)
    one_step(trainer)
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert logged["cost/mean"] == pytest.approx(cost / len(COMPLETIONS), rel=1e-4)
    assert logged["loss/single_step"] == pytest.approx(cost / sum(map(len, COMPLETIONS)), rel=1e-4)
    told = []
    student.transformer.register_forward_pre_hook(
        lambda _, __, call: told.append(call["position_ids"]), with_kwargs=True
    )
    one_step(build(student, teacher, tokenizer, tmp_path, reward_form="lagrangian", lam=0.0))
    assert [sorted(ids[:, 4].tolist()) for ids in told] == 2 * [[2, 2, 2, 2, 4, 4, 4, 4]]  # prompts end


# ---- agreement with TRL's own trainers ----


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo"])
@pytest.mark.parametrize("scale_rewards", ["none", "group"])
@pytest.mark.parametrize(
    "inherited",
    [
        {},
        {"mask_truncated_completions": True},
        {"importance_sampling_level": "sequence"},
        {"delta": 1.1, "epsilon_high": 0.3, "entropy_coef": 0.1},
        {"pad_to_multiple_of": 16},
    ],
    ids=str,
)
def test_as_grpo_it_has_the_loss_and_gradient_of_trl(
    student, teacher, tokenizer, tmp_path, loss_type, scale_rewards, inherited
):
    options = {"loss_type": loss_type, "scale_rewards": scale_rewards, **inherited}
    theirs = one_step(build(copy.deepcopy(student), None, tokenizer, tmp_path, GRPOTrainer, beta=0.0, **options))
    ours = one_step(build(student, teacher, tokenizer, tmp_path, **METHODS["grpo"], **options))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5, abs=1e-7)
    assert distance(ours[1], theirs[1]) < 1e-5


@pytest.mark.parametrize("form", ["exhausted", "overshoot", "hinge", "lagrangian"])
def test_without_penalties_every_form_is_grpo(student, teacher, tokenizer, tmp_path, form):
    theirs = one_step(
        build(copy.deepcopy(student), None, tokenizer, tmp_path, GRPOTrainer, beta=0.0, scale_rewards="none")
    )
    ours = one_step(build(student, teacher, tokenizer, tmp_path, reward_form=form, lam=0.0, budget=math.inf))
    assert distance(ours[1], theirs[1]) < 1e-5


@pytest.mark.parametrize(
    ("divergence", "beta"), [("reverse_kl", 1.0), ("forward_kl", 0.0), ("jsd", 0.3)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_as_gkd_it_has_the_loss_and_gradient_of_trl(
    student, teacher, tokenizer, tmp_path, divergence, beta, temperature
):
    theirs = one_step(
        build(
            copy.deepcopy(student),
            copy.deepcopy(teacher),
            tokenizer,
            tmp_path,
            DistillationTrainer,
            beta=beta,
            temperature=temperature,
        )
    )
    options = {"divergence": divergence, "jsd_beta": 0.3, "temperature": temperature}
    ours = one_step(build(student, teacher, tokenizer, tmp_path, **METHODS["gkd"], **options))
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert distance(ours[1], theirs[1]) < 1e-5


# ---- agreement with the formulas, written out ----


def token_values(model, teacher, prompt_ids, ids, divergence):
    """log pi(a_t | s_t), D_t: one completion at a time, no padding, from full logits."""
    sequence = torch.tensor([prompt_ids + ids])
    p = model(input_ids=sequence).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
    with torch.no_grad():
        q = teacher(input_ids=sequence).logits[0, -len(ids) - 1 : -1].log_softmax(-1)
    taken = torch.tensor(ids)[:, None]
    logp, log_u = p.gather(1, taken)[:, 0], (q - p).gather(1, taken)[:, 0]
    if divergence == "reverse_kl":
        return logp, (p.exp() * (p - q)).sum(-1)
    if divergence == "forward_kl":
        return logp, (q.exp() * (q - p)).sum(-1)
    if divergence == "jsd":
        m = ((p.exp() + q.exp()) / 2).log()
        return logp, ((q.exp() * (q - m)).sum(-1) + (p.exp() * (p - m)).sum(-1)) / 2
    return logp, {"k1": -log_u, "k2": log_u**2 / 2, "k3": log_u.exp() - 1 - log_u}[divergence]


def reference(
    model,
    teacher,
    tokenizer,
    reward_form="exhausted",
    lam=1.0,
    penalty=0.0,
    budget=BUDGET,
    budget_form="total",
    discount=1.0,
    divergence="reverse_kl",
    loss_type="dapo",
    margin=0.0,
    step_budget=None,
    long_term=True,
    **_,
) -> torch.Tensor:
    """The loss of section 6 whose gradient is section 4 (c), from its formulas: a loop over completions and tokens."""
    rewards, policy, direct, tokens, violations = score(COMPLETIONS), [], [], 0, 0
    returns = []
    for index, ids in enumerate(COMPLETIONS):
        prompt_ids = tokenizer(PROMPTS[index // GROUP]).input_ids
        logp, cost = token_values(model, teacher, prompt_ids, ids, divergence)
        limit = (1 - margin) * budget * (len(ids) if budget_form == "per_token" else 1)
        if step_budget is not None:
            cost, limit = (cost - step_budget).clamp(min=0), 0.0
        paid = cost.detach()
        gammas = torch.tensor([discount**t for t in range(len(ids))])
        over = (gammas * paid).cumsum(0) > limit
        spent = (gammas * paid).sum()
        if reward_form == "exhausted":
            total, charge = (0.0 if over[-1] else rewards[index]) - penalty * over.any(), lam * (paid * over).sum()
            charged = over.float()
        elif reward_form in ("overshoot", "hinge"):
            kept = rewards[index] if spent <= limit or reward_form == "hinge" else 0.0
            total, charge = (kept - penalty, lam * (spent - limit)) if spent > limit else (kept, 0.0)
            charged = gammas * (spent > limit)
        elif reward_form == "soft_hinge":  # at the first step of one, where k is whole and u at its start
            shift = [torch.nn.functional.softplus(torch.as_tensor(x)) for x in (10 * (spent / limit - 1) - 1, -11.0)]
            total, charge = rewards[index], lam * limit / 10 * (shift[0] - shift[1])
            charged = gammas * torch.sigmoid(10 * (spent / limit - 1) - 1)
        else:
            total, charge = rewards[index], lam * spent
            charged = gammas
        returns.append(float(total - charge if long_term else total))
        policy.append((logp - logp.detach()).exp().sum())  # the ratio pi / pi_old, which is 1
        # the gradient of k1 itself is that of log pi, whose mean is zero unless its factor depends on the tokens
        alone = divergence == "k1" and reward_form == "lagrangian"
        direct.append(lam * (charged * (paid if alone else cost)).sum())
        tokens += len(ids)
        violations += bool(over[-1])
    assert 0 < violations < len(COMPLETIONS), violations
    loss = 0.0
    for index in range(len(COMPLETIONS)):
        group = returns[index // GROUP * GROUP :][:GROUP]
        advantage = returns[index] - sum(group) / GROUP
        loss = loss - advantage * policy[index] + direct[index]
    return loss / (tokens if loss_type == "dapo" else len(COMPLETIONS) * MAX_LENGTH)


CASES = {
    "exhausted": {"reward_form": "exhausted"},
    "exhausted-penalty": {"reward_form": "exhausted", "lam": 0.7, "penalty": 0.9, "loss_type": "dr_grpo"},
    "exhausted-per-token": {"reward_form": "exhausted", "budget_form": "per_token", "budget": 0.8},
    "exhausted-discounted": {"reward_form": "exhausted", "discount": 0.9},
    "overshoot": {"reward_form": "overshoot", "lam": 0.5},
    "overshoot-discounted": {"reward_form": "overshoot", "penalty": 0.5, "discount": 0.9, "loss_type": "dr_grpo"},
    "hinge": {"reward_form": "hinge", "lam": 0.5, "penalty": 0.3, "discount": 0.9},
    "soft-hinge": {"reward_form": "soft_hinge", "lam": 0.7, "csr_target": 0.9, "dual_rate": 0.5},
    "lagrangian": {"reward_form": "lagrangian", "lam": 0.1},
    "margin": {"reward_form": "overshoot", "margin": 0.2},
    "worst-case": {"reward_form": "overshoot", "step_budget": 0.9},
    "single-step": {"reward_form": "hinge", "long_term": False, "penalty": 0.3},
    "single-step-lagrangian": {"reward_form": "lagrangian", "long_term": False, "lam": 0.2},
    "forward-kl": {"reward_form": "exhausted", "divergence": "forward_kl"},
    "jsd": {"reward_form": "overshoot", "divergence": "jsd", "budget": 0.8},
    "k1": {"reward_form": "exhausted", "divergence": "k1"},
    "k1-lagrangian": {"reward_form": "lagrangian", "divergence": "k1", "lam": 0.2},
    "k2": {"reward_form": "exhausted", "divergence": "k2"},
    "k3": {"reward_form": "overshoot", "divergence": "k3"},
}


@pytest.mark.parametrize("case", CASES)
def test_gradient_is_that_of_the_formulas_written_out(student, teacher, tokenizer, tmp_path, case):
    options = {"budget": BUDGET, "lam": 1.0, **CASES[case]}
    plain_student, plain_teacher = copy.deepcopy(student), copy.deepcopy(teacher)
    expected = reference(plain_student, plain_teacher, tokenizer, **options)
    expected.backward()
    loss, gradient = one_step(build(student, teacher, tokenizer, tmp_path, **options))
    assert loss == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert distance(gradient, gradient_of(plain_student)) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_k1_charges_the_gradient_of_what_is_expected(form):
    """One token of three, its reward and k1 enumerated: credit alone is the gradient of the soft Lagrangian only."""
    logits = torch.tensor([0.3, -0.2, 1.0], dtype=torch.float64, requires_grad=True)
    logp, task = logits.log_softmax(0), torch.tensor([1.0, 0.0, 0.5])
    cost, mask, budget = (logp - math.log(1 / 3))[:, None], torch.ones(3, 1), torch.full((3,), 0.2)
    paid = modified_reward(task, cost, mask, budget, lam=0.7, form=form)
    exact = torch.autograd.grad((logp.exp() * paid.total).sum(), logits, retain_graph=True)[0]
    credit = logp.exp().detach() * paid.total.detach() * logp
    own = logp.exp().detach() * paid.weight[:, 0].detach() * cost[:, 0]
    alone = torch.autograd.grad(credit.sum(), logits, retain_graph=True)[0]
    both = torch.autograd.grad((credit - own).sum(), logits)[0]
    assert both == pytest.approx(exact)
    assert torch.allclose(alone, exact) == (form == "lagrangian")


@pytest.mark.parametrize("case", ["exhausted", "overshoot", "k2"])
def test_gradient_is_that_of_finite_differences_of_the_loss(student, teacher, tokenizer, tmp_path, case):
    """With the old log-probabilities, advantages and charges held fixed, as in an update after the scoring pass."""
    # the clip is opened: its kink stands nowhere near
    options = {"budget": BUDGET, "num_iterations": 2, "epsilon": 0.9, **CASES[case]}
    trainer = build(student, teacher, tokenizer, tmp_path, **options)
    _, gradient = one_step(trainer)
    inputs = trainer._buffered_inputs[0]
    generator = torch.Generator().manual_seed(0)
    start = {name: p.detach().clone() for name, p in student.named_parameters()}
    direction = {name: torch.randn(p.shape, generator=generator) for name, p in start.items()}
    slope = sum((gradient[name] * direction[name]).sum() for name in start).item()

    def loss_at(step):
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                parameter.copy_(start[name] + step * direction[name])
            return trainer.compute_loss(student, inputs).item()

    step = 1e-3
    # fourth order, so that the step can be large enough for float32
    difference = (8 * (loss_at(step) - loss_at(-step)) - loss_at(2 * step) + loss_at(-2 * step)) / (12 * step)
    assert difference == pytest.approx(slope, rel=3e-3)


def test_the_teacher_gets_no_gradient_and_stays_as_it_was(student, teacher, tokenizer, tmp_path):
    before = copy.deepcopy(teacher.state_dict())
    trainer = build(student, teacher, tokenizer, tmp_path, budget=BUDGET, max_steps=2)
    trainer.train()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"distil_steps": 1}, METHODS["gkd"]),
        ({"csr_target": 1.0}, {"reward_form": "lagrangian"}),  # some of the completions violate
        ({"csr_target": 0.1}, {}),
        ({"budget_from": BUDGET / 2}, {"budget": BUDGET / 2}),
    ],
    ids=str,
)
def test_a_step_follows_the_objective_that_it_is_due(original_pair, tokenizer, tmp_path, options, same):
    """Distillation is gkd's; below the asked-for CSR a step is the soft Lagrangian's; a schedule moves the budget."""
    settings = {"budget": BUDGET, "reward_form": "hinge"}
    ours = one_step(build(*copy.deepcopy(original_pair), tokenizer, tmp_path, **settings, **options))
    expected = one_step(build(*copy.deepcopy(original_pair), tokenizer, tmp_path, **settings | same))
    assert ours[0] == pytest.approx(expected[0], rel=1e-5)
    assert distance(ours[1], expected[1]) < 1e-6


def test_after_its_distillation_a_run_follows_its_method(original_pair, tokenizer, tmp_path):
    options = {"budget": BUDGET, "reward_form": "hinge", "max_steps": 2, "learning_rate": 0.0}
    trainers = [
        build(*copy.deepcopy(original_pair), tokenizer, tmp_path, **options, distil_steps=steps) for steps in (0, 1)
    ]
    for trainer in trainers:
        trainer.train()
    (first, second), (distilled, followed) = ([x for x in t.state.log_history if "csr" in x] for t in trainers)
    assert distilled["modified_reward"] != pytest.approx(first["modified_reward"], rel=1e-3)
    assert followed["modified_reward"] == pytest.approx(second["modified_reward"], rel=1e-5)


@pytest.mark.parametrize("method", ["dual", "cmdp-chance"])
def test_the_multiplier_rests_while_a_run_distils(original_pair, tokenizer, tmp_path, method):
    options = METHODS[method] | {"budget": BUDGET, "dual_rate": 0.5, "lam": 0.5, "distil_steps": 2, "max_steps": 4}
    trainer = build(*copy.deepcopy(original_pair), tokenizer, tmp_path, **options, learning_rate=0.0)
    start = trainer.args.lam if method == "dual" else -1.0
    trainer.train()
    name = "lambda" if method == "dual" else "offset"
    moved = [row[name] for row in trainer.state.log_history if "csr" in row][2:]
    assert moved[0] == start
    assert moved[1] != start


@pytest.mark.parametrize("restore", [False, True])
def test_dual_ascent_follows_the_mean_excess_and_survives_a_resume(original_pair, tokenizer, tmp_path, restore):
    """lambda rises by rate times E[C] - d; a resumed run goes on with the lambda that its checkpoint had."""
    options = {"reward_form": "lagrangian", "lam": 0.1, "dual_rate": 0.05, "budget": BUDGET}
    options |= {"save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": restore}
    options |= {"max_steps": 4, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    whole = build(*copy.deepcopy(original_pair), tokenizer, tmp_path, **options)
    whole.train()
    log = [entry for entry in whole.state.log_history if "csr" in entry]
    expected = 0.1
    for entry in log:
        assert entry["lambda"] == pytest.approx(expected, rel=1e-5)
        expected = max(0.0, expected + 0.05 * (entry["cost/mean"] - BUDGET))
    assert log[-1]["lambda"] != pytest.approx(0.1, rel=1e-3)
    resumed = build(*copy.deepcopy(original_pair), tokenizer, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [e["lambda"] for e in resumed.state.log_history if "csr" in e] == [e["lambda"] for e in log]


def test_the_offset_of_soft_hinge_follows_a_quantile_of_the_cost_and_survives_a_resume(
    original_pair, tokenizer, tmp_path
):
    """u rises by rate times the clipped quantile of C/d - 1; a resumed run goes on with it."""
    options = {"reward_form": "soft_hinge", "csr_target": 0.9, "dual_rate": 0.5, "budget": BUDGET, "save_steps": 2}
    options |= {"max_steps": 4, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "save_strategy": "steps"}
    whole = build(*copy.deepcopy(original_pair), tokenizer, tmp_path, **options)
    whole.train()
    offsets = [entry["offset"] for entry in whole.state.log_history if "csr" in entry]
    assert offsets[0] == -1.0
    spent = [entry["cost/q90"] for entry in whole.state.log_history if "csr" in entry]
    moves = [after - before for before, after in itertools.pairwise(offsets)]
    assert moves == pytest.approx([0.5 * min(max(q90 / BUDGET - 1, -0.2), 0.2) for q90 in spent[:-1]], rel=1e-5)
    resumed = build(*copy.deepcopy(original_pair), tokenizer, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [entry["offset"] for entry in resumed.state.log_history if "csr" in entry] == offsets


def test_credit_token_by_token_reaches_the_policy(original_pair, tokenizer, tmp_path):
    """The loss of an on-policy step is minus the mean of the advantages, which a baseline centres; its gradient is not
    that of the credit to the sequence."""
    options = {"budget": BUDGET, "reward_form": "exhausted"}
    sequence, token = (
        one_step(build(*copy.deepcopy(original_pair), tokenizer, tmp_path, **options, credit=credit))
        for credit in ("sequence", "return_to_go")
    )
    assert math.isfinite(token[0])
    assert distance(token[1], sequence[1]) > 1e-2


# ---- completions that were sampled otherwise, or that the loss leaves out ----


def test_k2_of_an_older_students_completions_is_corrected_by_the_importance_ratio(
    student, teacher, tokenizer, tmp_path
):
    """Its gradient, ratio * k1 * grad log pi, is then that of the reverse KL under the student of now."""
    options = {"budget": BUDGET, "num_iterations": 2, "task_weight": 0.0}
    old, new = copy.deepcopy(student), copy.deepcopy(student)
    trainer = build(student, teacher, tokenizer, tmp_path, **METHODS["kdrl"], **options)
    one_step(trainer)
    with torch.no_grad():
        for parameter in (*student.parameters(), *new.parameters()):
            parameter *= 1.1
    expected, ratios = 0.0, []
    for index, ids in enumerate(COMPLETIONS):
        prompt_ids = tokenizer(PROMPTS[index // GROUP]).input_ids
        logp, k2 = token_values(new, teacher, prompt_ids, ids, "k2")
        ratios.append((logp - token_values(old, teacher, prompt_ids, ids, "k2")[0]).exp().detach())
        expected = expected + (ratios[-1] * k2).sum() / sum(map(len, COMPLETIONS))
    assert (torch.cat(ratios) - 1).abs().max() > 0.1
    expected.backward()
    student.zero_grad()
    trainer.compute_loss(student, trainer._buffered_inputs[0]).backward()
    assert distance(gradient_of(student), gradient_of(new)) < 1e-5


@pytest.mark.parametrize("shape", [(8, 1), (8, MAX_LENGTH)], ids=["per sequence", "per token"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "k2"])
def test_vllms_importance_ratio_weighs_both_parts_of_the_loss(student, teacher, tokenizer, tmp_path, shape, divergence):
    trainer = build(student, teacher, tokenizer, tmp_path, budget=BUDGET, divergence=divergence)
    one_step(trainer)
    trainer.use_vllm = True
    inputs, ratio = trainer._buffered_inputs[0], torch.rand(shape, generator=torch.Generator().manual_seed(0))
    weighted = {name: inputs[name] * ratio for name in ("single_step_weight",)}
    weighted["advantages"] = inputs["advantages"][:, None] * ratio
    gradients = []
    for changes in ({"importance_sampling_ratio": ratio}, weighted | {"importance_sampling_ratio": torch.ones(8, 1)}):
        student.zero_grad()
        trainer.compute_loss(student, inputs | changes).backward()
        gradients.append(gradient_of(student))
    assert distance(*gradients) < 1e-5


@pytest.mark.parametrize("options", [{}, {"divergence": "k2"}, {"num_iterations": 2}], ids=str)
def test_truncated_completions_are_measured_whether_the_loss_masks_them_or_not(
    original_pair, tokenizer, tmp_path, options
):
    """The two completions that reach the limit are out of the loss, and in the CSR, the cost and the group's mean."""
    settings = {"budget": BUDGET, "reward_form": "hinge", "max_steps": 1, "logging_steps": 1, **options}
    seen = []
    for masks in (False, True):
        trainer = build(
            *copy.deepcopy(original_pair), tokenizer, tmp_path, mask_truncated_completions=masks, **settings
        )
        trainer.train()
        inputs = trainer._buffered_inputs[0]
        left_out = inputs["completion_mask"].sum(1) == 0
        cut = sorted(map(tuple, inputs["completion_ids"][left_out].tolist()))
        advantages = inputs["advantages"].sort().values
        seen.append((trainer.state.log_history[0], cut, inputs["num_items_in_batch"].item(), advantages))
    measured = ("csr", "cost/mean", "cost/q90", "kl_per_token", "modified_reward", "task_reward", "over_budget_tokens")
    (kept, none, tokens, advantages), (masked, cut, fewer, others) = seen
    assert {name: masked[name] for name in measured} == {name: kept[name] for name in measured}
    torch.testing.assert_close(others, advantages)
    truncated = sorted(tuple(ids) for ids in COMPLETIONS if ids[-1] != EOS)
    assert (none, cut) == ([], truncated)
    assert tokens - fewer == sum(map(len, truncated)) == 2 * MAX_LENGTH
    assert masked["loss/single_step"] != kept["loss/single_step"]


def test_the_table_of_completions_shows_the_advantages_of_the_modified_reward(student, teacher, tokenizer, tmp_path):
    trainer = build(student, teacher, tokenizer, tmp_path, budget=BUDGET, reward_form="hinge")
    one_step(trainer)
    shown, used = [*trainer._logs["advantages"]], trainer._buffered_inputs[0]["advantages"].tolist()
    assert len(shown) == len(trainer._logs["completion"]) == len(COMPLETIONS)
    assert sorted(shown) == pytest.approx(sorted(used))


# ---- the same mathematics however it is run ----


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo"])
@pytest.mark.parametrize("options", [CASES["exhausted"], CASES["k3"]], ids=["exhausted", "k3"])
def test_micro_batches_add_up_to_one_batch(original_pair, tokenizer, tmp_path, loss_type, options):
    runs = []
    for size, accumulation in ((8, 1), (4, 2), (2, 4), (1, 8)):
        trainer = build(
            *copy.deepcopy(original_pair),
            tokenizer,
            tmp_path,
            **{"budget": BUDGET, **options, "loss_type": loss_type},
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
        )
        trainer.train()
        log = trainer.state.log_history[0]
        runs.append((sum(trainer.losses).item(), trainer.recorded[0], log["loss/policy"] + log["loss/single_step"]))
    for loss, gradient, logged in runs:
        assert loss == pytest.approx(runs[0][0], rel=1e-5)
        assert logged == pytest.approx(runs[0][0], rel=1e-5)
        assert distance(gradient, runs[0][1]) < 1e-5


@pytest.mark.parametrize(
    "reuse", [{"steps_per_generation": 4}, {"num_iterations": 2}], ids=["steps_per_generation", "num_iterations"]
)
def test_later_steps_on_a_generation_use_the_old_log_probabilities(original_pair, tokenizer, tmp_path, reuse):
    """Two optimisation steps on one generation. The second is checked against the clipped ratio written out."""
    options = {"budget": BUDGET, "lam": 1.0, "learning_rate": 0.3, "max_steps": 2, "gradient_accumulation_steps": 2}
    size = 2 if "steps_per_generation" in reuse else 4
    trainer = build(
        *copy.deepcopy(original_pair), tokenizer, tmp_path, per_device_train_batch_size=size, **options, **reuse
    )
    seen = []

    def compute_loss(model, inputs):
        seen.append((copy.deepcopy(inputs), {name: p.detach().clone() for name, p in model.named_parameters()}))
        return type(trainer)._compute_loss(trainer, model, inputs)

    trainer._compute_loss = compute_loss
    trainer.train()
    assert len(seen) == 4

    initial, teacher = copy.deepcopy(original_pair)
    current = copy.deepcopy(initial)
    current.load_state_dict(seen[2][1], strict=False)  # tied weights appear once
    loss, clipped = 0.0, 0
    tokens = sum(map(len, COMPLETIONS)) / (2 if "steps_per_generation" in reuse else 1)  # of one optimisation step
    for inputs, _ in seen[2:]:
        for row in range(size):
            kept, prompt = inputs["completion_mask"][row] == 1, inputs["prompt_mask"][row] == 1
            ids, prompt_ids = inputs["completion_ids"][row][kept].tolist(), inputs["prompt_ids"][row][prompt].tolist()
            logp, cost = token_values(current, teacher, prompt_ids, ids, "reverse_kl")
            with torch.no_grad():
                old, _ = token_values(initial, teacher, prompt_ids, ids, "reverse_kl")
            torch.testing.assert_close(inputs["old_per_token_logps"][row][kept], old, rtol=1e-4, atol=1e-5)
            ratio, advantage = (logp - old).exp(), inputs["advantages"][row]
            policy = torch.min(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            clipped += (policy != ratio * advantage).sum().item()
            loss = loss + (inputs["single_step_weight"][row][kept] * cost - policy).sum() / tokens
    assert clipped > 0
    loss.backward()
    assert sum(trainer.losses[2:]).item() == pytest.approx(loss.item(), rel=1e-5)
    assert distance(trainer.recorded[1], gradient_of(current)) < 1e-5


def test_gradient_checkpointing_changes_nothing(original_pair, tokenizer, tmp_path):
    runs = []
    for checkpointing in (False, True):
        trainer = build(
            *copy.deepcopy(original_pair),
            tokenizer,
            tmp_path,
            budget=BUDGET,
            gradient_checkpointing=checkpointing,
            max_steps=1,
        )
        trainer.train()
        assert trainer.accelerator.unwrap_model(trainer.model).is_gradient_checkpointing == checkpointing
        runs.append((trainer.losses[0].item(), trainer.recorded[0]))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-6)
    assert distance(runs[1][1], runs[0][1]) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("case", ["exhausted", "k3"])
def test_with_lora_the_adapters_get_the_gradient_of_the_formulas(
    student, teacher, tokenizer, tmp_path, case, checkpointing
):
    from peft import LoraConfig

    options = {"budget": BUDGET, "lam": 1.0, **CASES[case]}
    trainer = build(
        student,
        copy.deepcopy(teacher),
        tokenizer,
        tmp_path,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False),
        gradient_checkpointing=checkpointing,
        max_steps=1,
        learning_rate=0.0,
        **options,
    )
    trainer.train()
    assert all("lora" in name for name in trainer.recorded[0])
    trainer.model.zero_grad()
    expected = reference(trainer.model, teacher, tokenizer, **options)
    expected.backward()
    assert trainer.losses[0].item() == pytest.approx(expected.item(), rel=1e-5)
    assert distance(trainer.recorded[0], gradient_of(trainer.model)) < 1e-5


def test_a_run_that_is_resumed_ends_where_an_uninterrupted_one_does(original_pair, tokenizer, tmp_path):
    """To the bit: data order, optimiser, schedule and the state of the sampler all come back from the checkpoint."""
    options = {
        "generate": True,
        "budget": BUDGET,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
    }
    straight = build(*copy.deepcopy(original_pair), tokenizer, tmp_path / "run", **options)
    straight.train()
    resumed = build(*copy.deepcopy(original_pair), tokenizer, tmp_path / "run", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    changed = 0
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
        changed += not torch.equal(value, original_pair[0].state_dict()[name])
    assert changed > 0
    ours, theirs = ({r["step"]: r for r in run.state.log_history if "csr" in r} for run in (straight, resumed))
    for name in ("loss", "csr", "cost/mean", "task_reward"):
        assert ours[4][name] == theirs[4][name]


def test_a_saved_student_is_an_ordinary_model_without_a_teacher(student, teacher, tokenizer, tmp_path):
    trainer = build(student, teacher, tokenizer, tmp_path / "run", generate=True, budget=BUDGET, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits, rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in student.parameters())


def test_a_trainer_that_is_gone_frees_its_optimiser_though_the_student_lives(student, teacher, tokenizer, tmp_path):
    trainer = build(student, teacher, tokenizer, tmp_path, budget=BUDGET, max_steps=1, optim="adamw_torch")
    trainer.train()
    optimiser = weakref.ref(trainer.optimizer)
    assert optimiser() is not None
    del trainer
    gc.collect()
    assert optimiser() is None
    assert student(torch.tensor([[3, 4, 5]])).logits.isfinite().all()


def test_a_second_trainer_on_the_same_student_is_like_a_first(original_pair, tokenizer, tmp_path):
    student, teacher = copy.deepcopy(original_pair)
    first = one_step(build(student, teacher, tokenizer, tmp_path, budget=BUDGET))
    second = one_step(build(student, teacher, tokenizer, tmp_path, budget=BUDGET, reward_form="hinge"))
    fresh = one_step(build(*copy.deepcopy(original_pair), tokenizer, tmp_path, budget=BUDGET, reward_form="hinge"))
    assert second[0] == fresh[0] != first[0]
    assert distance(second[1], fresh[1]) == 0


def test_under_fp16_what_is_trained_is_held_in_float32(student, teacher, tokenizer, tmp_path, monkeypatch):
    """Its gradient scaler takes no bfloat16, in which TRL holds the adapter of a 4-bit student."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(student.bfloat16(), LoraConfig(r=2, target_modules=["q_proj"]), autocast_adapter_dtype=False)
    options = {**COMMON, "output_dir": str(tmp_path), "num_generations": GROUP, "budget": BUDGET}
    args = CMDPConfig(**options, per_device_train_batch_size=8)
    args.fp16 = True  # a CPU refuses to train in it
    data = Dataset.from_list(rows())
    CMDPTrainer(model, teacher, score, args, train_dataset=data, processing_class=tokenizer)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


# ---- adapters on the LM head ----


def with_adapter_on_head(model, kind: str):
    """(the PEFT model with a random adapter on its head, the model with the adapter merged)."""
    from peft import LoraConfig, get_peft_model

    adapted = untied(model)
    names = {
        "lora": {"target_modules": ["lm_head"]},
        "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    }[kind]
    wrapped = get_peft_model(adapted, LoraConfig(r=2, init_lora_weights=False, **names))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    return wrapped, copy.deepcopy(wrapped).merge_and_unload()


def untied(model, bias: torch.Tensor | None = None):
    """A copy whose head has a weight of its own, and a bias."""
    model = copy.deepcopy(model)
    old = model.get_output_embeddings()
    new = nn.Linear(old.in_features, old.out_features, bias=bias is not None)
    new.weight.data = old.weight.data.clone()
    if bias is not None:
        new.bias.data = bias
        new.bias.requires_grad_(False)
    model.config.tie_word_embeddings = False
    model.set_output_embeddings(new)
    return model


@pytest.mark.parametrize("kind", ["lora", "modules_to_save"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "k2"])
def test_a_teachers_adapter_on_its_head_is_charged_as_if_merged(original_pair, tokenizer, tmp_path, kind, divergence):
    student, teacher = original_pair
    adapted, merged = with_adapter_on_head(teacher, kind)
    options = {"budget": BUDGET, "max_steps": 1, "divergence": divergence}
    if (kind, divergence) == ("lora", "k2"):  # TRL's fused head, which serves the sampled ones, reads past it
        with pytest.raises(ValueError, match="adapter on the teacher's LM head would be ignored"):
            build(copy.deepcopy(student), adapted, tokenizer, tmp_path, **options)
        return
    costs = []
    for model in (adapted, merged, adapted.get_base_model(), untied(teacher)):
        trainer = build(copy.deepcopy(student), model, tokenizer, tmp_path, **options)
        trainer.train()
        costs.append(trainer.state.log_history[0]["cost/mean"])
    assert costs[:3] == pytest.approx(costs[1:2] * 3, rel=1e-4)
    assert abs(costs[0] - costs[3]) > 0.1 * costs[3]


def test_a_teacher_with_a_learned_prompt_is_refused(student, teacher, tokenizer, tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    prompted = get_peft_model(teacher, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="The teacher has a learned prompt"):
        build(student, prompted, tokenizer, tmp_path, budget=BUDGET)


def test_a_students_adapter_on_its_head_is_refused_and_a_copy_of_the_head_is_trained(
    original_pair, tokenizer, tmp_path
):
    from peft import LoraConfig

    student, teacher = original_pair
    adapted = with_adapter_on_head(student, "lora")[0].get_base_model()
    with pytest.raises(ValueError, match="adapter on the student's LM head would be ignored"):
        build(adapted, teacher, tokenizer, tmp_path, budget=BUDGET)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model, options = untied(student), {"budget": BUDGET, "lam": 1.0}
    trainer = build(model, copy.deepcopy(teacher), tokenizer, tmp_path, peft_config=config, **options)
    loss, gradient = one_step(trainer)
    trainer.model.zero_grad()
    expected = reference(trainer.model, teacher, tokenizer, **options)
    expected.backward()
    assert any("modules_to_save" in name for name in gradient)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert distance(gradient, gradient_of(trainer.model)) < 1e-5


# ---- numbers that are not finite ----


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "jsd"])
def test_models_that_rule_out_the_same_tokens_train(original_pair, tokenizer, tmp_path, divergence):
    bias = torch.zeros(len(tokenizer))
    bias[26:] = -math.inf  # in none of the completions
    models = [untied(model, bias.clone()) for model in original_pair]
    options = {"budget": BUDGET, "divergence": divergence, "max_steps": 2, "entropy_coef": 0.1}
    trainer = build(*models, tokenizer, tmp_path, **options)
    trainer.train()
    assert all(p.isfinite().all() for p in models[0].parameters() if p.requires_grad)
    assert trainer.state.log_history[0]["cost/mean"] > 0


def nan_in(model):
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = math.nan


def ruled_out(model):
    model.set_output_embeddings(untied(model, torch.zeros(27).index_fill(0, torch.arange(5, 10), -math.inf)).lm_head)


@pytest.mark.parametrize("form", ["exhausted", "overshoot", "hinge", "lagrangian", "return_to_go", "k2"])
@pytest.mark.parametrize("fault", [nan_in, ruled_out])
def test_a_cost_that_is_not_finite_stops_the_training(student, teacher, tokenizer, tmp_path, form, fault):
    changed = {"return_to_go": {"credit": form}, "k2": {"divergence": form}}.get(form, {"reward_form": form})
    fault(teacher)
    stops_before_the_update(student, teacher, tokenizer, tmp_path, "The cost of a completion is not finite", **changed)


def stops_before_the_update(student, teacher, tokenizer, out, message, reward=None, **options):
    before = copy.deepcopy(student.state_dict())
    trainer = build(student, teacher, tokenizer, out, max_steps=2, **{"budget": BUDGET, **options})
    if reward is not None:
        trainer.reward_funcs = [lambda completion_ids, **_: reward]
    with pytest.raises(ValueError, match=f"{message} .*step 0"):
        trainer.train()
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_a_reward_that_is_not_finite_stops_the_training(student, teacher, tokenizer, tmp_path, value):
    reward = [value if index == 2 else 0.5 for index in range(len(COMPLETIONS))]
    stops_before_the_update(student, teacher, tokenizer, tmp_path, "A task reward is not finite", reward)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_stops_the_training(student, teacher, tokenizer, tmp_path, clip):
    student.model.norm.weight.register_hook(lambda gradient: gradient * math.nan)
    message = "The norm of the gradient is not finite"
    stops_before_the_update(student, teacher, tokenizer, tmp_path, message, max_grad_norm=clip)


def test_log_probabilities_that_are_not_finite_stop_the_training(student, teacher, tokenizer, tmp_path):
    def spoil(module, inputs, output):  # in the loss alone
        return output * math.nan if torch.is_grad_enabled() else output

    student.model.norm.register_forward_hook(spoil)
    stops_before_the_update(student, teacher, tokenizer, tmp_path, "A log-probability in loss/policy is not finite")


def test_a_budget_that_charges_nothing_warns(student, teacher, tokenizer, tmp_path):
    with pytest.warns(UserWarning, match="choose a budget between"):
        build(student, teacher, tokenizer, tmp_path, reward_form="hinge")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        build(student, teacher, tokenizer, tmp_path, reward_form="lagrangian")
        build(student, teacher, tokenizer, tmp_path, reward_form="hinge", budget=BUDGET)


# ---- what is logged ----

STABLE = (
    "loss",
    "task_reward",
    "modified_reward",
    "csr",
    "cost/mean",
    "cost/q50",
    "cost/q90",
    "kl_per_token",
    "remaining_budget",
    "over_budget_tokens",
    "entropy",
    "loss/policy",
    "loss/single_step",
    "time/generation",
    "time/scoring",
    "time/update",
)


@pytest.mark.parametrize("options", [{}, METHODS["grpo"], METHODS["gkd"]], ids=["cmdp", "grpo", "gkd"])
def test_every_step_logs_its_metrics_under_stable_names(student, teacher, tokenizer, tmp_path, options):
    trainer = build(student, teacher, tokenizer, tmp_path, generate=True, budget=BUDGET, max_steps=2, **options)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "csr" in row]
    assert [row["step"] for row in logs] == [1, 2]
    for row in logs:
        missing = [name for name in STABLE if not math.isfinite(row.get(name, math.nan))]
        assert not missing
        assert row["loss"] == pytest.approx(row["loss/policy"] + row["loss/single_step"], rel=1e-4, abs=1e-6)
        assert min(row[name] for name in STABLE if name.startswith("time/")) > 0


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2}], ids=["one step a generation", "two"])
def test_generation_scoring_and_update_make_up_the_time_of_a_step(student, teacher, tokenizer, tmp_path, options):
    """Also where an update has several micro-batches, and where TRL asks for the scoring pass itself."""
    trainer = build(
        student,
        teacher,
        tokenizer,
        tmp_path,
        generate=True,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=2,
        **options,
    )
    trainer.train()
    first, second = (row for row in trainer.state.log_history if "csr" in row or "time/update" in row)
    parts = [first[f"time/{name}"] for name in ("generation", "scoring", "update")]
    assert sum(parts) == pytest.approx(first["step_time"], rel=0.05)
    assert parts[1] > 0.1 * parts[2]  # a scoring pass is two forwards; an update a forward and a backward
    assert ("time/scoring" in second) == (not options)


def test_logged_numbers_are_those_of_the_completions(student, teacher, tokenizer, tmp_path):
    plain = copy.deepcopy(student)
    trainer = build(student, teacher, tokenizer, tmp_path, budget=BUDGET, max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    costs = []
    for index, ids in enumerate(COMPLETIONS):
        with torch.no_grad():
            prompt_ids = tokenizer(PROMPTS[index // GROUP]).input_ids
            costs.append(token_values(plain, teacher, prompt_ids, ids, "reverse_kl")[1])
    totals = torch.stack([cost.sum() for cost in costs])
    tokens = sum(map(len, COMPLETIONS))
    over = sum((cost.cumsum(0) > BUDGET).sum().item() for cost in costs)
    expected = {
        "task_reward": sum(score(COMPLETIONS)) / len(COMPLETIONS),
        "csr": (totals <= BUDGET).float().mean().item(),
        "cost/mean": totals.mean().item(),
        "cost/q50": totals.quantile(0.5).item(),
        "cost/q90": totals.quantile(0.9).item(),
        "kl_per_token": totals.sum().item() / tokens,
        "remaining_budget": BUDGET - totals.mean().item(),
        "over_budget_tokens": over / tokens,
    }
    assert {name: log[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_evaluation_logs_the_same_names_and_trains_nothing(student, teacher, tokenizer, tmp_path):
    trainer = build(student, teacher, tokenizer, tmp_path, generate=True, budget=BUDGET, per_device_eval_batch_size=8)
    trainer.eval_dataset = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    before = copy.deepcopy(student.state_dict())
    measured = trainer.evaluate(trainer.eval_dataset)
    log = {**measured, **trainer.state.log_history[-1]}
    missing = [name for name in STABLE if name != "time/update" and f"eval_{name}" not in log]
    assert not missing
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


# ---- edges ----


def test_unscored_completions_are_left_out_of_their_group(student, teacher, tokenizer, tmp_path):
    """The reward function returns None for one completion of the first group and for all of the second."""
    trainer = build(student, teacher, tokenizer, tmp_path, budget=math.inf, max_steps=1)
    partial = [None if index in (2, 4, 5, 6, 7) else value for index, value in enumerate(score(COMPLETIONS))]
    trainer.reward_funcs = [lambda completion_ids, **_: partial]
    _, gradient = one_step(trainer)
    inputs = trainer._buffered_inputs[0]
    assert all(value.isfinite().all() for value in gradient.values())
    scored = [value for value in partial if value is not None]
    expected = {
        tuple(COMPLETIONS[index]): 0.0 if value is None else value - sum(scored) / len(scored)
        for index, value in enumerate(partial)
    }
    for row in range(len(COMPLETIONS)):
        ids = inputs["completion_ids"][row][inputs["completion_mask"][row] == 1].tolist()
        assert inputs["advantages"][row].item() == pytest.approx(expected[tuple(ids)], abs=1e-6)


@pytest.mark.parametrize("budget", [0.0, 1e-9])
def test_where_all_violate_and_all_rewards_are_lost_the_step_is_finite_and_brings_the_cost_down(
    student, teacher, tokenizer, tmp_path, budget
):
    trainer = build(student, teacher, tokenizer, tmp_path, budget=budget, max_steps=6, learning_rate=0.02)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "csr" in row]
    assert all(row["csr"] == 0.0 for row in logs)
    assert logs[-1]["kl_per_token"] < logs[0]["kl_per_token"]


@pytest.mark.parametrize("divergence", ["reverse_kl", "k3"])
def test_the_loss_runs_the_student_once_and_the_teacher_not_at_all(student, teacher, tokenizer, tmp_path, divergence):
    trainer = build(student, teacher, tokenizer, tmp_path, budget=BUDGET, divergence=divergence)
    calls = {"student": 0, "teacher": 0}

    def count(name, *_):
        calls[name] += 1

    student.base_model.register_forward_hook(functools.partial(count, "student"))
    teacher.base_model.register_forward_hook(functools.partial(count, "teacher"))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs(rows())
    assert calls == {"student": 1, "teacher": 1}
    trainer.compute_loss(trainer.model, inputs)
    assert calls == {"student": 2, "teacher": 1}


def test_heads_padded_past_the_tokenizer_are_cut_to_it(student, teacher, tokenizer, tmp_path):
    plain = one_step(build(*copy.deepcopy((student, teacher)), tokenizer, tmp_path, **METHODS["gkd"]))
    for model, size in ((student, 32), (teacher, 40)):
        model.resize_token_embeddings(size, mean_resizing=False)
    padded = one_step(build(student, teacher, tokenizer, tmp_path, **METHODS["gkd"]))
    assert padded[0] == pytest.approx(plain[0], rel=1e-5)
    cut = {name: value[: len(plain[1][name])] for name, value in padded[1].items()}
    assert distance(cut, plain[1]) < 1e-5


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_head_with_too_few_rows_is_refused_by_name(student, teacher, tokenizer, tmp_path, role):
    (student if role == "student" else teacher).resize_token_embeddings(20)
    with pytest.raises(ValueError, match=rf"The {role}'s head has 20 rows but the tokenizer {len(tokenizer)} ids"):
        build(student, teacher, tokenizer, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "grpo"}, "loss_type must be 'dapo' or .*'grpo'"),
        ({"reward_form": "cliff"}, "reward_form must be 'exhausted' or .*'cliff'"),
        ({"divergence": "tv"}, "divergence must be 'reverse_kl' or .*'tv'"),
        ({"scale_rewards": "batch"}, "scale_rewards must be 'none' or .*'batch'"),
        (
            {"multi_objective_aggregation": "normalize_then_sum"},
            "must be 'sum_then_normalize', not 'normalize_then_sum'",
        ),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile must be 1.0"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold must be None"),
        ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32 must be False"),
        ({"beta": 0.04}, "beta must be 0"),
        ({"budget": -1.0}, "budget must be 0 nats or more"),
        ({"budget": math.nan}, "budget must be 0 nats or more"),
        ({"budget_form": "weekly"}, "'weekly'"),
        ({"lam": -0.1}, "0 or more"),
        ({"penalty": -0.1}, "0 or more"),
        ({"dual_rate": 0.1}, "dual_rate needs reward_form"),
        ({"reward_form": "soft_hinge", "budget": 1.0}, "soft_hinge needs"),
        ({"reward_form": "soft_hinge", "csr_target": 0.9, "dual_rate": 0.1}, "and a budget"),
        ({**METHODS["cmdp-chance"], "budget": 1.0, "penalty": 1.0}, "penalty n"),
        *[({"sharpness": value}, "sharpness must be") for value in (math.nan, math.inf, 0.0)],
        ({"margin": 1.0}, "share of the budget"),
        ({"step_budget": -1.0}, "0 nats or more"),
        ({"credit": "token"}, "credit must be 'sequence' or"),
        ({"credit": "return_to_go", "scale_rewards": "group"}, "Credit per token needs scale_rewards='none'"),
        ({"credit": "return_to_go", "importance_sampling_level": "sequence"}, "importance_sampling_level='token'"),
        *[({"divergence": kind, "long_term": False}, "use divergence='k2'") for kind in ("k1", "k3")],
        *[({"divergence": kind, "distil_steps": 1}, "use divergence='k2'") for kind in ("k1", "k3")],
        *[({"divergence": kind, "credit": "length_normalised"}, "use divergence='k2'") for kind in ("k1", "k3")],
        ({"budget_from": 2.0}, "give both finite, or neither"),
        ({"budget_from": math.inf, "budget": 2.0}, "give both finite, or neither"),
        ({"dual_rate": 0.1, "reward_form": "lagrangian"}, "and a budget"),
        *[({"lam": value}, "lam must be finite") for value in (math.nan, math.inf)],
        *[({"penalty": value}, "penalty must be finite") for value in (math.nan, math.inf)],
        *[({"task_weight": value}, "task_weight must be finite") for value in (math.nan, math.inf, -1.0)],
        *[({"discount": value}, "discount must be above 0") for value in (math.nan, math.inf, -1.0, 0.0)],
        *[({"dual_rate": value}, "dual_rate must be finite") for value in (math.nan, math.inf, -1.0)],
        *[({"csr_target": value}, "csr_target must be between 0 and 1") for value in (math.nan, 2.0)],
        *[({"jsd_beta": value}, "jsd_beta must be above 0") for value in (math.nan, 0.0, 1.0)],
        ({"margin": math.nan}, "share of the budget"),
        ({"step_budget": math.inf}, "step_budget must be finite"),
        ({"distil_steps": -1}, "distil_steps must be 0 or more"),
        *[
            ({"budget": 2.0, "step_budget": 0.1, **option}, "left out with step_budget")
            for option in ({"margin": 0.1}, {"budget_from": 4.0}, {"csr_target": 0.9}, {"distil_steps": 1})
        ],
        ({**METHODS["cmdp-chance"], "budget": 2.0, "step_budget": 0.1}, "left out with step_budget"),
        *[
            ({**METHODS["cmdp-chance"], "budget": 2.0, **option}, "left out with reward_form=")
            for option in ({"margin": 0.1}, {"budget_from": 4.0})
        ],
        ({"reward_form": "lagrangian", "budget": 2.0, "csr_target": 0.9}, "left out with reward_form='lagrangian'"),
        ({"teacher_model_init_kwargs": "fast"}, "dictionary"),
    ],
    ids=str,
)
def test_settings_without_a_meaning_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        CMDPConfig(**{**COMMON, "output_dir": str(tmp_path), "loss_type": "dapo", "num_generations": 4, **options})


def test_the_head_reads_contiguous_states_while_generating_and_no_longer(student, teacher, tokenizer, tmp_path):
    trainer, states = build(student, teacher, tokenizer, tmp_path, generate=True), []
    student.lm_head.register_forward_hook(lambda _, inputs, __: states.append(inputs[0]))
    trainer._generate(PROMPTS * 4)
    assert states
    assert all(state.is_contiguous() for state in states)
    assert not student.lm_head._forward_pre_hooks
