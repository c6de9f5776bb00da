"""What only a GPU can show: kernels next to a CPU's, and the profiles' memory sums next to what training takes.

    python tests/gpu.py [CHECK ...]      # writes results/gpu/checks.csv; no download

Models of the profiles' architectures get random weights here and are trained for two steps by `cmdp.train`, with
prompts as long as the profile allows and completions as long as it says (or as the check's overrides do).
"""

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pandas as pd
import torch
import yaml

ROOT = Path(__file__).parents[1]
OUT = ROOT / "results" / "gpu" / "checks.csv"
IDS = {"qwen2": 151_665, "llama": 128_256}  # of the tokenizers
SHORT = "train.max_completion_length=128"
CHECKS = {  # a name: the profile, the dtype where it is not the device's own, and what differs from the file
    "colab": ("colab", None, []),
    "colab, fp16": ("colab", torch.float16, [SHORT]),
    "colab, 4-bit teacher": ("colab", None, [SHORT, "teacher.four_bit=true"]),
    "colab, 4-bit student, fp16": ("colab", torch.float16, [SHORT, "student.four_bit=true"]),
    "gsm8k": ("gsm8k", None, []),
    "consumer-gpu": ("consumer-gpu", None, []),
    "paper, without vLLM": ("paper", None, ["train.use_vllm=false", "train.max_completion_length=512"]),
}
KERNELS = "kernels"


def kernels() -> dict:
    """The divergence and its gradient on the GPU next to the CPU's, and generation next to the CPU's."""
    from cmdp.divergence import Head, divergence_from_hidden
    from cmdp.evaluation import generate, score
    from cmdp.models import build_model, build_tokenizer

    errors = {}
    torch.manual_seed(0)
    shapes = {"student": (4, 64, 96), "teacher": (4, 64, 128)}
    hidden = {role: torch.randn(shape) for role, shape in shapes.items()}
    heads = {role: torch.randn(32_011, shape[-1]) * 0.2 for role, shape in shapes.items()}
    mask = (torch.rand(4, 64) < 0.8).long()
    for kind in ("reverse_kl", "forward_kl", "jsd"):
        found = {}
        for place, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
            states, weights = ({role: x.to(place, dtype) for role, x in both.items()} for both in (hidden, heads))
            states["student"].requires_grad_()
            pair = [(states[role], Head(weights[role])) for role in shapes]
            values = divergence_from_hidden(*pair[0], *pair[1], mask.to(place), kind)
            values.sum().backward()
            found[place] = values.detach().cpu().double(), states["student"].grad.cpu().double()
        for name, (right, ours) in zip(
            ("value", "gradient"), zip(found["cpu"], found["cuda"], strict=True), strict=True
        ):
            errors[f"{kind}, {name}"] = float((ours - right).norm() / right.norm())
    tokenizer = build_tokenizer([f"w{index}" for index in range(500)])
    models = [build_model(tokenizer, 4, 128, 4, seed) for seed in (0, 1)]
    prompts, scored, texts = ["w1 w2 w3", "w4"], {}, {}
    for place in ("cpu", "cuda"):
        student, teacher = (model.to(place).eval() for model in models)
        with torch.no_grad():
            ids, attention, completion, mask = generate(student, tokenizer, prompts, False, 32)
            texts[place] = completion.tolist()
            if place == "cpu":
                kept = ids, attention, mask
            scored[place] = score(student, teacher, len(tokenizer), *(x.to(place) for x in kept))[0].cpu()
    errors["cost of a completion"] = float((scored["cuda"] - scored["cpu"]).norm() / scored["cpu"].norm())
    return {"largest_error": max(errors.values()), "same_text": texts["cpu"] == texts["cuda"], "errors": errors}


