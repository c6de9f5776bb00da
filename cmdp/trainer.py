"""`CMDPTrainer`: constrained distillation as a TRL GRPO trainer with a teacher (method, section 6).

A training step samples a group of completions per prompt and scores them once, without gradient, with student and
teacher. The loss is TRL's clipped GRPO loss on the advantages of the modified reward (the policy part) plus
sum_t weight_t D(student || teacher)(s_t), differentiated through the student's distribution (the single-step part); it
reuses the teacher's hidden states. Rollouts, PEFT, quantisation, distribution, checkpoints and loggers are TRL's.
"""

import functools
import math
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import _ForwardRedirection, prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from cmdp import divergence as divergences
from cmdp import reward as rewards
from cmdp.divergence import EXACT, SAMPLED, Head, lm_head
from cmdp.models import check_heads, load_teacher, positions, tokenise, whole_states, without_peft
from cmdp.reward import CREDITS, FORMS, cumulative_cost, trajectory_budget

CHOICES = {
    "reward_form": FORMS,
    "divergence": EXACT + SAMPLED,
    "credit": CREDITS,
    "scale_rewards": ("none", "group"),
    "loss_type": ("dapo", "dr_grpo"),  # one normaliser per batch: a mean per sequence would charge long violations less
    "multi_objective_aggregation": ("sum_then_normalize",),  # one task reward, in [0, 1], is what a violation forfeits
    "beta": (0.0,),  # the teacher takes the place of GRPO's reference model
    "top_entropy_quantile": (1.0,),  # this and the next mask the policy part and not the single-step part
    "off_policy_mask_threshold": (None,),
    "cast_lm_head_to_fp32": (False,),  # it does not reach the divergence
}


def option(default, help: str):
    """A field of a dataclass that is a command line's too."""
    return field(default=default, metadata={"help": help})


