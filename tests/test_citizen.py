"""The trainer among TRL's: teachers by name, vocabularies, prompts however they come, model cards, one-line errors."""

import copy
import json
import math

import pytest
import torch
from conftest import PROMPTS, WORDS, make_model, make_tokenizer, score
from datasets import Dataset
from test_trainer import BUDGET, COMMON, GROUP, build
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import TrlParser

from cmdp.models import build_tokenizer
from cmdp.trainer import CMDPConfig, CMDPTrainer

ROWS = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS * 8])


def saved(model, folder, tokenizer=None) -> str:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def config(out, **options) -> CMDPConfig:
    sizes = {"per_device_train_batch_size": 8, "num_generations": GROUP, "budget": BUDGET}
    return CMDPConfig(**{**COMMON, **sizes, "output_dir": str(out), "max_steps": 1, "seed": 3, **options})


def log_of(student, teacher, out, tokenizer=None, peft_config=None, **options) -> dict:
    """What the first step logs."""
    more = {"train_dataset": ROWS, "processing_class": tokenizer, "peft_config": peft_config}
    trainer = CMDPTrainer(student, teacher, score, config(out, **options), **more)
    trainer.train()
    return trainer.state.log_history[0]


def same_step(one: dict, other: dict) -> None:
    names = ("loss", "grad_norm", "csr", "cost/mean", "task_reward")
    assert [one[name] for name in names] == pytest.approx([other[name] for name in names], rel=1e-5)


# ---- teachers by name ----


def test_student_and_teacher_by_folder_train_as_the_models_do(student, teacher, tokenizer, tmp_path):
    names = [saved(model, tmp_path / role, tokenizer) for role, model in (("s", student), ("t", teacher))]
    by_name = log_of(*names, tmp_path / "out")
    same_step(by_name, log_of(student, teacher, tmp_path / "out", tokenizer))
    assert by_name["cost/mean"] > 0


def test_a_teacher_is_loaded_with_its_keyword_arguments_from_the_command_line(student, teacher, tokenizer, tmp_path):
    name = saved(teacher, tmp_path / "teacher", tokenizer)
    words = ["--output_dir", str(tmp_path), "--teacher_model_init_kwargs", '{"dtype": "bfloat16"}', "--use_cpu"]
    words += ["--per_device_train_batch_size", "8", "--bf16", "false", "--budget", "4", "--report_to", "none"]
    (args,) = TrlParser(CMDPConfig).parse_args_and_config(words)
    trainer = CMDPTrainer(student, name, score, args, train_dataset=ROWS, processing_class=tokenizer)
    assert trainer.teacher.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="teacher_model_init_kwargs load a teacher named by a string"):
        CMDPTrainer(student, teacher, score, args, train_dataset=ROWS, processing_class=tokenizer)


def test_a_teacher_is_loaded_in_the_dtype_of_its_files(student, teacher, tokenizer, tmp_path):
    name = saved(teacher.bfloat16(), tmp_path / "teacher", tokenizer)
    trainer = build(student, name, tokenizer, tmp_path / "out", budget=BUDGET)
    assert trainer.teacher.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in trainer.teacher.parameters())


@pytest.mark.parametrize("hidden", [64, 96])
def test_a_quantised_teacher_and_its_configuration_in_the_trackers_format(student, tokenizer, tmp_path, hidden):
    name = saved(make_model(tokenizer, seed=1, hidden=hidden), tmp_path / "teacher", tokenizer)
    four_bit = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    args = config(tmp_path / "out", teacher_model_init_kwargs=four_bit)
    assert json.loads(args.to_json_string())["teacher_model_init_kwargs"]["quantization_config"]["load_in_4bit"]
    trainer = CMDPTrainer(student, name, score, args, train_dataset=ROWS, processing_class=tokenizer)
    assert trainer.teacher.is_loaded_in_4bit
    trainer.train()
    assert trainer.state.log_history[0]["cost/mean"] > 0


