"""`CMDPTrainer`: constrained distillation as a TRL GRPO trainer with a teacher (method, section 6).

A training step samples a group of completions a prompt, scores them once without gradient with student and teacher,
which gives the cost of every token, and turns cost and task reward into the modified reward and its group advantage.
The loss then has two parts. The policy part is TRL's own clipped GRPO loss on those advantages. The single-step part is
sum_t weight_t D(student || teacher)(s_t), differentiated exactly through the student's distribution; the teacher's
hidden states from the scoring pass serve it, so that the loss costs one student forward and backward and no second
teacher forward. Everything else (rollouts by transformers or vLLM, PEFT, quantisation, accelerate, checkpoints,
loggers) is the library's.
"""

import functools
import math
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from cmdp import divergence as divergences
from cmdp import reward as budgets
from cmdp.divergence import EXACT, SAMPLED, Head, divergence_from_hidden, lm_head, sampled_divergence
from cmdp.reward import CREDITS, FORMS, group_advantages, modified_reward, token_advantages

# Both parts of the loss must be divided by the same number, and one that no completion's own length enters: with a mean
# over each completion's tokens (TRL's "grpo"), a long violation would weigh less than a short one.
LOSS_TYPES = ("dapo", "dr_grpo")


@dataclass
class CMDPConfig(GRPOConfig):
    """GRPO's configuration, and what the constraint adds. Symbols are those of the method."""

    budget: float = field(default=math.inf, metadata={"help": "d in nats (total), or delta in nats a token."})
    budget_form: str = field(default="total", metadata={"help": "How the budget is stated: total or per_token."})
    discount: float = field(default=1.0, metadata={"help": "gamma of the cumulative cost."})
    reward_form: str = field(default="exhausted", metadata={"help": f"One of {FORMS} (reward.py)."})
    lam: float = field(default=1.0, metadata={"help": "lambda, reward per nat."})
    penalty: float = field(default=0.0, metadata={"help": "n, charged once to a trajectory that exhausts its budget."})
    task_weight: float = field(default=1.0, metadata={"help": "Factor of the task reward; 0 distils only."})
    long_term: bool = field(
        default=True,
        metadata={
            "help": "Whether the policy part is credited with the divergence charged. False leaves the charge to the "
            "single-step part, as GKD does."
        },
    )
    credit: str = field(default="sequence", metadata={"help": f"How returns are credited: one of {CREDITS}."})
    margin: float = field(default=0.0, metadata={"help": "Share of the budget that the reward keeps in reserve."})
    step_budget: float | None = field(
        default=None,
        metadata={"help": "d_step, nats: charge what each step exceeds it by, in place of what all exceed d by."},
    )
    budget_from: float | None = field(
        default=None, metadata={"help": "The budget at the first step; it moves linearly to `budget` half-way."}
    )
    distil_steps: int = field(default=0, metadata={"help": "Steps of pure distillation before the method begins."})
    csr_target: float | None = field(
        default=None,
        metadata={"help": "Charge all of the divergence, not its overshoot alone, while the batch's CSR is below it."},
    )
    dual_rate: float = field(
        default=0.0, metadata={"help": "lambda rises by this times E[C] - d each step (dual ascent), from `lam`."}
    )
    divergence: str = field(default="reverse_kl", metadata={"help": f"One of {EXACT} or, sampled, {SAMPLED}."})
    jsd_beta: float = field(default=0.5, metadata={"help": "beta of the generalised JSD."})

    scale_rewards: str = field(default="none", metadata={"help": "none, or group: divide by the group's deviation."})

    def __post_init__(self):
        super().__post_init__()
        for limit in (self.budget, self.budget_from, self.step_budget):
            budgets.check_budget(math.inf if limit is None else limit, self.budget_form)
        if not 0 <= self.margin < 1:
            raise ValueError(f"The margin is a share of the budget, 0 <= margin < 1, not {self.margin}.")
        for name, value, known in (
            ("reward_form", self.reward_form, FORMS),
            ("divergence", self.divergence, EXACT + SAMPLED),
            ("credit", self.credit, CREDITS),
            ("loss_type", self.loss_type, LOSS_TYPES),
            ("scale_rewards", self.scale_rewards, ("none", "group")),
        ):
            if value not in known:
                raise ValueError(f"{name} is one of {known}, not {value!r}.")
        if self.penalty > 0 and self.reward_form == "lagrangian":
            raise ValueError("The lagrangian form knows no violation and so no penalty n: leave penalty at 0.")
        if self.lam < 0 or self.penalty < 0:
            raise ValueError(f"lam and penalty must be 0 or more, but they are {self.lam} and {self.penalty}.")
        if self.dual_rate and self.reward_form != "lagrangian":
            raise ValueError("dual_rate moves the weight of the mean cost: it goes with reward_form='lagrangian'.")
        if self.beta != 0.0:
            raise ValueError("beta must be 0: the teacher takes the place of GRPO's reference model.")


