"""`megaflow plan`: the layouts of a config as a table or as JSON."""

import json
import math

from megaflow.config.load import Loaded
from megaflow.errors import UserError
from megaflow.plan import planner
from megaflow.plan.links import of
from megaflow.plan.planner import EFFICIENCY, LINK_EFFICIENCY, USABLE, Plan, as_json, plans

ROWS = 16
"""Layouts of a table; JSON has all."""
ASSUMED = ("EFFICIENCY", "LINK_EFFICIENCY", "HIDDEN", "BLOCK_SECONDS", "SELECTIVE", "USABLE")
KINDS = ("weights", "optimizer", "average", "gradients", "activations", "loss", "step", "workspaces")
MEASURED = "10% at 144M and 27% at 1.7B is what one H100 has reached here, docs/scaling.md"
GPT2_VOCAB = 50_257
"""Entries of GPT-2's vocabulary, which is assumed where nothing says another."""


def plan(loaded: Loaded, vocab: int | None, gpus: int, gigabytes: float | None, gpu: str, json_wanted: bool) -> str:
    """What a config needs and takes on every sensible layout, as text.

    gigabytes: memory of a GPU in units of 1e9 bytes, None for what its vendor says. Raises UserError where no layout fits, with the reason.
    """
    device, links = of(gpu)
    guessed, vocab = vocab is None, GPT2_VOCAB if vocab is None else vocab
    if vocab < 1:
        raise UserError(f"--vocab={vocab}: give the entries of the vocabulary, 1 or more")
    if gpus < 1:
        raise UserError(f"--gpus={gpus}: give 1 or more")
    if gigabytes is not None and not 0.0 < gigabytes < math.inf:
        raise UserError(f"--memory={gigabytes:g}: give the gigabytes of a GPU, above 0")
    if other := planner.unplanned(loaded.config):
        raise UserError(f"{other}: plan has no formulas for that; ask for a plan without it")
    capacity = device.memory if gigabytes is None else gigabytes * 1e9
    found = plans(loaded, vocab, gpus, capacity, device, links)
    if not found[0].fits:
        raise UserError(_nothing(found[0], gpus, capacity))
    if json_wanted:
        head = {"gpu": gpu, "gpus": gpus, "memory_bytes": capacity, "vocabulary": vocab, "vocabulary_assumed": guessed}
        assumed = {name.lower(): getattr(planner, name) for name in ASSUMED}
        return json.dumps(head | {"assumed": assumed, "layouts": [as_json(one) for one in found]}, indent=1)
    return _text(
        found,
        loaded,
        f"{vocab:,}" + " (assumed, neither shards nor data.tokenizer tell; --vocab says another)" * guessed,
        gpus,
        gpu,
        capacity,
    )


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e9:.2g} GB"


def _nothing(least: Plan, gpus: int, capacity: float) -> str:
    sizes = {kind: getattr(least.memory, kind) for kind in KINDS}
    largest = sorted(sizes, key=lambda kind: -sizes[kind])[:2]
    why = " and ".join(f"{kind} {_gigabytes(sizes[kind])}" for kind in largest)
    return (
        f"no layout of {gpus} GPUs of {capacity / 1e9:g} GB fits, of which tensors may fill {USABLE:.0%}: the least is predicted to need "
        f"{_gigabytes(least.memory.largest)} a GPU ({_name(least)}; {why}); "
        "use more GPUs or a smaller model"
    )


def _name(one: Plan) -> str:
    layout = one.layout
    stage = f"ZeRO {layout.zero}{' with parallel.offload=optimizer' if layout.offload else ''}"
    return f"tensor {layout.tensor} x data {layout.data}, {stage}, recompute {layout.recompute}, micro_batch {layout.micro}"


def _away(best: Plan, loaded: Loaded) -> list[str]:
    """What there is to say of layouts whose optimizer is on the CPU."""
    if not best.layout.offload:
        return []
    why = "as the config says" if loaded.config.parallel.offload == "optimizer" else "without it nothing fits"
    held = f"{best.memory.host / 1e9:.1f} GB a GPU in the host's memory"
    return [f"all with parallel.offload=optimizer ({why}): {held}; the seconds do not count what the step takes on the CPU"]


def _text(found: list[Plan], loaded: Loaded, vocab: str, gpus: int, gpu: str, capacity: float) -> str:
    fitting = [one for one in found if one.fits]
    train, data = loaded.config.train, loaded.config.data
    lines = [
        f"predicted: {gpus} x {gpu} of {capacity / 1e9:g} GB, {train.global_batch} rows of {data.length} tokens a step, {train.precision}, "
        f"vocabulary {vocab}",
        f"assumed: {EFFICIENCY:.0%} of peak FLOP/s ({MEASURED}), "
        f"{LINK_EFFICIENCY:.0%} of links' bandwidth, tensors in {USABLE:.0%} of memory",
        *_away(fitting[0], loaded),
        "memory in GB a GPU by kind and at the largest moment of a step; sent GB a GPU and step over NVLink and between nodes",
        "",
        "  tensor x data ZeRO recompute rows x passes | weights optim.   EMA gradients activ.  loss largest | NVLink network | "
        "PFLOP s/step tokens/s   MFU",
    ]
    for index, one in enumerate(fitting[:ROWS]):
        layout, m = one.layout, one.memory
        lines.append(
            f"{'*' if index == 0 else ' '} {layout.tensor:>6} x {layout.data:<4} {layout.zero:>4} {layout.recompute:<9} "
            f"{layout.micro:>4} x {layout.accumulation:<6} | {m.weights / 1e9:>7.2f} {m.optimizer / 1e9:>6.2f} {m.average / 1e9:>5.2f} "
            f"{m.gradients / 1e9:>9.2f} {m.activations / 1e9:>6.2f} {m.loss / 1e9:>5.2f} {m.largest / 1e9:>7.2f} | "
            f"{one.node / 1e9:>6.2f} {one.network / 1e9:>7.2f} | {one.arithmetic / 1e15:>5.2f} {one.time:>6.3g} "
            f"{one.tokens_per_second:>8,.0f} {one.utilisation:>5.1%}"
        )
    best = fitting[0]
    parts = ", ".join(f"{name} {value:.3g}" for name, value in best.seconds.items())
    lines += [
        "",
        f"* {_name(best)}: predicted seconds of a step: {parts}",
        f"{len(fitting) - min(ROWS, len(fitting))} more fit, {len(found) - len(fitting)} do not (--json has all)",
    ]
    return "\n".join(lines)
