"""Real architectures, small and of random weights, loaded in every way that a profile can ask for, and trained."""

import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_gpt2, make_model
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from cmdp import cli, train
from cmdp.divergence import divergence_from_hidden, divergence_from_logits, lm_head
from cmdp.models import (
    ModelSpec,
    check_specs,
    load_base,
    load_pair,
    load_tokenizer,
    pick_dtype,
    positions,
    prune,
    same_weights,
)

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "qwen2": {"num_key_value_heads": 2},
    "llama": {"num_key_value_heads": 2},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "final_logit_softcapping": 20.0},
}
LORA = {"r": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["q_proj", "v_proj", "down_proj"]}
END = "<|endoftext|>"
WORDS = ["<pad>", END, "<unk>", *"abcdefghijklmno"]
CPU = torch.device("cpu")
TRAIN = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 6,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "budget": 0.001,  # nats: every trajectory violates it, so that every token is charged
    "lam": 1.0,
}


def write_model(folder, family: str, seed: int, rows: int = 96, last_word: str = "ab", **changes):
    """A model of `family` with a tokenizer of 19 ids and a head of `rows` rows, saved as the Hub's are."""
    from transformers import AutoConfig

    vocabulary = {word: index for index, word in enumerate([*WORDS, last_word])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token=END, unk_token="<unk>")
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family, **SHAPE | FAMILIES[family] | changes, vocab_size=rows, eos_token_id=1, pad_token_id=0, bos_token_id=None
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter *= 4  # distributions far from uniform
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_adapter(folder, base: str, seed: int) -> str:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    return str(folder)


def frozen_and_trained(student) -> tuple[dict, dict]:
    parts = {}, {}
    for name, parameter in student.named_parameters():
        parts[parameter.requires_grad][name] = parameter.detach().clone()
    return parts


def move(student, std: float = 0.1) -> None:
    """Take a new LoRA adapter, which changes nothing, away from its start."""
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)


def distil(student, teacher, tokenizer, out, **changes) -> list[dict]:
    problems = [{"prompt": prompt, "answer": "c"} for prompt in ("a b c", "d e", "f g h", "i j")]
    settings = TRAIN | changes

    def right(completions: list[str], answer: list[str], **_) -> list[float]:
        return [float(a in completion) for completion, a in zip(completions, answer, strict=True)]

    return train.distil("cmdp-overshoot", student, teacher, tokenizer, problems, right, out, False, settings)


def test_only_models_of_learned_positions_are_told_them(tokenizer):
    attention = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 0]])
    told = positions(make_gpt2(tokenizer, seed=0), attention)["position_ids"]
    assert told.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3]]
    assert positions(make_model(tokenizer, seed=0), attention) == {}  # rotary


# ---- what is trained and what is not ----


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["full", "lora", "qlora", "shared", "shared-qlora", "anchor"])
def test_a_step_changes_what_is_trained_and_nothing_else(tmp_path, family, way):
    base = write_model(tmp_path / "student", family, seed=0)
    student = {"model": base, "four_bit": "qlora" in way} | ({} if way == "full" else {"lora": LORA})
    if way == "anchor":
        teacher = {"model": base}
    elif way.startswith("shared"):
        teacher = {"model": base, "four_bit": "qlora" in way, "adapter": write_adapter(tmp_path / "adapter", base, 3)}
    else:
        teacher = {"model": write_model(tmp_path / "teacher", family, 1), "four_bit": True}
    student, teacher, tokenizer = load_pair(ModelSpec(**student), ModelSpec(**teacher), use_cpu=True)
    if way == "anchor":  # the student starts as its own anchor, at no cost
        move(student)
    frozen, trained = frozen_and_trained(student)
    assert bool(frozen) == (way != "full")
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    log = distil(student, teacher, tokenizer, tmp_path / "out")
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    assert any(entry.get("grad_norm", 0) > 0 for entry in log)
    after_frozen, after_trained = frozen_and_trained(student)
    assert after_frozen.keys() == frozen.keys()
    assert all(torch.equal(after_frozen[name], frozen[name]) for name in frozen)
    assert all(name.count("lora_") for name in trained) == (way != "full")
    changed = [name for name in trained if not torch.equal(after_trained[name], trained[name].to(after_trained[name]))]
    assert len(changed) >= len(trained) / 2
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"bf16": True}, {"divergence": "k3"}], ids=str)
def test_a_shared_base_trains_under_checkpointing_autocast_and_sampled_divergences(tmp_path, four_bit, options):
    base = write_model(tmp_path / "base", "qwen2", seed=0)
    teacher = ModelSpec(base, four_bit=four_bit, adapter=write_adapter(tmp_path / "adapter", base, 3))
    student, teacher, tokenizer = load_pair(ModelSpec(base, four_bit=four_bit, lora=LORA), teacher, True)
    frozen, trained = frozen_and_trained(student)
    log = distil(student, teacher, tokenizer, tmp_path / "out", **options)
    assert all(math.isfinite(entry["loss"]) for entry in log if "loss" in entry)
    assert all(entry["cost/mean"] != 0 for entry in log if "csr" in entry)
    after_frozen, after_trained = frozen_and_trained(student)
    assert all(torch.equal(after_frozen[name], frozen[name]) for name in frozen)
    assert any(not torch.equal(after_trained[name], trained[name].to(after_trained[name])) for name in trained)


