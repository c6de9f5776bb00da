"""Export a distilled student: a folder that plain transformers loads, with no teacher and nothing of this package.

A student trained whole is written as it is. One trained as a LoRA adapter is written as the adapter alone, or merged
into its base model. Tokenizer and a model card come with it; weights are safetensors.
"""

import json
import shutil
from pathlib import Path

import pandas as pd
from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoModelForCausalLM, AutoTokenizer

from cmdp.storage import whole, write_json

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
MEASURES = {  # of the summary: what the card calls it, factor, decimals
    "accuracy": ("right answers (%)", 100, 1),
    "csr": ("completions within the budget, CSR (%)", 100, 1),
    "accuracy_within": ("right and within the budget (%)", 100, 1),
    "kl_per_token": ("mean KL to the teacher (nats a token)", 1, 4),
}


def export(run: Path, target: Path, settings: dict, summary: pd.DataFrame | None, commit: str, merge: bool) -> None:
    """Write the student of the folder `run` to the new folder `target`.

    Args:
        run: a saved model, or a saved PEFT adapter, with its tokenizer.
        settings: what it was trained with: `run`, `method` and `base_model` (names), `seed`, and fields of `CMDPConfig`
            with their values; `budget` and `budget_form` are also what the summary was made at.
        summary: the results table `statistics.summarise` makes, or None where nothing was measured.
        commit: of the code that trained it.
        merge: merge an adapter into its base model. The base is loaded as it was saved, so a student trained over a
            4-bit base is merged into that base unquantised. A whole model has nothing to merge.

    Raises:
        FileNotFoundError: `run` has no weights in safetensors, or its base model is not there.
        ValueError: `target` exists.
    """
    run, target = Path(run), Path(target)
    if target.exists():
        raise ValueError(f"There is something at {target} already: name a folder that does not exist.")
    adapter = (run / ADAPTER[0]).is_file()
    if not any(run.glob(ADAPTER[1] if adapter else "model*.safetensors")):
        raise FileNotFoundError(f"There is no student at {run}: a saved model or adapter, with safetensors, is needed.")
    base = base_model(run) if adapter else settings["base_model"]
    with whole(target) as folder:
        if adapter and not merge:
            _copy_adapter(run, folder, base)
        else:
            (merged(run) if adapter else _load(run)).save_pretrained(folder)
        AutoTokenizer.from_pretrained(run, local_files_only=True, trust_remote_code=False).save_pretrained(folder)
        card(target.name, settings, summary, commit, base, adapter and not merge).save(folder / "README.md")


def merged(run: Path):
    """The model that the adapter at `run` and its base make, as one plain model of transformers."""
    from peft import PeftModel

    return PeftModel.from_pretrained(_load(base_model(run)), run).merge_and_unload(safe_merge=True)


def base_model(run: Path) -> str:
    """The base model that the adapter at `run` names: a folder, or a name on the Hub."""
    from peft import PeftConfig

    return PeftConfig.from_pretrained(run).base_model_name_or_path


def card(name: str, settings: dict, summary: pd.DataFrame | None, commit: str, base: str, adapter: bool) -> ModelCard:
    """The model card: what it is, how it was trained, what was measured, how it is loaded."""
    data = ModelCardData(
        base_model=None if Path(base).is_dir() else base,  # the Hub takes names of its own only
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["distillation", "constrained-mdp", "cmdp", settings["method"]],
    )
    needs = f"`peft` and its base model, `{base}`" if adapter else "nothing else"
    body = f"""# {name}

A student distilled under a budget of divergence from its teacher (constrained distillation,
[arXiv 2509.22921](https://arxiv.org/abs/2509.22921)).

## Training

{_training(settings)}
- base model: `{base}`
- code: commit `{commit}`

## Measured

{_measured(settings, summary)}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
completion = model.generate(**inputs, max_new_tokens={settings.get("max_completion_length", 256)})
```

It needs {needs}: no teacher, no remaining budget in its input, and no code but that of the libraries.
"""
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def _training(settings: dict) -> str:
    lines = {"run": f"`{settings['run']}`, seed {settings['seed']}", "method": f"`{settings['method']}`"}
    if settings["method"] != "sft":
        constrained = settings.get("reward_form", "lagrangian") != "lagrangian" and not settings.get("step_budget")
        lines["budget"] = _stated(settings) if constrained else "none"
        names = ("divergence", "reward_form", "lam", "penalty", "csr_target", "step_budget", "dual_rate", "long_term")
        names += ("max_steps", "learning_rate", "num_generations")
        lines |= {name: settings[name] for name in names if name in settings}
    return "\n".join(f"- {name}: {value}" for name, value in lines.items())


def _measured(settings: dict, summary: pd.DataFrame | None) -> str:
    rows = None if summary is None else summary[summary["run"] == settings["run"]].set_index("measure")
    if rows is None or rows.empty:
        return "Nothing: no results of this run were at hand when it was exported."
    lines = ["| measure | mean | 95 % interval |", "|---|---|---|"]
    for measure, (label, scale, decimals) in MEASURES.items():
        mean, low, high = (f"{scale * rows.loc[measure, name]:.{decimals}f}" for name in ("mean", "low", "high"))
        lines.append(f"| {label} | {mean} | [{low}, {high}] |")
    return (
        "\n".join(lines)
        + f"""

Held-out prompts, sampled at temperature 1. A completion is within the budget if its divergence from the teacher is at
most {_stated(settings)}. The numbers are the run's over {rows["seeds"].max()} seed(s), of which this student is one;
intervals are bootstrapped over seeds and prompts."""
    )


def _stated(settings: dict) -> str:
    per = "in total (`total`)" if settings["budget_form"] == "total" else "a token on average (`per_token`)"
    return f"{settings['budget']:g} nats {per}"


def _copy_adapter(run: Path, folder: Path, base: str) -> None:
    """Copy the adapter. A base model that is a local folder is named by its whole path, so that the adapter loads from
    any working folder of this machine."""
    config = json.loads((run / ADAPTER[0]).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(Path(base).resolve()) if Path(base).is_dir() else base
    write_json(config, folder / ADAPTER[0])
    shutil.copyfile(run / ADAPTER[1], folder / ADAPTER[1])


def _load(path: str | Path):
    return AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, trust_remote_code=False)