@pytest.mark.parametrize("divergence", ["reverse_kl", "k2"])
def test_a_teacher_that_is_an_adapter_over_the_students_base(student, tokenizer, tmp_path, divergence):
    from peft import LoraConfig, get_peft_model

    base = saved(student, tmp_path / "base", tokenizer)
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    name = saved(adapted, tmp_path / "adapter")
    options = {"peft_config": LoraConfig(r=2, target_modules=["q_proj"]), "divergence": divergence}
    by_name = log_of(base, name, tmp_path / "out", **options)
    same_step(by_name, log_of(base, adapted.merge_and_unload(), tmp_path / "out", **options))
    assert by_name["cost/mean"] > 0
    with pytest.raises(ValueError, match="different vocabularies"):  # told by the tokenizer of its base
        build(student, name, swapped(), tmp_path / "out", budget=BUDGET)


def test_a_teacher_that_is_not_there_is_named_in_one_line(student, tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^There is no teacher .*nowhere: [^\n]*$"):
        build(student, str(tmp_path / "nowhere"), tokenizer, tmp_path, budget=BUDGET)


# ---- vocabularies ----


def swapped():
    """A tokenizer of as many words, in another order."""
    return build_tokenizer([*reversed(WORDS)])


@pytest.mark.parametrize("named", [True, False])
def test_a_teacher_with_other_ids_is_refused_by_its_tokenizer(
    student, teacher, tokenizer, tmp_path, named, monkeypatch
):
    name = saved(teacher, tmp_path / "teacher", swapped())
    given = name if named else AutoModelForCausalLM.from_pretrained(name)
    monkeypatch.setattr("trl.trainer.utils.create_model_from_path", lambda *_, **__: pytest.fail("weights are read"))
    with pytest.raises(ValueError, match="Student and teacher have different vocabularies"):
        build(student, given, tokenizer, tmp_path / "out", budget=BUDGET)


def test_a_peft_student_is_told_by_its_tokenizer_too(student, teacher, tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(saved(student, tmp_path / "student", tokenizer))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    args = config(tmp_path / "out")
    with pytest.raises(ValueError, match="different vocabularies"):
        CMDPTrainer(model, saved(teacher, tmp_path / "other", swapped()), score, args, train_dataset=ROWS)
    CMDPTrainer(model, saved(teacher, tmp_path / "teacher", tokenizer), score, args, train_dataset=ROWS)


def test_a_padding_token_of_the_students_own_is_no_other_vocabulary(student, teacher, tokenizer, tmp_path):
    name = saved(with_rows(teacher, 32), tmp_path / "teacher", tokenizer)
    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"pad_token": "[PAD]"})
    assert len(own) == 28
    assert build(with_rows(student, 32), name, own, tmp_path, budget=BUDGET)._vocab_size == 28
    own.add_tokens("think")
    with pytest.raises(ValueError, match="different vocabularies"):
        build(student, name, own, tmp_path, budget=BUDGET)


def with_rows(model, rows: int):
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


@pytest.mark.parametrize(
    ("rows", "allowed"),
    [((27, 27), True), ((27, 128), True), ((64, 128), True), ((500, 500), True), ((27, 500), False)],
)
def test_without_a_tokenizer_a_teachers_rows_beyond_the_ids_must_be_padding(
    student, teacher, tokenizer, tmp_path, rows, allowed
):
    models = with_rows(student, rows[0]), with_rows(teacher, rows[1])
    if allowed:
        assert build(*models, tokenizer, tmp_path, budget=BUDGET)._vocab_size == 27
        return
    with pytest.raises(ValueError, match="The teacher's head has 500 rows but the tokenizer 27 ids"):
        build(*models, tokenizer, tmp_path, budget=BUDGET)
    name = saved(models[1], tmp_path / "teacher", tokenizer)  # its tokenizer says that the rest is padding
    build(models[0], name, tokenizer, tmp_path, budget=BUDGET)