class Objective(NamedTuple):
    """What one step maximises: the modified reward's form and weights, as `CMDPConfig` names them."""

    budget: float
    form: str
    task_weight: float
    lam: float
    penalty: float
    long_term: bool


@dataclass
class ScoredOutput(FusedCausalLMOutput):
    """TRL's fused output, with the divergence from the teacher at each completion token, (B, T)."""

    divergence: Tensor | None = None


class CMDPTrainer(GRPOTrainer):
    """Distil `teacher` into `model` under the budget of `args`.

    Args:
        model: the student, as for `GRPOTrainer`.
        teacher: the frozen teacher, over the same tokenizer.
        reward_funcs: the task reward, as for `GRPOTrainer`; it should lie in [0, 1].
        args: a `CMDPConfig`.
        kwargs: everything else that `GRPOTrainer` takes.

    Raises:
        ValueError: a head of student or teacher lacks rows for some of the tokenizer's ids, or an exact divergence is
            asked for under DeepSpeed's ZeRO-3.
    """

    _tag_names = ["trl", "grpo", "cmdp"]
    _name = "CMDP"

    def __init__(self, model, teacher: PreTrainedModel, reward_funcs, args: CMDPConfig, **kwargs):
        super().__init__(model, reward_funcs, args, **kwargs)
        self._vocab_size = len(self._tokenizer)
        for role, rows in (("student", _rows(self.model)), ("teacher", _rows(teacher))):
            if rows < self._vocab_size:
                raise ValueError(
                    f"The {role}'s head has {rows} rows but the tokenizer {self._vocab_size} ids: student and teacher "
                    "must share one tokenizer. Choose a teacher from the student's family."
                )
        self._sampled = args.divergence in SAMPLED
        if self._dist.is_zero3 and not self._sampled:  # the kernel cannot gather a head that is cut to the vocabulary
            raise ValueError("An exact divergence does not go with ZeRO-3: use ZeRO-2, FSDP or a sampled one, as k3.")
        teacher.requires_grad_(False).eval()
        if self._sampled:
            add_fused_lm_head(teacher, temperature=self.temperature)
        student = self.accelerator.unwrap_model(self.model)
        self._add_divergence(student.get_base_model() if hasattr(student, "get_base_model") else student)
        if self.is_deepspeed_enabled:
            self.teacher = prepare_deepspeed(teacher, self.accelerator)
        elif self.is_fsdp_enabled:
            self.teacher = prepare_fsdp(teacher, self.accelerator)
        else:
            self.teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True)
        self._teacher_head = None if self._sampled else self._whole_teacher_head()
        self._task_reward = self._scores = self._teacher_batch = self._charged = self._divergence = None
        self._rollout_time = 0.0

    def _add_divergence(self, model: PreTrainedModel) -> None:
        """Let the student's fused forward also return the divergence from `teacher_hidden`, where it is given.

        `where` (B, T) says at which tokens. Without `fused_lm_head` the divergence is all that the forward computes.
        It is done inside the forward so that DDP's and FSDP's wrappers see every use of a parameter.
        """
        fused_forward, args = model.forward, self.args

        @functools.wraps(type(model).forward)
        def forward(model, *inputs, teacher_hidden=None, where=None, fused_lm_head=False, **kwargs):
            if teacher_hidden is None:
                return fused_forward(*inputs, fused_lm_head=fused_lm_head, **kwargs)
            keep = teacher_hidden.shape[1]
            teacher_head = self._teacher_head
            settings = args.divergence, args.jsd_beta, self.temperature
            if fused_lm_head and divergences.own_tiles(teacher_hidden) and "output_router_logits" not in kwargs:
                labels = kwargs.pop("labels")[:, -keep:]
                hidden = model.base_model(*inputs, **kwargs).last_hidden_state[:, -keep - 1 : -1]
                tokens, mask = labels.clamp(min=0), labels != -100
                scores = divergences.score_on_cpu(
                    hidden, lm_head(model), tokens, mask, teacher_hidden, teacher_head, where, *settings
                )
                return ScoredOutput(**scores._asdict())
            if fused_lm_head:
                with _last_hidden_state(model) as captured:
                    output = fused_forward(*inputs, fused_lm_head=True, **kwargs)
            else:
                captured, output = {"hidden": model.base_model(*inputs, **kwargs).last_hidden_state}, {}
            hidden = captured["hidden"][:, -keep - 1 : -1]
            head = lm_head(model, self._vocab_size)
            divergence = divergence_from_hidden(hidden, head, teacher_hidden, teacher_head, where, *settings)
            return ScoredOutput(**output, divergence=divergence)

        model.forward = types.MethodType(forward, model)

    def _whole_teacher_head(self) -> Head:
        """The teacher's head, gathered once: the student's forward uses it, where the teacher's own hooks, which gather
        what FSDP has sharded, do not run. It is frozen, so a copy stays true."""
        with self._dist.summon_full_params(self.teacher, recurse=False, writeback=False):
            head = lm_head(self.accelerator.unwrap_model(self.teacher), self._vocab_size)
            if self._dist.fsdp_version != 1:  # whole already, or made so by `lm_head`
                return head
            return head._replace(weight=head.weight.clone(), bias=None if head.bias is None else head.bias.clone())

    # ---- rollouts and their scores ----

    def _generate(self, prompts):
        start = time.perf_counter()
        generated = super()._generate(prompts)
        self._metrics[self._mode]["time/generation"].append(time.perf_counter() - start)
        return generated

    def _calculate_rewards(self, *args, **kwargs):
        rewards_per_func = super()._calculate_rewards(*args, **kwargs)  # (N, functions), of all processes
        rewards = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(dim=1)
        self._task_reward = rewards.masked_fill(rewards_per_func.isnan().all(dim=1), torch.nan)
        return rewards_per_func

    def _generate_and_score_completions(self, inputs):
        start = time.perf_counter()
        self._scores = self._teacher_batch = None
        outputs = super()._generate_and_score_completions(inputs)

        if self._scores is None:  # otherwise TRL, for its old log-probabilities, has run the scoring pass already
            with torch.no_grad():
                self._get_per_token_logps_and_entropies(
                    self.model,
                    torch.cat([outputs["prompt_ids"], outputs["completion_ids"]], dim=1),
                    torch.cat([outputs["prompt_mask"], outputs["completion_mask"]], dim=1),
                    outputs["completion_ids"].shape[1],
                    self.args.per_device_train_batch_size,
                    compute_logps=self._sampled,
                )
        mask = _loss_mask(outputs)
        cost = self._scores.pop("divergence").masked_fill(mask == 0, 0.0)
        if not self._sampled:
            cost = cost.clamp(min=0.0)  # exact divergences are; rounding is not
        outputs.update(self._scores)
        self._scores = None

        args = self.args
        first = self.accelerator.process_index * len(mask)
        task_reward = self._task_reward[first : first + len(mask)]
        budget = budgets.trajectory_budget(args.budget, mask, args.budget_form)
        total = budgets.cumulative_cost(cost, mask, args.discount)[:, -1]
        excess = self.accelerator.gather(total - budget)
        objective = self._objective(csr=float((excess <= 0).float().mean()))
        if args.dual_rate and self.model.training:
            self._dual_variable = max(0.0, self._dual_variable + args.dual_rate * float(excess.mean()))

        aim = budgets.trajectory_budget(objective.budget * (1 - args.margin), mask, args.budget_form)
        charged = cost
        if args.step_budget is not None:  # a step's cost is its excess, of which nothing is allowed
            charged, aim = (cost - args.step_budget).clamp(min=0.0), torch.zeros_like(aim)
        modified = modified_reward(
            objective.task_weight * task_reward,
            charged,
            mask,
            aim,
            lam=objective.lam,
            penalty=objective.penalty,
            form=objective.form,
            discount=args.discount,
        )
        earned = modified.reward if objective.long_term else modified.task
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        if args.credit == "sequence":
            returns = self.accelerator.gather(earned.sum(dim=1))
            advantages = group_advantages(returns, group_size, args.scale_rewards == "group")
            outputs["advantages"] = advantages[first : first + len(mask)]
        else:
            outputs["advantages"] = token_advantages(earned, cost, mask, aim, group_size, args.credit, args.discount)
        outputs["single_step_weight"] = modified.weight
        if args.step_budget is not None:
            outputs["single_step_weight"] = modified.weight * (charged > 0)
        if objective.lam == 0:  # no single-step part: the loss needs no teacher
            outputs.pop("teacher_hidden", None)
            outputs.pop("teacher_logps", None)

        self._log_trajectories(task_reward, cost, mask, budget, modified)
        self._metrics[self._mode]["lambda"].append(objective.lam)
        rollout_time = time.perf_counter() - start
        metrics = self._metrics[self._mode]
        metrics["time/scoring"].append(rollout_time - metrics["time/generation"][-1])  # rewards included
        self._rollout_time += rollout_time
        return outputs

    def _objective(self, csr: float) -> Objective:
        """What this step maximises; `csr` is that of its rollouts."""
        args, step = self.args, self.state.global_step
        if step < args.distil_steps:
            return Objective(args.budget, "lagrangian", task_weight=0.0, lam=1.0, penalty=0.0, long_term=False)
        budget = args.budget
        if args.budget_from is not None:
            left = max(0.0, 1 - 2 * step / max(1, self.state.max_steps))
            budget += left * (args.budget_from - args.budget)
        lam = self._dual_variable if args.dual_rate else args.lam
        if args.csr_target is not None and csr < args.csr_target:
            return Objective(budget, "lagrangian", args.task_weight, lam, penalty=0.0, long_term=args.long_term)
        return Objective(budget, args.reward_form, args.task_weight, lam, args.penalty, args.long_term)

    @property
    def _dual_variable(self) -> float:
        """lambda of dual ascent. It is kept in the trainer's state, which checkpoints save."""
        return self.state.stateful_callbacks.get("dual variable", self.args.lam)

    @_dual_variable.setter
    def _dual_variable(self, value: float) -> None:
        self.state.stateful_callbacks["dual variable"] = value

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        compute_logps=True,
        **images,
    ):
        """TRL's one student forward, made to yield the divergence with it.

        Without a teacher batch (after generation) it runs the teacher too and keeps its states; with one (in the loss)
        it uses that, and at the tokens alone whose divergence the loss charges. The divergence is left in
        `self._scores` and `self._divergence`.
        """
        if any(value is not None for value in images.values()):
            raise ValueError("CMDPTrainer distils from text: the dataset must have no images.")
        scoring = self._teacher_batch is None
        rows = batch_size or len(input_ids)
        where = attention_mask[:, -logits_to_keep:] if scoring else self._charged
        parts = []
        for ids, attended, on, teacher in zip(
            input_ids.split(rows),
            attention_mask.split(rows),
            where.split(rows),
            [None] * math.ceil(len(input_ids) / rows) if scoring else self._teacher_batch.split(rows),
            strict=True,
        ):
            if scoring:
                teacher = self._teacher_pass(ids, attended, logits_to_keep)
            extra = {"output_router_logits": True} if compute_aux_loss else {}
            if compute_logps:
                extra["labels"] = ids.masked_fill(attended == 0, -100)
                extra["labels"][:, :-logits_to_keep] = -100
            if not self._sampled and teacher.shape[1]:
                extra |= {"teacher_hidden": teacher, "where": on}
            with self.accelerator.autocast():
                output = model(
                    input_ids=ids, attention_mask=attended, fused_lm_head=compute_logps, use_cache=False, **extra
                )
            logps = entropy = None
            if compute_logps:
                logps, entropy = output.log_probs[:, -logits_to_keep:], output.entropy[:, -logits_to_keep:]
            if self._sampled:
                divergence = sampled_divergence(logps, teacher, self.args.divergence) if teacher.shape[1] else None
            else:
                divergence = getattr(output, "divergence", None)
            parts.append((logps, entropy, divergence, teacher, output.aux_loss))
        logps, entropies, divergences, teachers, aux_losses = zip(*parts, strict=True)
        self._divergence = None if divergences[0] is None else torch.cat(divergences)
        if scoring:
            name = "teacher_logps" if self._sampled else "teacher_hidden"
            self._scores = {"divergence": self._divergence, name: torch.cat(teachers)}
        if not compute_logps:
            return None, None, None
        aux_loss = torch.stack(aux_losses).mean() if compute_aux_loss else None
        return torch.cat(logps), torch.cat(entropies) if compute_entropy else None, aux_loss

    @torch.no_grad()
    def _teacher_pass(self, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
        """What the divergence needs of the teacher at the last `keep` tokens: its hidden states (B, T, H), or where the
        divergence is sampled its log-probabilities (B, T)."""
        with self.accelerator.autocast():
            if self._sampled:
                labels = input_ids.masked_fill(attention_mask == 0, -100)
                output = self.teacher(
                    input_ids=input_ids, attention_mask=attention_mask, labels=labels, fused_lm_head=True
                )
                return output.log_probs[:, -keep:]
            with _last_hidden_state(self.accelerator.unwrap_model(self.teacher)) as captured:
                self.teacher(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, logits_to_keep=1)
        return captured["hidden"][:, -keep - 1 : -1]

    # ---- loss ----

    def _compute_loss(self, model, inputs):
        teacher = inputs.get("teacher_logps" if self._sampled else "teacher_hidden")
        # an empty teacher batch says that this is the loss, not the scoring, and that no teacher is needed
        self._teacher_batch = inputs["completion_ids"][:, :0] if teacher is None else teacher
        self._charged = _loss_mask(inputs) * (inputs["single_step_weight"] != 0)
        policy_loss = super()._compute_loss(model, inputs)
        metrics = self._metrics[self._mode]
        scale = self.current_gradient_accumulation_steps if self.model.training else 1.0
        metrics["loss/policy"].append(self._mean_over_processes(policy_loss * scale))
        if teacher is None:
            metrics["loss/single_step"].append(0.0)
            return policy_loss
        # the direct gradient of k1 is grad log pi, whose mean is zero: its credit is all in the policy part
        divergence = self._divergence.detach() if self.args.divergence == "k1" else self._divergence
        if self.args.step_budget is not None:
            divergence = divergence - self.args.step_budget
        charged = inputs["single_step_weight"] * divergence * self._charged
        single_step_loss = charged.sum() / self._normaliser(inputs)
        metrics["loss/single_step"].append(self._mean_over_processes(single_step_loss * scale))
        return policy_loss + single_step_loss

    def _normaliser(self, inputs) -> Tensor | float:
        """What `GRPOTrainer._compute_loss` divides the sum over tokens by, gradient accumulation included."""
        accumulation = self.current_gradient_accumulation_steps if self.model.training else 1.0
        if self.loss_type == "dr_grpo":
            return len(inputs["completion_ids"]) * self.max_completion_length * accumulation
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        if self.model.training:  # the count spans the generation batch; an update sees its share
            tokens = tokens * accumulation / self.args.steps_per_generation
        return tokens

    def training_step(self, model, inputs, num_items_in_batch):
        start, self._rollout_time = time.perf_counter(), 0.0
        loss = super().training_step(model, inputs, num_items_in_batch)
        update_time = time.perf_counter() - start - self._rollout_time
        # the log takes the mean over micro-batches: that is then the time of an optimisation step
        self._metrics["train"]["time/update"].append(update_time * self.current_gradient_accumulation_steps)
        return loss

    # ---- logging ----

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _mean_over_processes(self, value: Tensor) -> float:
        return self.accelerator.reduce(value.detach(), reduction="mean").item()

    def _log_trajectories(self, task_reward, cost, mask, budget, modified) -> None:
        """Log what the rollouts of all processes were worth and what they cost, under stable names."""
        total = budgets.cumulative_cost(cost, mask, self.args.discount)[:, -1]
        columns = [task_reward, total, budget, mask.sum(1), (modified.over * mask).sum(1), modified.total, cost.sum(1)]
        gathered = self.accelerator.gather(torch.stack([column.float() for column in columns], dim=1))
        reward, total, budget, length, over, modified_total, undiscounted = gathered.unbind(dim=1)
        remaining = budget - total
        median, high = total.quantile(torch.tensor([0.5, 0.9], device=total.device)).tolist()
        tokens = length.sum().clamp(min=1)
        for name, value in {
            "task_reward": reward.nanmean(),
            "modified_reward": modified_total.nanmean(),
            "csr": (remaining >= 0).float().mean(),
            "cost/mean": total.mean(),
            "cost/q50": median,
            "cost/q90": high,
            "kl_per_token": undiscounted.sum() / tokens,
            "remaining_budget": remaining.mean(),
            "over_budget_tokens": over.sum() / tokens,
        }.items():
            self._metrics[self._mode][name].append(float(value))


@contextmanager
def _last_hidden_state(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Context in which a forward of `model` leaves its backbone's last hidden states in the dict it yields.

    A hook, because the forward itself must run through DDP's or FSDP's wrapper, which would drop them.
    """
    captured = {}
    handle = model.base_model.register_forward_hook(
        lambda module, inputs, output: captured.update(hidden=output.last_hidden_state)
    )
    try:
        yield captured
    finally:
        handle.remove()


def _loss_mask(inputs: dict[str, Tensor]) -> Tensor:
    """1 on the tokens that the student wrote, (B, T): not on padding nor on what a tool returned."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def _rows(model: nn.Module) -> int:
    return model.get_output_embeddings().weight.shape[0]
