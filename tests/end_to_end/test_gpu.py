"""The same run on a GPU: a CPU's losses, checkpoints that go from one to the other, and every option that only a GPU has.

Needs a GPU: tools/gpu_check.sh runs it. Draws are the CPU's on any device, so curves agree to what fp32 holds.
"""

import gc
import shutil

import pytest
import torch

from megaflow.config.check import COMPILES_ZERO_3
from megaflow.model import attention
from megaflow.parallel import mesh as meshes
from megaflow.plan import memory
from megaflow.plan.layout import layout_of
from megaflow.train import checkpoint as checkpoints
from megaflow.train import engine
from megaflow.train import run as runs
from tests.layout_job import layout, same_curve, train
from tests.plan.steps import Run, resolved

pytestmark = pytest.mark.cuda
OLD = tuple(map(int, torch.__version__.split(".")[:2])) < COMPILES_ZERO_3
FAMILIES = [("coded", "flow"), ("char", "flow"), ("coded", "autoregressive"), ("coded", "flow_map"), ("char", "flow_map")]


@pytest.fixture
def on_cpu(process):
    """A command in a process that sees no GPU."""

    def run(words: list[str]) -> None:
        hidden = "import os; os.environ['CUDA_VISIBLE_DEVICES'] = ''; from megaflow.__main__ import main; main()"
        done = process("-c", hidden, *words)
        assert done.returncode == 0, done.stderr

    return run


@pytest.mark.parametrize("kind, family", FAMILIES)
def test_a_gpu_has_the_losses_of_a_cpu(on_cpu, words, alone, workspace, kind, family):
    """And a run goes on on the other device from a checkpoint, both ways."""
    steps = ["train.steps=8"]
    on_cpu(words(kind, family, f"cpu-{kind}-{family}", *steps))
    theirs = workspace / f"cpu-{kind}-{family}"
    same_curve(alone(kind, family, 8), theirs, 8, tolerance=1e-3)
    assert runs.read_json(alone(kind, family, 8) / "summary.json")["device"] == torch.cuda.get_device_name()
    for name, resume in (("to-cpu", on_cpu), ("to-gpu", train)):
        moved = workspace / f"{name}-{kind}-{family}"
        shutil.copytree(alone(kind, family, 8) if name == "to-cpu" else theirs, moved)
        (moved / "summary.json").unlink()
        shutil.rmtree(checkpoints.folder(moved, 8))
        resume(words(kind, family, moved.name, *steps))
        same_curve(moved, theirs, 8, tolerance=1e-3)


WIDE = "model.hidden=256"  # heads of 64
BF16 = ("train.precision=bf16", WIDE)
OPTIONS = [
    ("parallel.zero=0",),
    ("parallel.zero=1",),
    ("parallel.zero=2", "parallel.offload=optimizer"),
    ("parallel.zero=3", "parallel.recompute=full"),
    ("parallel.recompute=selective", "model.softcap=5"),
    ("parallel.compile=true",),
    ("parallel.compile=true", "parallel.zero=3", "parallel.recompute=selective"),
    ("data.mask_documents=true",),
    ("optim.name=muon", "parallel.zero=1"),
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("family", ["flow", "autoregressive"])
def test_options_in_bf16(words, alone, workspace, family, options):
    """Losses are those of fp32 without them, to what bf16 holds; attention is flash-attn's where it is installed."""
    if (
        "parallel.zero=3" in options
        and "parallel.compile=true" in options
        and tuple(map(int, torch.__version__.split(".")[:2])) < COMPILES_ZERO_3
    ):
        pytest.skip("this torch does not compile under ZeRO 3")
    plain = [option for option in options if option.startswith(("data.", "model.", "optim."))]
    name = f"gpu-{family}-" + "-".join(options)
    train(words("coded", family, name, "train.steps=8", "train.micro_batch=4", *BF16, *options))
    same_curve(workspace / name, alone("coded", family, 8, WIDE, *plain), 8, tolerance=3e-2)


@pytest.mark.parametrize("kernel", ["sdpa", "flash"])
def test_each_kernel_trains(words, alone, workspace, kernel):
    if kernel == "flash" and not attention.installed():
        pytest.skip("needs flash-attn (pip install -e .[flash])")
    name = f"gpu-kernel-{kernel}"
    train(words("coded", "flow", name, "train.steps=8", *BF16, f"model.attention={kernel}", "data.mask_documents=true"))
    same_curve(workspace / name, alone("coded", "flow", 8, WIDE, "data.mask_documents=true"), 8, tolerance=3e-2)


@pytest.mark.parametrize("kind, family", [("coded", "flow"), ("char", "flow_map"), ("coded", "autoregressive")])
def test_what_a_gpu_trained_is_sampled_and_evaluated_there(cli, copied, kind, family):
    run = copied(kind, family)
    sampled = cli("sample", run, "--count", 2, *(() if family == "autoregressive" else ("--steps", 2)))
    assert sampled.code == 0 and sampled.out.strip(), sampled.err
    evaluated = cli("evaluate", run, "--samples", 8, "--rows", 8)
    assert evaluated.code == 0, evaluated.err


@pytest.mark.parametrize("tensor, data, zero", [(2, 1, 0), (1, 2, 0), (1, 2, 1)])
def test_two_processes_on_gpus(ranks, words, alone, workspace, tensor, data, zero):
    """By gloo, which takes two processes on one GPU, as NCCL does not."""
    name = f"gpu-{tensor}x{data}-{zero}"
    ranks(2, train, words("coded", "flow", name, *layout(8, tensor, data, zero)))
    same_curve(workspace / name, alone("coded", "flow", 8), 8)


def test_nccl_of_one_process(process, words, workspace):
    """The launcher's way: a rendezvous and a group of NCCL."""
    name = "gpu-nccl"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "megaflow")
    done = process(*launcher, *words("coded", "flow", name, "train.steps=8", "parallel.zero=3", *BF16), timeout=200.0)
    assert done.returncode == 0, done.stderr
    assert len(runs.lines(workspace / name / "metrics.jsonl")) == 10


SIZE = {
    "model.layers": 6,
    "model.hidden": 512,
    "model.heads": 8,
    "data.length": 512,
    "flow.clock.bins": 20,
    "train.global_batch": 16,
    "train.micro_batch": 16,
    "train.precision": "bf16",
    "model.attention": "auto",
    "optim.name": "adamw",
}


@pytest.mark.parametrize("kind", ["flow", "autoregressive", "map"])
@pytest.mark.parametrize(
    "vocab, values", [(50257, {}), (50257, {"parallel.recompute": "full"}), (2000, {"parallel.recompute": "selective"})]
)
def test_memory_is_what_the_plan_says(kind, vocab, values):
    """The allocator's peak in a step is within a tenth of the formula."""
    values = SIZE | {"parallel.zero": 1} | values
    config = resolved(kind, vocab, values).config
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated()
    with meshes.join() as mesh:
        run = Run(kind, vocab, values, mesh)
        for index in range(3):
            torch.cuda.reset_peak_memory_stats()
            run.step(index)
        found = torch.cuda.max_memory_allocated() - before
        engine.close(run.deep)
    formula = memory.of_step(config, vocab, layout_of(config, 1), kind == "map")
    assert formula.largest == pytest.approx(found, rel=0.1)