@dataclass
class CMDPConfig(GRPOConfig):
    """GRPO's configuration, and what the constraint adds, in the method's symbols. Raises `ValueError` for a number out
    of its range, and for settings whose gradient would not be the stated objective's."""

    budget: float = option(math.inf, "d in nats (total), or delta in nats per token.")
    budget_form: str = option("total", "How the budget is stated: total or per_token.")
    discount: float = option(1.0, "gamma of the cumulative cost.")
    reward_form: str = option("exhausted", f"One of {FORMS} (reward.py).")
    lam: float = option(1.0, "lambda, reward per nat.")
    penalty: float = option(0.0, "n, charged once to a trajectory that exhausts its budget.")
    task_weight: float = option(1.0, "Factor of the task reward; 0 distils only.")
    long_term: bool = option(True, "Credit the policy part with the charge; False leaves it to the single-step part.")
    credit: str = option("sequence", f"How returns are credited: one of {CREDITS}.")
    margin: float = option(0.0, "Share of the budget that the reward keeps in reserve.")
    step_budget: float | None = option(None, "d_step: charge each token's nats above it, in place of those above d.")
    budget_from: float | None = option(None, "The budget at the first step; it moves linearly to `budget` half-way.")
    distil_steps: int = option(0, "Steps of pure distillation before the method begins.")
    csr_target: float | None = option(None, "soft_hinge: the CSR to keep; else every nat is charged below this CSR.")
    sharpness: float = option(10.0, "k of soft_hinge; it rises linearly from 0 over three fifths of the steps.")
    dual_rate: float = option(0.0, "Dual ascent: step of lambda per nat of E[C] - d, or of u with soft_hinge.")
    divergence: str = option("reverse_kl", f"One of {EXACT} or, sampled, {SAMPLED}.")
    jsd_beta: float = option(0.5, "beta of the generalised JSD.")
    scale_rewards: str = option("none", "none, or group: divide the advantages (not the single-step part) like GRPO.")
    teacher_model_init_kwargs: dict | str | None = option(None, "How to load a named teacher.")  # noqa: RUF009
    teacher_model_revision: str | None = option(None, "Branch, tag or commit of a teacher named by its Hub id.")

    _VALID_DICT_FIELDS = [*GRPOConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    def __post_init__(self):
        super().__post_init__()
        if hasattr(quantised := dict(self.teacher_model_init_kwargs or {}).get("quantization_config"), "to_dict"):
            self.teacher_model_init_kwargs |= {"quantization_config": quantised.to_dict()}  # trackers save it as JSON
        for limit in (self.budget, self.budget_from, self.step_budget):
            rewards.check_budget(math.inf if limit is None else limit, self.budget_form)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {' or '.join(map(repr, known))}, not {getattr(self, name)!r}.")
        for names, holds, allowed in (
            ("discount", lambda x: 0 < x <= 1, "above 0 and at most 1"),
            ("sharpness", lambda x: 0 < x < math.inf, "finite and above 0"),
            ("lam penalty task_weight dual_rate", lambda x: 0 <= x < math.inf, "finite and 0 or more"),
            ("margin", lambda x: 0 <= x < 1, "a share of the budget, 0 or more and below 1"),
            ("step_budget", lambda x: x != math.inf, "finite, or None"),
            ("distil_steps", lambda x: x >= 0 and x % 1 == 0, "0 or more, a whole number"),
            ("csr_target", lambda x: x is None or 0 <= x <= 1, "between 0 and 1"),
            ("jsd_beta", lambda x: 0 < x < 1, "above 0 and below 1"),
            ("reward_weights", lambda x: all(map(math.isfinite, x or [])), "finite"),
        ):
            for name in names.split():
                if not holds(getattr(self, name)):
                    raise ValueError(f"{name} must be {allowed}, not {getattr(self, name)!r}.")
        if self.budget_from is not None and math.inf in (self.budget, self.budget_from):
            raise ValueError("budget_from moves to the budget: give both finite, or neither.")
        if self.dual_rate and (self.reward_form not in ("lagrangian", "soft_hinge") or self.budget == math.inf):
            raise ValueError("dual_rate needs reward_form='lagrangian' or 'soft_hinge', and a budget.")
        if self.reward_form == "soft_hinge" and None in (self.csr_target, self.dual_rate or None):
            raise ValueError("soft_hinge needs a csr_target and a dual_rate above 0.")
        for holds, other, names in (
            (self.step_budget is not None, "step_budget", "margin budget_from csr_target distil_steps dual_rate"),
            (self.reward_form == "lagrangian", "reward_form='lagrangian'", "penalty margin budget_from csr_target"),
            (self.reward_form == "soft_hinge", "reward_form='soft_hinge'", "penalty margin budget_from"),
        ):
            for name in names.split():
                if holds and getattr(self, name) != getattr(CMDPConfig, name):
                    raise ValueError(f"{name} needs to be left out with {other}, where it means nothing.")
        single_step = not self.long_term or self.credit == "length_normalised" or self.distil_steps > 0
        if single_step and self.divergence in ("k1", "k3"):
            raise ValueError(f"{self.divergence} by itself has not the reverse KL's gradient: use divergence='k2'.")
        if self.credit != "sequence" and (self.scale_rewards, self.importance_sampling_level) != ("none", "token"):
            raise ValueError("Credit per token needs scale_rewards='none' and importance_sampling_level='token'.")


class DualAscent(TrainerCallback, ExportableState):
    """lambda, or the offset u of soft_hinge, which dual ascent moves: checkpoints save it, and a resumed run goes on
    with it."""

    def __init__(self, multiplier: float):
        self.start = self.multiplier = multiplier

    def state(self) -> dict:
        return {"args": {"multiplier": self.multiplier}, "attributes": {}}

    def on_train_begin(self, args, state, control, **_):
        saved = state.stateful_callbacks[type(self).__name__]["args"] if state.global_step else {}
        self.multiplier = saved.get("multiplier", self.start)


class CMDPTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer`, which distils `teacher_model` into `model` under the budget of `args`. The task reward is in
    [0, 1]. `teacher_model` is a model, or the Hub id or folder of one or of a PEFT adapter; it is then loaded with
    `args.teacher_model_init_kwargs`, in the dtype of its files by default.

    Raises:
        FileNotFoundError: there is no such teacher.
        ValueError: a teacher of another vocabulary, or an adapter that is not read (`cmdp.models`); fewer prompts than
            a batch takes; ZeRO-3 with an exact divergence; a cost, reward, loss or gradient not finite, before its use.
    """

    _tag_names = ["trl", "grpo", "cmdp"]
    _name = "CMDP"
    _paper = {
        "title": "Rethinking Large Language Model Distillation: A Constrained Markov Decision Process Perspective",
        "id": "2509.22921",
        "citation": """@article{zimmer2025rethinking,
    title   = {Rethinking Large Language Model Distillation: A Constrained Markov Decision Process Perspective},
    author  = {Matthieu Zimmer and Xiaotong Ji and Tu Nguyen and Haitham Bou Ammar},
    journal = {arXiv:2509.22921}, year = 2025,
}""",
    }

    def __init__(self, model, teacher_model: PreTrainedModel | str, reward_funcs, args: CMDPConfig, **kwargs):
        least, prompts = args.generation_batch_size // args.num_generations, kwargs.get("train_dataset")
        if hasattr(prompts, "__len__") and len(prompts) < least:
            raise ValueError(f"The train_dataset has {len(prompts)} prompts and one batch takes {least}: give more.")
        teacher, compared = load_teacher(teacher_model, kwargs.get("processing_class") or model, args)
        super().__init__(model, reward_funcs, args, **kwargs)
        self._student = without_peft(self.accelerator.unwrap_model(self.model))
        self._vocab_size, self._sampled = len(self._tokenizer), args.divergence in SAMPLED
        check_heads(self._student, teacher, self._vocab_size, compared, self._sampled)
        if self._dist.is_zero3 and not self._sampled:  # the kernel cannot gather a head that is cut to the vocabulary
            raise ValueError("An exact divergence does not go with ZeRO-3: use ZeRO-2, FSDP or divergence='k2'.")
        if args.budget == math.inf and args.reward_form != "lagrangian" and args.step_budget is None:
            ends = "the cost/mean at which gkd ends (tight) and that at which grpo does (loose)"
            warnings.warn(f"The budget is infinite and charges nothing: choose a budget between {ends}.", stacklevel=2)
        if args.fp16:  # its gradient scaler takes no bfloat16, in which TRL holds the adapter of a 4-bit student
            for parameter in filter(lambda p: p.requires_grad, self.model.parameters()):
                parameter.data = parameter.data.float()
        self.add_callback(DualAscent(-1.0 if args.reward_form == "soft_hinge" else args.lam))
        # TRL would hide truncated completions from the scoring pass; `_leave_out_truncated` hides them from the loss
        self.mask_truncated_completions = False

        teacher.requires_grad_(False).eval()
        if self._sampled:
            add_fused_lm_head(teacher, temperature=self.temperature)
        self._inside = _ForwardRedirection()
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            prepare = prepare_deepspeed if self.is_deepspeed_enabled else prepare_fsdp
            self.teacher = prepare(teacher, self.accelerator)
        else:
            self.teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True)
        if not self._sampled:  # gathered once: inside the student's forward FSDP would not gather it
            with torch.no_grad(), self._dist.summon_full_params(self.teacher, recurse=False, writeback=False):
                head = lm_head(self.accelerator.unwrap_model(self.teacher), self._vocab_size)
                copied = self._dist.fsdp_version == 1  # otherwise whole already, or made so by `lm_head`
                self._teacher_head = Head(*(x.clone() if copied and isinstance(x, Tensor) else x for x in head))
        self._scored = None  # what the scoring pass found, where TRL ran it for its old log-probabilities
        self._rollout_time = 0.0

    def _student_pass(self, model, teacher: Tensor, where: Tensor, **call) -> tuple[FusedCausalLMOutput, Tensor]:
        """TRL's fused forward `model(**call)`, None without labels, and the divergence from the teacher, of which
        `teacher` is what `_teacher_pass` gives, at the tokens of `where`, (B, T)."""
        call |= positions(self._student, call["attention_mask"])
        if not self._sampled:
            inside = functools.partial(self._exact_divergence, teacher, where)
            return self._inside(model, self._student, inside, **call, use_cache=False)
        output, keep = model(**call, use_cache=False), where.shape[1]
        return output, divergences.sampled_divergence(output.log_probs[:, -keep:], teacher, self.args.divergence)

    def _exact_divergence(self, teacher, where, labels=None, fused_lm_head=False, **inputs):
        """What `_student_pass` gives, computed inside the student's forward, where DDP and FSDP lend its parameters."""
        keep, model, output, hidden = where.shape[1], self._student, None, []
        other = teacher, self._teacher_head, where, self.args.divergence, self.args.jsd_beta, self.temperature
        together = fused_lm_head and divergences.own_tiles(teacher) and "output_router_logits" not in inputs
        hook = model.base_model.register_forward_hook(lambda *passed: hidden.append(passed[-1].last_hidden_state))
        with self.accelerator.autocast(), hook:
            if fused_lm_head and not together:
                output = model(labels=labels, fused_lm_head=True, **inputs)
            else:
                model.base_model(**inputs)
            hidden = hidden[0][:, -keep - 1 : -1]
            if not together:
                return output, divergences.divergence_from_hidden(hidden, lm_head(model, self._vocab_size), *other)
            tokens, mask = labels[:, -keep:].clamp(min=0), labels[:, -keep:] != -100
            scores = divergences.score_in_tiles(hidden, lm_head(model), tokens, mask, *other)
        return FusedCausalLMOutput(log_probs=scores[1], entropy=scores[2]), scores[0]

    @torch.no_grad()
    def _teacher_pass(self, keep: int, **inputs) -> Tensor:
        """The teacher's hidden states at the last `keep` tokens, (B, T, H), or its log-probabilities, (B, T), where the
        divergence is sampled."""
        model = self.accelerator.unwrap_model(self.teacher)
        inputs |= positions(model, inputs["attention_mask"])
        with self.accelerator.autocast():
            if self._sampled:
                labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
                return self.teacher(**inputs, labels=labels, fused_lm_head=True).log_probs[:, -keep:]
            output = self._inside(self.teacher, model, model.base_model, **inputs, use_cache=False)
            return output.last_hidden_state[:, -keep - 1 : -1]

    def _get_per_token_logps_and_entropies(self, model, *args, log_probs=True, **options):
        """TRL's. Given `self.model`, as after generation, it is the scoring pass: `self._scored` is then the divergence
        from the teacher, (N, T), and what `_teacher_pass` gives. The loss gives a function in place of the model."""
        if model is not self.model:
            return super()._get_per_token_logps_and_entropies(model, *args, **options)
        keep, parts = args[2], []

        def student(labels, fused_lm_head, **call):
            teacher, where = self._teacher_pass(keep, **call), call["attention_mask"][:, -keep:]
            head = {"labels": labels, "fused_lm_head": True} if log_probs or self._sampled else {}
            output, divergence = self._student_pass(model, teacher, where, **call, **head)
            parts.append((divergence, teacher))
            return output or FusedCausalLMOutput(log_probs=divergence)  # which nobody reads

        result = super()._get_per_token_logps_and_entropies(student, *args)
        self._scored = tuple(map(torch.cat, zip(*parts, strict=True)))
        return result

    def _tokenize_prompts(self, prompts):
        if isinstance(prompts[0], str):
            return tokenise(self._tokenizer, prompts), None, {}
        return super()._tokenize_prompts(prompts)  # a chat template writes all special tokens

    def _generate(self, prompts):
        start = time.perf_counter()
        with whole_states(self.accelerator.unwrap_model(self.model)):
            generated = super()._generate(prompts)
        self._generation_time = time.perf_counter() - start
        return generated

    def _calculate_rewards(self, *args, **kwargs):
        rewards_per_func = super()._calculate_rewards(*args, **kwargs)  # (N, functions), of all processes
        missing = rewards_per_func.isnan()
        self._check_finite("A task reward", rewards_per_func[~missing])  # also of those that cancel, or weigh nothing
        total = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(dim=1)
        self._task_reward = total.masked_fill(missing.all(dim=1), torch.nan)  # (N,)
        return rewards_per_func

    def _generate_and_score_completions(self, inputs):
        start, args = time.perf_counter(), self.args
        outputs = super()._generate_and_score_completions(inputs)
        if "num_images" in outputs:
            raise ValueError("CMDPTrainer distils from text: the dataset must have no images.")
        mask = _loss_mask(outputs)
        if self._scored is None:  # otherwise TRL has run the scoring pass, for its old log-probabilities
            both = [torch.cat([outputs[f"prompt_{x}"], outputs[f"completion_{x}"]], dim=1) for x in ("ids", "mask")]
            sizes = mask.shape[1], args.per_device_train_batch_size
            with torch.no_grad():
                self._get_per_token_logps_and_entropies(self.model, *both, *sizes, log_probs=False)
        (cost, outputs["teacher"]), self._scored = self._scored, None
        cost = cost.masked_fill(mask == 0, 0.0)
        if not self._sampled:
            cost = cost.clamp(min=0.0)  # exact divergences are; rounding is not

        task_reward = self._own_rows(self._task_reward)
        budget = trajectory_budget(args.budget, mask, args.budget_form)
        total = cumulative_cost(cost, mask, args.discount)[:, -1]
        self._check_finite("The cost of a completion", self.accelerator.gather(total))
        limit, task_weight, long_term, terms = self._objective(*map(self.accelerator.gather, (total, budget)))

        aim, charged = trajectory_budget(limit * (1 - args.margin), mask, args.budget_form), cost
        if args.step_budget is not None:  # a token's cost is its excess, of which nothing is allowed
            charged, aim = (cost - args.step_budget).clamp(min=0.0), torch.zeros_like(aim)
        modified = rewards.modified_reward(task_weight * task_reward, charged, mask, aim, **terms)
        outputs["advantages"] = self._advantages(modified.reward if long_term else modified.task, cost, mask, aim)
        outputs["single_step_weight"] = modified.weight if args.step_budget is None else modified.weight * (charged > 0)
        if args.mask_truncated_completions:
            self._leave_out_truncated(outputs)

        self._log_trajectories(task_reward, total, budget, mask, cost, modified)
        self._log("lambda", terms["lam"])
        self._log("offset", terms.get("offset", 0.0))
        rollout_time = time.perf_counter() - start
        self._log("time/generation", self._generation_time)
        self._log("time/scoring", rollout_time - self._generation_time)  # rewards included
        self._rollout_time += rollout_time
        return outputs

    def _objective(self, total: Tensor, budget: Tensor) -> tuple[float, float, bool, dict]:
        """What this step maximises: the budget, task_weight, long_term, and the settings of `modified_reward`. C and d
        of the rollouts of all processes, (N,) each, also move the next step's multiplier by dual ascent, unless this
        step distils: lambda by the mean of C - d, u of soft_hinge by the quantile `csr_target` of C/d - 1."""
        args, step, limit = self.args, self.state.global_step, self.args.budget
        dual = next(callback for callback in self.callback_handler.callbacks if isinstance(callback, DualAscent))
        terms = {"form": args.reward_form, "lam": args.lam, "penalty": args.penalty, "discount": args.discount}
        if args.reward_form == "soft_hinge":
            terms["offset"] = dual.multiplier
            terms["sharpness"] = args.sharpness * min(1.0, max(step, 1) / (0.6 * max(1, self.state.max_steps)))
            move = (total / budget.clamp(min=1e-9) - 1).quantile(args.csr_target).clamp(-0.2, 0.2)
        else:
            terms["lam"], move = dual.multiplier, (total - budget).mean()
        if args.dual_rate and self.model.training and step >= args.distil_steps:
            moved = dual.multiplier + args.dual_rate * float(move)
            dual.multiplier = moved if args.reward_form == "soft_hinge" else max(0.0, moved)
        soft = {"form": "lagrangian", "penalty": 0.0}
        if step < args.distil_steps:
            return limit, 0.0, False, terms | soft | {"lam": 1.0}
        if args.budget_from is not None:
            limit += max(0.0, 1 - 2 * step / max(1, self.state.max_steps)) * (args.budget_from - args.budget)
        adaptive = args.csr_target is not None and args.reward_form != "soft_hinge"
        if adaptive and float((total <= budget).float().mean()) < args.csr_target:
            terms |= soft
        return limit, args.task_weight, args.long_term, terms

    def _advantages(self, earned, cost, mask, budget) -> Tensor:
        """(B,), or (B, T) where credit is per token. The groups may span processes."""
        args, gather = self.args, self.accelerator.gather
        group_size = self.num_generations if self.model.training else self.num_generations_eval
        advantages = rewards.group_advantages(gather(earned.sum(dim=1)), group_size, args.scale_rewards == "group")
        shown = [*self._logs["advantages"]][: -len(advantages)] + advantages.tolist()  # in place of the task reward's
        self._logs["advantages"].clear()
        self._logs["advantages"].extend(shown)
        if args.credit == "sequence":
            return self._own_rows(advantages)
        every = [gather(self.accelerator.pad_across_processes(x, dim=1)) for x in (earned, cost, mask)]
        advantages = rewards.token_advantages(*every, gather(budget), group_size, args.credit, args.discount)
        return self._own_rows(advantages)[:, : mask.shape[1]]

    def _leave_out_truncated(self, outputs) -> None:
        """Take completions cut at the limit out of the loss, as TRL does under `mask_truncated_completions`."""
        mask, ends = outputs["completion_mask"], [*self.eos_token_ids, self._tokenizer.pad_token_id]
        last = outputs["completion_ids"].gather(1, (mask.sum(dim=1, keepdim=True) - 1).clamp(min=0))
        ended = torch.isin(last, torch.tensor(ends, device=last.device))  # (B, 1)
        for name in {"completion_mask", "tool_mask", "old_per_token_logps"} & outputs.keys():
            outputs[name] = outputs[name] * ended
        outputs["num_items_in_batch"] = self.accelerator.gather(_loss_mask(outputs).sum()).sum()

    def _compute_loss(self, model, inputs):
        weight, passes = inputs["single_step_weight"], []
        charged = _loss_mask(inputs) * (weight != 0)

        def student(**call):
            passes.append(self._student_pass(model, inputs["teacher"], charged, **call))
            return passes[0][0]

        policy_loss = super()._compute_loss(student, inputs)
        self._log_loss("loss/policy", "A log-probability", policy_loss)
        output, divergence = passes[0]
        if (self.args.divergence, self.args.reward_form, self.args.step_budget) == ("k1", "lagrangian", None):
            divergence = divergence.detach()  # the mean of its own gradient is 0 where no charge depends on the tokens
        elif self._sampled and "old_per_token_logps" in inputs:  # drawn from an older student
            ratio = (output.log_probs[:, -weight.shape[1] :].detach() - inputs["old_per_token_logps"]).exp()
            divergence = divergence + (ratio - 1) * (divergence - divergence.detach())  # corrects the gradient alone
        excess = divergence - (self.args.step_budget or 0.0)
        # vLLM's sampling is corrected as in the policy part
        charges = weight * excess * charged * inputs.get("importance_sampling_ratio", 1.0)
        single_step_loss = charges.sum() / self._normaliser(inputs)
        self._log_loss("loss/single_step", "A divergence", single_step_loss)
        return policy_loss + single_step_loss

    def _normaliser(self, inputs) -> Tensor | float:
        """What `GRPOTrainer._compute_loss` divides the sum over tokens by, gradient accumulation included."""
        accumulation = self.current_gradient_accumulation_steps if self.model.training else 1.0
        if self.loss_type == "dr_grpo":
            return len(inputs["completion_ids"]) * self.max_completion_length * accumulation
        tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        # in training the count spans the generation batch, of which an update sees its share
        return tokens * accumulation / self.args.steps_per_generation if self.model.training else tokens

    def training_step(self, model, inputs, num_items_in_batch):
        start, self._rollout_time = time.perf_counter(), 0.0
        loss = super().training_step(model, inputs, num_items_in_batch)
        update_time = time.perf_counter() - start - self._rollout_time  # of a micro-batch; the log takes their mean
        self._log("time/update", update_time * self.current_gradient_accumulation_steps)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.accelerator.scaler is None:  # which skips such an update itself
            self._check_finite("The norm of the gradient", grad_norm)
        return grad_norm

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL's, and what was measured at the last step that was logged."""
        super().create_model_card(*args, **kwargs)
        logs = [row for row in self.state.log_history if "csr" in row]
        if self.is_world_process_zero():
            path = Path(self.args.output_dir, "README.md")
            card = path.read_text(encoding="utf-8")
            card = card.replace("[None](https://huggingface.co/None)", "a local model")
            card = card.replace('model="None"', f'model="{path.parent.name}"')
            if logs:
                shown = {**vars(self.args), **logs[-1]}
                names = ("budget", "budget_form", "step", "csr", "task_reward", "cost/mean")
                card += "\n\n## Measured on training prompts\n\n| measure | value |\n|---|---|\n"
                card += "".join(f"| {name} | {shown[name]} |\n" for name in names)
            path.write_text(card, encoding="utf-8")

    def _log(self, name: str, value: float) -> None:
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def _own_rows(self, gathered: Tensor) -> Tensor:
        """This process's rows of what is gathered from all."""
        return gathered.chunk(self.accelerator.num_processes)[self.accelerator.process_index]

    def _check_finite(self, name: str, values) -> None:
        if not torch.as_tensor(values).isfinite().all():
            raise ValueError(f"{name} is not finite at step {self.state.global_step}: training stops before its use.")

    def _log_loss(self, name: str, quantity: str, loss: Tensor) -> None:
        scale = self.current_gradient_accumulation_steps if self.model.training else 1.0
        value = self.accelerator.reduce((loss * scale).detach(), reduction="mean").item()
        self._check_finite(f"{quantity} in {name}", value)
        self._log(name, value)

    def _log_trajectories(self, task_reward, total, budget, mask, cost, modified) -> None:
        """Log what the rollouts of all processes were worth and what they cost, under stable names."""
        columns = [task_reward, total, budget, mask.sum(1), (modified.over * mask).sum(1), modified.total, cost.sum(1)]
        gathered = self.accelerator.gather(torch.stack([column.float() for column in columns], dim=1))
        reward, total, budget, length, over, modified_total, undiscounted = gathered.unbind(dim=1)
        tokens = length.sum().clamp(min=1)
        for name, value in {
            "task_reward": reward.nanmean(),
            "modified_reward": modified_total.nanmean(),
            "csr": (total <= budget).float().mean(),
            "cost/mean": total.mean(),
            "cost/q50": total.quantile(0.5),
            "cost/q90": total.quantile(0.9),
            "kl_per_token": undiscounted.sum() / tokens,
            "remaining_budget": (budget - total).mean(),
            "over_budget_tokens": over.sum() / tokens,
        }.items():
            self._log(name, float(value))


def _loss_mask(inputs: dict[str, Tensor]) -> Tensor:
    """1 on the tokens that the student wrote, (B, T): not on padding nor on what a tool returned."""
    return inputs["completion_mask"] * inputs.get("tool_mask", 1)