@pytest.mark.parametrize("four_bit", [False, True])
def test_a_teacher_of_the_same_base_holds_no_weights_of_its_own(tmp_path, four_bit):
    base = write_model(tmp_path / "base", "llama", seed=0)
    adapter = write_adapter(tmp_path / "adapter", base, seed=3)
    student, teacher, _ = load_pair(
        ModelSpec(base, four_bit=four_bit, lora=LORA), ModelSpec(base, four_bit=four_bit, adapter=adapter), True
    )
    theirs = {name: p for name, p in teacher.named_parameters() if "lora_" not in name}
    ours = {id(p) for p in student.parameters()}
    assert theirs
    assert all(id(p) in ours for p in theirs.values())
    # a student whose own weights change cannot lend them
    student, teacher, _ = load_pair(ModelSpec(base), ModelSpec(base), True)
    assert not {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}


def test_a_teacher_on_the_shared_base_costs_what_a_merged_teacher_on_its_own_does(tmp_path):
    base = write_model(tmp_path / "base", "llama", seed=0)
    adapter = write_adapter(tmp_path / "adapter", base, seed=3)
    lora = LORA | {"dropout": 0.5}  # of the student alone: the teacher stays deterministic while the student trains
    student, shared, _ = load_pair(ModelSpec(base, lora=lora), ModelSpec(base, adapter=adapter), True)
    student.train()
    move(student)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload().eval()
    ids = torch.randint(3, 19, (3, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        student.eval()
        hidden = student.get_base_model().base_model(ids).last_hidden_state
        student.train()
        cost, expected = (
            divergence_from_hidden(
                hidden,
                lm_head(student, 19),
                teacher.base_model(ids).last_hidden_state,
                lm_head(teacher, 19),
                torch.ones(ids.shape),
            )
            for teacher in (shared, merged)
        )
    torch.testing.assert_close(cost, expected, rtol=1e-4, atol=1e-5)
    assert (cost > 0.01).all()


def test_an_anchor_is_the_student_before_training(tmp_path):
    base = write_model(tmp_path / "base", "qwen2", seed=0)
    student, anchor, _ = load_pair(ModelSpec(base, lora=LORA), ModelSpec(base), True)
    alone = AutoModelForCausalLM.from_pretrained(base)
    move(student, std=1.0)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(anchor(ids).logits, alone(ids).logits)
        assert (student(ids).logits - alone(ids).logits).abs().max() > 0.1


def test_same_weights_follow_a_move_to_another_dtype(tmp_path):
    model = load_base(ModelSpec(write_model(tmp_path / "base", "llama", 0)), torch.float32, CPU)
    other = same_weights(model)
    model.to(torch.bfloat16)
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}


# ---- four bits, adapters ----


def test_four_bits_are_nf4_with_double_quantisation(tmp_path):
    spec = ModelSpec(write_model(tmp_path / "base", "qwen2", 0), four_bit=True)
    model = load_base(spec, torch.float32, CPU)
    weight = model.model.layers[0].mlp.down_proj.weight
    assert weight.dtype == torch.uint8
    assert weight.numel() == SHAPE["hidden_size"] * SHAPE["intermediate_size"] / 2
    assert weight.quant_state.quant_type == "nf4"
    assert weight.quant_state.nested
    assert model.lm_head.weight.dtype == torch.float32


def test_a_saved_adapter_is_loaded_again_and_trained_further(tmp_path):
    base = write_model(tmp_path / "base", "qwen2", 0)
    teacher = ModelSpec(write_model(tmp_path / "teacher", "qwen2", 1))
    student, other, tokenizer = load_pair(ModelSpec(base, four_bit=True, lora=LORA), teacher, True)
    distil(student, other, tokenizer, tmp_path / "out")
    student.save_pretrained(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names
    assert not [name for name in names if name.endswith((".bin", ".pt"))]
    again, _, _ = load_pair(ModelSpec(base, four_bit=True, adapter=str(tmp_path / "adapter")), teacher, True)
    saved = {name: p for name, p in student.named_parameters() if p.requires_grad}
    loaded = {name: p for name, p in again.named_parameters() if p.requires_grad}
    assert saved.keys() == loaded.keys()
    for name in saved:
        torch.testing.assert_close(saved[name].float(), loaded[name].float())


def test_an_adapter_without_safetensors_is_refused(tmp_path):
    base = write_model(tmp_path / "base", "qwen2", 0)
    adapter = tmp_path / "adapter"
    write_adapter(adapter, base, 0)
    shutil.move(adapter / "adapter_model.safetensors", adapter / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"There is no adapter_model\.safetensors"):
        load_pair(ModelSpec(base, lora=LORA), ModelSpec(base, adapter=str(adapter)), True)


def test_a_cpu_computes_in_float32_unless_asked():
    assert pick_dtype(CPU) == torch.float32
    assert pick_dtype(CPU, bf16=True) == torch.bfloat16


# ---- vocabulary ----


def test_qwen2_heads_padded_to_different_rows_cost_what_their_common_ids_do(tmp_path):
    """Qwen2.5 pads its heads to 151,936 rows in small models and to 152,064 in large ones, over one tokenizer."""
    specs = [ModelSpec(write_model(tmp_path / str(rows), "qwen2", seed=rows, rows=rows)) for rows in (24, 40)]
    student, teacher, tokenizer = load_pair(*specs, use_cpu=True)
    assert [model.lm_head.weight.shape[0] for model in (student, teacher)] == [24, 40]
    assert len(tokenizer) == 19
    ids = torch.randint(3, 19, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cost = divergence_from_hidden(
            student.base_model(ids).last_hidden_state,
            lm_head(student, len(tokenizer)),
            teacher.base_model(ids).last_hidden_state,
            lm_head(teacher, len(tokenizer)),
            torch.ones(ids.shape),
        )
        expected = divergence_from_logits(student(ids).logits[..., :19], teacher(ids).logits[..., :19])
    torch.testing.assert_close(cost, expected, rtol=1e-4, atol=1e-5)
    losses = [entry["loss"] for entry in distil(student, teacher, tokenizer, tmp_path / "out") if "loss" in entry]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)


def test_different_tokenizers_are_refused_before_any_weights_are_read(tmp_path):
    student = write_model(tmp_path / "student", "qwen2", 0)
    teacher = write_model(tmp_path / "teacher", "qwen2", 0, last_word="ba")
    for folder in (student, teacher):  # there is nothing to load
        (tmp_path / folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="different vocabularies") as raised:
        load_pair(ModelSpec(student, lora=LORA), ModelSpec(teacher), True)
    assert "\n" not in str(raised.value)


def test_a_tokenizer_without_a_padding_token_pads_with_its_end(tmp_path):
    folder = write_model(tmp_path / "base", "llama", 0)
    tokenizer = load_tokenizer(ModelSpec(folder))
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    tokenizer = load_tokenizer(ModelSpec(folder))
    assert (tokenizer.pad_token, tokenizer.padding_side) == (END, "left")


# ---- specs ----


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ({"lora": {"rank": 4}}, {}, r"student\.lora has no rank: its keys are r, alpha"),
        ({"four_bit": True}, {}, r"student\.four_bit needs student\.lora"),
        ({"model": "m.gguf", "four_bit": True, "lora": {}}, {}, "a GGUF file cannot be held in 4 bits"),
        ({}, {"lora": {}}, "it goes with the student"),
        ({"lora": {}, "adapter": "a"}, {}, "without `adapter`"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(student, teacher, message):
    with pytest.raises(ValueError, match=message) as raised:
        check_specs(ModelSpec(**{"model": "m"} | student), ModelSpec(**{"model": "m"} | teacher))
    assert "\n" not in str(raised.value)


def test_weights_that_lack_a_tensor_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    path = Path(write_model(tmp_path / "base", "llama", 0)) / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack model\.layers\.0\.mlp\.up_proj\.weight") as raised:
        load_base(ModelSpec(str(path.parent)), torch.float32, torch.device("cpu"))
    assert "\n" not in str(raised.value)


def test_a_model_that_is_not_there_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(FileNotFoundError, match=r"HF_HUB_OFFLINE is set") as raised:
        load_tokenizer(ModelSpec("nobody/no-such-model"))
    assert "\n" not in str(raised.value)


# ---- GGUF ----


def write_gguf(path, folder: str) -> None:
    """The Llama at `folder` as a GGUF file in float32, with a byte-pair tokenizer of its 19 words and fillers up to its
    head's rows, as llama.cpp writes them."""
    gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")
    model = AutoModelForCausalLM.from_pretrained(folder)
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    tokens = [*WORDS, "ab"]
    tokens += [f"[PAD{index}]" for index in range(len(tokens), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(2)
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output"}
    names |= {f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"}
    names |= {f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")}
    names |= {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, tensor in state.items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        part = name.removesuffix(".weight").rpartition(".")[2]
        if part in heads:  # llama.cpp's order of a head's rotary halves
            split = tensor.reshape(heads[part], 2, tensor.shape[0] // heads[part] // 2, tensor.shape[1])
            tensor = split.swapaxes(1, 2).reshape(tensor.shape)
        name = name.removesuffix(".weight")
        if name.startswith("model.layers."):
            _, _, layer, name = name.split(".", 3)
            name = f"blk.{layer}.{names[name]}"
        else:
            name = names[name]
        writer.add_tensor(f"{name}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("named", ["by its path", "in its folder"])
def test_a_gguf_file_gives_the_model_that_it_was_made_from(tmp_path, named):
    folder = write_model(tmp_path / "base", "llama", 0, rope_theta=10000.0, tie_word_embeddings=False)
    path = tmp_path / "base.gguf"
    write_gguf(path, folder)
    where = {"model": str(path)} if named == "by its path" else {"model": str(tmp_path), "gguf_file": path.name}
    student, teacher, tokenizer = load_pair(ModelSpec(**where, lora=LORA), ModelSpec(folder), True)
    ids = torch.randint(3, 19, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(student(ids).logits, teacher(ids).logits, rtol=1e-4, atol=1e-4)
    losses = [entry["loss"] for entry in distil(student, teacher, tokenizer, tmp_path / "out") if "loss" in entry]
    assert all(math.isfinite(loss) for loss in losses)
    student.get_base_model().save_pretrained(tmp_path / "saved")


# ---- students made by leaving out layers ----


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_what_is_written_is_the_model_without_the_layers(tmp_path, family):
    folder = write_model(tmp_path / "whole", family, seed=0, num_hidden_layers=4)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    before, after = prune(str(folder), [1], tmp_path / "pruned")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert (before, after) == (whole.num_parameters(), pruned.num_parameters())
    assert after < before
    ids = torch.tensor([[3, 4, 5, 6]])
    layers = whole.base_model.layers
    whole.base_model.layers = torch.nn.ModuleList(layers[place] for place in (0, 2, 3))
    whole.config.num_hidden_layers = 3
    if getattr(whole.config, "layer_types", None):
        whole.config.layer_types = [whole.config.layer_types[place] for place in (0, 2, 3)]
    torch.testing.assert_close(pruned(ids, use_cache=False).logits, whole(ids, use_cache=False).logits)
    continued = pruned.generate(ids, max_new_tokens=4, do_sample=False)  # with its cache
    torch.testing.assert_close(pruned(continued).logits[0, 3:-1].argmax(-1), continued[0, 4:])
    assert AutoTokenizer.from_pretrained(tmp_path / "pruned")("a b").input_ids == [3, 4]
    assert not list((tmp_path / "pruned").glob("*.bin"))


@pytest.mark.parametrize("without", [["2"], ["0", "1"], ["-1"]])
def test_layers_that_there_are_not_or_all_of_them_are_refused(tmp_path, monkeypatch, without):
    write_model(tmp_path / "whole", "llama", seed=0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cmdp", "prune", "whole", "pruned", "--without", *without])
    with pytest.raises(SystemExit, match="whole has layers 0 to 1: leave out some of these, and not all"):
        cli.main()
    assert not Path("pruned").exists()


def test_nothing_is_overwritten(tmp_path):
    with pytest.raises(ValueError, match=r"There is something at .* already"):
        prune("whole", [0], tmp_path)