def test_a_folder_of_weights_alone_is_told_by_its_rows(student, tmp_path, tokenizer):
    """transformers makes an empty tokenizer for a Qwen2 without files."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def teacher(rows: int) -> str:
        shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
        return saved(Qwen2ForCausalLM(Qwen2Config(vocab_size=rows, **shape, **heads)), tmp_path / str(rows))

    build(student, teacher(32), tokenizer, tmp_path, budget=BUDGET)
    with pytest.raises(ValueError, match="The teacher's head has 500 rows"):
        build(student, teacher(500), tokenizer, tmp_path, budget=BUDGET)


# ---- one BOS ----

TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"


def starting(adds: str, writes: bool = False):
    """A tokenizer whose x is BOS, which adds `adds` to every text, and whose chat template writes BOS if `writes`."""
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "x"
    if adds:
        special = [("x", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=adds, special_tokens=special)
    tokenizer.chat_template = ("{{ bos_token + ' ' }}" if writes else "") + TEMPLATE
    return tokenizer


@pytest.mark.parametrize("adds", ["", "x $A", "x $A <eos>", "$A <eos>"])
@pytest.mark.parametrize("text", ["a b", "x a b"])
def test_a_text_prompt_starts_once_and_does_not_end(student, teacher, tmp_path, adds, text):
    tokenizer = starting(adds)
    trainer = build(student, teacher, tokenizer, tmp_path, budget=BUDGET)
    has_bos = adds.startswith("x") or text.startswith("x")
    expected = tokenizer.convert_tokens_to_ids([*("x" * has_bos), "a", "b"])
    assert trainer._tokenize_prompts([text, text]) == ([expected] * 2, None, {})


@pytest.mark.parametrize("adds", ["", "x $A", "x $A <eos>"])
@pytest.mark.parametrize("writes", [True, False])
def test_a_conversation_is_as_its_template_writes_it(student, teacher, tmp_path, adds, writes):
    tokenizer = starting(adds, writes)
    trainer = build(student, teacher, tokenizer, tmp_path, budget=BUDGET)
    prompt_ids, *_ = trainer._tokenize_prompts([[{"role": "user", "content": "a b"}]])
    assert prompt_ids == [tokenizer.convert_tokens_to_ids([*("x" * writes), "a", "b"])]


def test_prompts_reach_the_models_with_one_bos(student, teacher, tmp_path):
    trainer = build(student, teacher, starting("x $A"), tmp_path, budget=BUDGET)
    trainer.model.train()
    inputs = trainer._prepare_inputs([{"prompt": "x a b"}] * 4 + [{"prompt": "c"}] * 4)
    bos = trainer._tokenizer.bos_token_id
    assert ((inputs["prompt_ids"] == bos) & (inputs["prompt_mask"] == 1)).sum(dim=1).tolist() == [1] * 8


# ---- the model card ----


def test_the_model_card_names_the_paper_and_what_was_measured(student, teacher, tokenizer, tmp_path):
    trainer = build(student, teacher, tokenizer, tmp_path, generate=True, budget=BUDGET, max_steps=2)
    trainer.create_model_card("before")  # nothing measured yet
    assert "Measured" not in (tmp_path / "README.md").read_text()
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 2
    trainer.train()
    trainer.create_model_card("student")
    card, log = (tmp_path / "README.md").read_text(), trainer.state.log_history[1]
    assert "trained with CMDP" in card
    assert "None" not in card
    assert "papers/2509.22921" in card
    assert "Rethinking Large Language Model Distillation" in card
    assert not [word for word in ("DeepSeekMath", "shao2024", "2402.03300") if word in card]
    for name in ("csr", "task_reward", "cost/mean"):
        assert f"| {name} | {log[name]} |" in card
    assert "| step | 2 |" in card
    assert "| budget | 4.0 |" in card


# ---- errors ----


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_prompts_than_a_batch_are_refused(student, teacher, tokenizer, tmp_path, count):
    rows = Dataset.from_dict({"prompt": PROMPTS[:count]})
    args = config(tmp_path)
    with pytest.raises(ValueError, match=f"train_dataset has {count} prompts and one batch takes 2"):
        CMDPTrainer(student, teacher, score, args, train_dataset=rows, processing_class=tokenizer)


def stops(trainer, message: str) -> None:
    """Training raises in one line, and the student is as it was."""
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


def test_an_empty_prompt_is_refused(student, teacher, tokenizer, tmp_path):
    trainer = build(student, teacher, tokenizer, tmp_path, budget=BUDGET, max_steps=1)
    trainer.train_dataset = Dataset.from_dict({"prompt": ["a", ""]})
    stops(trainer, "A prompt is empty")


@pytest.mark.parametrize("pair", [(math.inf, -math.inf), (math.inf, None), (0.5, -math.inf)])
def test_infinite_rewards_of_two_functions_are_refused_though_they_cancel(student, teacher, tokenizer, tmp_path, pair):
    trainer = build(student, teacher, tokenizer, tmp_path, budget=BUDGET, max_steps=1)
    trainer.reward_funcs = [lambda completion_ids, x=x, **_: [x] * len(completion_ids) for x in pair]
    trainer.reward_func_names, trainer.reward_weights = ["one", "other"], torch.tensor([1.0, 0.0])
    trainer.reward_processing_classes = [None, None]
    stops(trainer, "A task reward is not finite at step 0")


def test_too_few_rewards_are_refused(student, teacher, tokenizer, tmp_path):
    trainer = build(student, teacher, tokenizer, tmp_path, budget=BUDGET, max_steps=1)
    trainer.reward_funcs = [lambda completion_ids, **_: [1.0]]
    stops(trainer, "returned 1 rewards, but 8 were expected")


def test_a_gradient_that_is_not_finite_after_accumulation_moves_nothing(student, teacher, tokenizer, tmp_path):
    """The second of two micro-batches spoils the gradient."""
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "optim": "adamw_torch"}
    trainer = build(student, teacher, tokenizer, tmp_path, generate=True, budget=BUDGET, max_steps=1, **options)
    calls = []

    def spoil(gradient):
        calls.append(1)
        return gradient * (math.nan if len(calls) == 2 else 1.0)

    student.model.norm.weight.register_hook(spoil)
    stops(trainer, "The norm of the gradient is not finite at step 0")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *[
            ({name: value}, f"{name} must be")
            for value in (math.nan, math.inf, -math.inf)
            for name in (
                "csr_target",
                "discount",
                "jsd_beta",
                "dual_rate",
                "distil_steps",
                "margin",
                "lam",
                "penalty",
                "task_weight",
            )
        ],
        *[({"budget": value}, "0 nats or more") for value in (math.nan, -math.inf)],
        *[({"budget_from": value, "budget": 1.0}, "0 nats or more|both finite") for value in (math.nan, math.inf)],
        ({"distil_steps": 0.5}, "distil_steps must be 0 or more, a whole number"),
        *[({"reward_weights": [1.0, value]}, "reward_weights must be finite") for value in (math.nan, math.inf)],
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_a_callback_an_evaluation_and_a_resumed_run_work_with_a_named_teacher(tmp_path, tokenizer):
    """As TRL's own: the student by folder, no processing class, conversations, LoRA, evaluation, resume."""
    from peft import LoraConfig

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = TEMPLATE
    names = [saved(make_model(tokenizer, seed), tmp_path / str(seed), tokenizer) for seed in (0, 1)]
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS * 4])
    logs = []
    for steps in (1, 2):
        args = config(
            tmp_path / "out", max_steps=steps, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1
        )

        def reward(completions, **_):
            return [float("a" in completion[0]["content"]) for completion in completions]

        more = {"train_dataset": rows, "eval_dataset": rows.select(range(2)), "peft_config": LoraConfig(r=2)}
        trainer = CMDPTrainer(*names, reward, args, **more)
        trainer.train(resume_from_checkpoint=steps > 1)
        logs = trainer.state.log_history
    assert [row["step"] for row in logs if "csr" in row] == [1, 2]
    assert [row["step"] for row in logs if "eval_csr" in row] == [1, 2]
