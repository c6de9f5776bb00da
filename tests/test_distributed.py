"""Two processes compute what one does, under every way that `accelerate launch` shares a model: DDP and both FSDPs.

The processes are CPU processes that talk over gloo, launched with TRL's own accelerate configurations. Run as a script
by `accelerate launch`, this file writes what two processes computed; the test compares it with one process.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl
from conftest import make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from test_trainer import BUDGET, Gradients, build, distance

from cmdp.storage import complete
from cmdp.train import run_trainer
from cmdp.trainer import CMDPTrainer

CONFIGS = Path(trl.__file__).parent / "accelerate_configs"
WHOLE = ["--fsdp_cpu_ram_efficient_loading=false", "--fsdp_sync_module_states=false"]  # both need a GPU
LAUNCH = {
    "ddp": [f"--config_file={CONFIGS / 'multi_gpu.yaml'}"],
    "fsdp1": [f"--config_file={CONFIGS / 'fsdp1.yaml'}", *WHOLE],
    "fsdp2": [f"--config_file={CONFIGS / 'fsdp2.yaml'}", *WHOLE],
}
WRAPPER = {"ddp": "DistributedDataParallel", "fsdp1": "FullyShardedDataParallel", "fsdp2": "FSDPLlamaForCausalLM"}
CASES = {
    "exhausted": {"reward_form": "exhausted", "loss_type": "dapo", "budget": BUDGET},
    "overshoot": {
        "reward_form": "overshoot",
        "loss_type": "dr_grpo",
        "divergence": "k3",
        "budget": 0.8,
        "budget_form": "per_token",
    },
    "per token": {"reward_form": "exhausted", "credit": "return_to_go", "budget": BUDGET},
    "masked": {"reward_form": "hinge", "mask_truncated_completions": True, "budget": BUDGET},
}
LOGGED = ("loss", "csr", "kl_per_token", "loss/policy", "loss/single_step")
STEPS = 2


def steps(out: Path, case: str, **options) -> tuple[dict[str, torch.Tensor], str]:
    """What two steps on one group of eight logged, the weights that they led to, and the name of the model's wrapper.

    The completions are fixed, and the processes share the group, so its lengths unevenly.
    """
    tokenizer = make_tokenizer()
    models = make_model(tokenizer, seed=0), make_model(tokenizer, seed=1, hidden=24)
    trainer = build(*models, tokenizer, out, num_generations=8, max_steps=STEPS, **CASES[case], **options)
    trainer.remove_callback(Gradients)  # a process of FSDP has no whole gradient
    trainer.train()
    weights = whole_weights(trainer)
    log = [row for row in trainer.state.log_history if "csr" in row]
    numbers = {f"{name}.{row['step']}": torch.tensor(row[name]) for row in log for name in LOGGED}
    result = {f"{case}.{name}": value for name, value in (numbers | weights).items()}
    return result, type(trainer.model_wrapped).__name__


def whole_weights(trainer) -> dict[str, torch.Tensor]:
    """The student's parameters, gathered from all processes."""
    with trainer._dist.summon_full_params(trainer.model_wrapped, writeback=False):
        named = dict(trainer.model_wrapped.named_parameters())
        whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in named.items()}
        return {name.removeprefix("module."): value.detach().clone() for name, value in whole.items()}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    results = {}
    for case in CASES:
        results |= steps(tmp_path_factory.mktemp("one"), case, per_device_train_batch_size=8)[0]
    return results


def launch(kind: str, *words: str) -> None:
    """Run this file in two processes."""
    common = ["--num_processes=2", "--mixed_precision=no", "--main_process_port=0"]
    command = ["-m", "accelerate.commands.launch", *LAUNCH[kind], *common, __file__, *words]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    run = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-6000:]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path):
    """With a checkpoint: one that stopped alone would leave the other waiting for ever."""
    launch("ddp", str(tmp_path), "signal")
    said = {(tmp_path / f"stopped-{rank}.txt").read_text() for rank in (0, 1)}
    assert said == {"stopped at step 2: the same command resumes there"}
    assert complete(tmp_path / "checkpoint-2")


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAUNCH)
def test_two_processes_have_the_losses_and_weights_of_one(tmp_path, one, kind):
    launch(kind, str(tmp_path))
    assert set((tmp_path / "wrapper.txt").read_text().split()) == {WRAPPER[kind]}
    two = load_file(tmp_path / "two.safetensors")
    assert two.keys() == one.keys()
    numbers = [name for name in one if one[name].dim() == 0]
    assert len(numbers) == len(CASES) * len(LOGGED) * STEPS
    for name in numbers:
        assert two[name].item() == pytest.approx(one[name].item(), rel=1e-5, abs=1e-6), name
    start = dict(make_model(make_tokenizer(), seed=0).named_parameters())
    for case in CASES:
        assert 0 < two[f"{case}.csr.1"] < 1
        moved = [{name: result[f"{case}.{name}"] - start[name] for name in start} for result in (two, one)]
        assert distance(*moved) < 1e-4


def let_accelerate_shard_on_cpus() -> None:
    """accelerate shards models on accelerators only, though torch does over gloo too: take the CPUs for such."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)


def stopped(out: Path, **options) -> str:
    """What a run says of which the second process alone gets a signal, in its second step."""

    class Signalled(CMDPTrainer):
        def training_step(self, *arguments, **more):
            if self.state.global_step == 1 and self.accelerator.process_index == 1:
                signal.raise_signal(signal.SIGTERM)
            return super().training_step(*arguments, **more)

    tokenizer = make_tokenizer()
    models = make_model(tokenizer, seed=0), make_model(tokenizer, seed=1, hidden=24)
    options |= {"num_generations": 8, "max_steps": 20, "gradient_accumulation_steps": 1, **CASES["exhausted"]}
    trainer = build(*models, tokenizer, out, Signalled, **options | {"per_device_train_batch_size": 4})
    trainer.remove_callback(Gradients)
    try:
        run_trainer(trainer, resume=False)
    except KeyboardInterrupt as said:
        return str(said)
    return "not stopped"


if __name__ == "__main__":
    out = Path(sys.argv[1])
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if sharded:
        let_accelerate_shard_on_cpus()
    results, wrappers = {}, []
    if sys.argv[2:] == ["signal"]:
        (out / f"stopped-{os.environ['RANK']}.txt").write_text(stopped(out, use_cpu=True))
    for case in CASES if not sys.argv[2:] else ():
        options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "use_cpu": not sharded}
        result, wrapper = steps(out, case, **options)
        results |= result
        wrappers.append(wrapper)
    if os.environ["RANK"] == "0":
        (out / "wrapper.txt").write_text(" ".join(wrappers))
        save_file(results, out / "two.safetensors")
    torch.distributed.barrier()  # until the results are written
    torch.distributed.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)  # the interpreter's teardown may abort: gloo's threads