def write_tokenizer(folder: Path, family: str):
    """A tokenizer of `IDS` ids that takes each letter for a token; returns it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special, letters = ["<pad>", "<eos>", "<unk>"], sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*special, *letters, *(f"filler{index}" for index in range(IDS[family] - 3 - len(letters)))]
    inner = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = dict(zip(("pad_token", "eos_token", "unk_token"), special, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_model(folder: Path, arguments: tuple) -> None:
    """A model of a published shape with random weights, in bfloat16, and a tokenizer with as many ids as its own."""
    from test_memory import shape
    from transformers import AutoModelForCausalLM

    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(shape(*arguments), dtype=torch.bfloat16)
    tokenizer = write_tokenizer(folder, arguments[0])
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.config.bos_token_id = model.generation_config.bos_token_id = None
    model.save_pretrained(folder)


def train(name: str, folder: Path) -> dict:
    """Train two steps of a profile in the new `folder`; what it took."""
    from test_memory import PUBLISHED

    import cmdp.models
    import cmdp.train

    profile, dtype, overrides = CHECKS[name]
    content = yaml.safe_load((ROOT / "profiles" / f"{profile}.yaml").read_text())
    for role in ("student", "teacher"):
        write_model(folder / role, PUBLISHED[content[role]["model"]][0])
        content[role]["model"] = str(folder / role)
    gc.collect()
    torch.cuda.empty_cache()
    length, letters = content["task"]["prompt_length"], [chr(97 + index) for index in range(26)]
    prompts = [a + b + "w" * (length - 2) for a in letters[:4] for b in letters[:20]]
    rows = [{"prompt": prompt, "answer": "none"} for prompt in prompts]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"train": 64, "test": 4}
    content["task"] |= {"name": "exact", "source": str(folder / "data.jsonl"), "sizes": sizes}
    content["task"].pop("test", None)
    content["train"] |= {"max_steps": 2, "save_steps": 100, "warmup_steps": 0}
    content["runs"] = {"soft": {"method": "gkd-grpo", "lam": 0.1}}  # charges every token
    content["evaluate"] |= {"prompts": 4, "samples": 1, "greedy": False, "split": "test"}
    os.chdir(folder)
    Path("profile.yaml").write_text(yaml.safe_dump(content))
    experiment = cmdp.train.read(Path("profile.yaml"), *overrides)
    own = [mock.patch(f"{place}.pick_dtype", return_value=dtype) for place in ("cmdp.models", "cmdp.train")]
    own = [*own * bool(dtype), mock.patch.object(cmdp.models.ModelSpec, "files", return_value=[])]  # not to be hashed
    with contextlib.ExitStack() as stack:
        for patch in own:
            stack.enter_context(patch)
        student = cmdp.train.train(experiment, "soft", 0)
        allocated = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
        pair = cmdp.train.load_trained(experiment, "soft", 0)
        completions, _ = cmdp.train.measure(experiment, pair, 0, experiment.evaluated(pair[-1]))
    memory = json.loads((student / "cmdp.json").read_text())["memory"]
    log = pd.read_csv(student / "training.csv")
    second = log[log["csr"].notna()].iloc[-1]
    gib = 2**30
    found = {"sum_gib": memory["summed_gib"], "allocated_gib": allocated / gib, "reserved_gib": memory["taken_gib"]}
    found |= {phase.removeprefix("time/") + "_s": second[phase] for phase in cmdp.train.PHASES}
    return found | {"grad_norm": second["grad_norm"], "cost": second["cost/mean"], "later": completions["cost"].mean()}


def check(name: str) -> dict:
    """One check, in this process: a row of the table."""
    import peft
    import transformers
    import trl

    if name == KERNELS:
        found = kernels()
        print(found.pop("errors"), flush=True)
    else:
        place = "/dev/shm" if Path("/dev/shm").is_dir() else None
        with tempfile.TemporaryDirectory(dir=place) as folder:
            found = train(name, Path(folder))
            os.chdir(ROOT)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl, peft)}
    return {"check": name, "card": torch.cuda.get_device_name(), **found, **versions}


def main(names: list[str]) -> None:
    if not torch.cuda.is_available():
        sys.exit("PyTorch finds no GPU here.")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for name in names or [KERNELS, *CHECKS]:  # each in a process of its own, whose peak is its own
        command = [sys.executable, __file__, "--in-this-process", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path})
        sys.stdout.write(done.stdout)
        if done.returncode:
            print(f"{name}: failed, {done.returncode}", flush=True)
            continue
        row = pd.DataFrame([json.loads(done.stdout.splitlines()[-1])])
        before = pd.read_csv(OUT) if OUT.is_file() else row.iloc[:0]
        OUT.parent.mkdir(parents=True, exist_ok=True)
        table = pd.concat([before[before["check"] != name], row], ignore_index=True)
        table.to_csv(OUT, index=False, float_format="%.4g")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in-this-process"]:
        print(json.dumps(check(sys.argv[2])), flush=True)
    else:
        main(sys.argv[1:])
