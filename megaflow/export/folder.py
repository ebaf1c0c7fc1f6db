"""A converted model: one network, rounded to one precision, in a folder that needs no run and no megaflow to be opened.

    model.safetensors           the weights by their names in the network, whole tensors; or
    model-00001-of-00003.safetensors, …, and model.safetensors.index.json, which says where each is, as Hugging Face's libraries write it
    export.json                 what it was made of, and a hash of every other file
    config.yaml, origin.json    the run's resolved config, and where each of its values came from
    flow.safetensors            the fixed parts of a flow: code, prior and range of log-SNR; not of a baseline
    stage.safetensors           what the stage has measured: the clock of a flow and its profile; not of a baseline
    balance.safetensors         of a flow map, the offsets of its one-step text (one_step.py); not of one that was larger than memory
    teacher.json                of a flow map, the checkpoint that it was distilled from
    shards/                     what the shards say of themselves: tokenizer, counts, length of rows
    config.json, …              of --to hf, what transformers opens it by (export/hf)

export.json is {"version", "megaflow", "kind": flow, flow_map, or the family of a baseline, "weights": averaged or live, "precision",
"parameters", "source": {run, step, tokens, state: the checkpoint's counters, manifest: SHA-256 of its manifest.json, content: identity of
its averaged weights and stage}, "verified": what was compared after writing, "files": {name: {bytes, sha256}}}.

Reading runs no code of the folder's: JSON, YAML's plain values and bytes of tensors.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megaflow.config.schema import Config
from megaflow.data.shards import read_description, unigram_counts
from megaflow.errors import UserError, reason
from megaflow.files import hashed, no_pickles
from megaflow.flow.clock import Clock
from megaflow.model import build, parts
from megaflow.model.build import Baseline
from megaflow.model.parts import Parts
from megaflow.model.text_dit import TextDiT
from megaflow.parallel import boxes
from megaflow.parallel.cut import logical_shape, put
from megaflow.train import tensor_file
from megaflow.train.run import read_config
from megaflow.train.stages import SHARDS

FILE = "export.json"
INDEX = "model.safetensors.index.json"
MODEL = "model.safetensors"
STAGE = "stage.safetensors"
BALANCE = "balance.safetensors"
FIXED = "fixed."
"""Names of tensors that lie beside the weights for transformers: of code, unigram law and lengths, which megaflow reads elsewhere."""
CARD = "README.md"
READ = ("config.yaml", "origin.json", "teacher.json", "config.json", "tokenizer.json")
"""Other files of a folder that are read, beside tensors and what the shards say of themselves."""
VERSION = 1
KINDS = ("flow", "flow_map", "autoregressive", "masked", "uniform")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NEEDED = {"version", "kind", "weights", "precision", "source", "files"}
DAMAGED = "convert the run again into another folder"


def load(directory: str | Path, device: torch.device | str) -> tuple[TextDiT | Baseline, Parts | None, Clock | None, Config]:
    """The network of a converted model, in fp32 and ready to be evaluated, its fixed parts and its clock (None of a baseline), its config.

    At no time more than one tensor is held beside the network. Raises UserError where the folder is none, or its files are not the ones
    that were written.
    """
    directory, device = Path(directory), torch.device(device)
    manifest = read_manifest(directory)
    compare(directory, manifest)
    config = read_config(directory).config
    network, fixed = filled(directory, config, manifest["kind"] == "flow_map", device, *tensors(directory), directory)
    if fixed is None:
        return network, None, None, config
    kept = stage(directory)
    if missing := {"clock_times", "clock_tau"} - kept.keys():
        raise UserError(f"{directory / STAGE}: it has no {' and no '.join(sorted(missing))}; {DAMAGED}")
    times, tau = kept["clock_times"], kept["clock_tau"]
    if not is_clock(times, tau):
        raise UserError(f"{directory / STAGE}: its clock is none (times from 0 to 1 that rise, and their shares); {DAMAGED}")
    return network, fixed, Clock(times, tau), config


def is_clock(times: Tensor, tau: Tensor) -> bool:
    """Whether these are what flow.clock.Clock takes."""
    if times.ndim != 1 or times.shape != tau.shape or len(times) < 2:
        return False
    ends = torch.stack([times[[0, -1]], tau[[0, -1]]]).double() - torch.tensor([0.0, 1.0], dtype=torch.float64)
    return bool((times.diff() > 0).all() and (tau.diff() >= 0).all() and (ends.abs() < 1e-9).all())


def is_model(directory: str | Path) -> bool:
    """Whether a folder is a converted model and not a run."""
    return (Path(directory) / FILE).is_file()


def read_manifest(directory: Path) -> dict[str, Any]:
    """export.json; no file is compared with it. Raises UserError."""
    try:
        found = json.loads((directory / FILE).read_text("utf-8"))
        if missing := NEEDED - found.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if found["version"] != VERSION:
            raise ValueError(f"version {found['version']}, and this megaflow reads version {VERSION}")
        if found["kind"] not in KINDS:
            raise ValueError(f"it is a {found['kind']!r}")
        if type(step := found["source"]["step"]) is not int or not 0 <= step < 2**53:
            raise ValueError(f"step {step!r}")
        for name, value in found["source"].get("state", {}).items():
            if type(value) not in (int, float) or not 0 <= value < 2**63:
                raise ValueError(f"{name} of the state {value!r}")
        if any(not {"bytes", "sha256"} <= entry.keys() for entry in found["files"].values()):
            raise ValueError("it lacks hashes")
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{directory / FILE}: not what megaflow convert writes ({reason(error)}); {DAMAGED}") from None
    return found


def compare(directory: Path, manifest: dict[str, Any]) -> None:
    """Compare all files but the model card, which is its owner's, with those that were written. Raises UserError."""
    for name in sorted(manifest["files"].keys() - {CARD}):
        if (directory / name).parent not in (directory, directory / SHARDS):
            raise UserError(f"{directory / FILE}: it names {name}, which is no file of this folder; {DAMAGED}")
        written = manifest["files"][name]
        try:
            same = ((directory / name).stat().st_size, tensor_file.sha256(directory / name)) == (written["bytes"], written["sha256"])
        except OSError as error:
            raise UserError(f"{directory / name}: cannot be read ({error.strerror}); {DAMAGED}") from None
        if not same:
            raise UserError(f"{directory / name}: not the file that was written; {DAMAGED}")
    unknown(directory, manifest)


def unknown(directory: Path, manifest: dict[str, Any]) -> None:
    """Refuse a file that would be read and that export.json does not name, since nothing says what it should be, and pickles. Raises
    UserError."""
    for folder in (directory, directory / SHARDS):
        no_pickles(folder)
    there = [path for path in directory.iterdir() if path.suffix in (".safetensors", ".py") or path.name in (INDEX, *READ)]
    for path in sorted([*there, *(directory / SHARDS).glob("*")]):
        if not path.name.startswith(".") and str(path.relative_to(directory)) not in manifest["files"]:
            raise UserError(f"{path}: {FILE} does not name this file; {DAMAGED}")


def made_of(files: dict[str, Any]) -> list[str]:
    """Of the files of export.json those that decide what the network computes."""
    return sorted(name for name in files if name.endswith((".safetensors", INDEX)))


def identity(manifest: dict[str, Any]) -> str:
    """A hash of all that a network computes by: equal for the same weights, parts and clock in the same files."""
    return hashed([[name, manifest["files"][name]["sha256"]] for name in made_of(manifest["files"])])


def stage(directory: Path) -> dict[str, Tensor]:
    """What the stage has kept, by name; nothing of a baseline. Raises UserError."""
    return _all(directory / STAGE)


def balance(directory: Path, device: torch.device, vocab: int) -> Tensor | None:
    """The offsets (V,) of a map's one-step text; None of what has none. Raises UserError."""
    found = _all(directory / BALANCE).get("offsets")
    if found is not None and (found.shape != (vocab,) or not bool(torch.isfinite(found).all())):
        raise UserError(f"{directory / BALANCE}: its offsets are no {vocab} numbers, one for each token; {DAMAGED}")
    return None if found is None else found.to(device)


def _all(file: Path) -> dict[str, Tensor]:
    """All tensors of a file, by name; none of one that is not there. Raises UserError."""
    if not file.exists():
        return {}
    try:
        return {name: tensor_file.read(file, entry, boxes.full(entry.shape)) for name, entry in tensor_file.entries(file).items()}
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({reason(error)}); {DAMAGED}") from None


def tensors(directory: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]:
    """Shapes of the folder's weights by name, and a function that reads one. Raises UserError, the function too."""
    try:
        place = _places(directory)
        entries = {file: tensor_file.entries(directory / file) for file in set(place.values())}
        found = {name: entries[file][name] for name, file in place.items()}
        if whole := [name for name, entry in found.items() if not entry.dtype.is_floating_point]:
            raise ValueError(f"{whole[0]} has whole numbers")
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{directory}: its weights cannot be read ({reason(error)}); {DAMAGED}") from None

    def read(name: str) -> Tensor:
        file, entry = directory / place[name], found[name]
        try:
            return tensor_file.read(file, entry, boxes.full(entry.shape))
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: {name} cannot be read ({reason(error)}); {DAMAGED}") from None

    return {name: entry.shape for name, entry in found.items()}, read


def _places(directory: Path) -> dict[str, str]:
    """Which file holds which weight. Raises OSError, ValueError."""
    if not (directory / INDEX).exists():
        return dict.fromkeys(tensor_file.entries(directory / MODEL), MODEL)
    try:
        found = json.loads((directory / INDEX).read_text("utf-8"))["weight_map"]
        if any(Path(file).name != file for file in found.values()):
            raise ValueError("it names files of other folders")
        return {name: file for name, file in found.items() if not name.startswith(FIXED)}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{INDEX}: {reason(error)}") from None


def build_network(directory: Path, config: Config, is_map: bool, device: torch.device) -> tuple[TextDiT, Parts] | tuple[Baseline, None]:
    """A network with undrawn weights, and a flow's parts, from the folder of a run or of a converted model. Raises UserError."""
    if config.model.family != "flow":
        log_prior = parts.unigram(unigram_counts(directory / SHARDS))
        with torch.device(device):
            return build.baseline_network(config, log_prior, device), None
    fixed = parts.read(directory / parts.FILE)
    with torch.device(device):
        return build.flow_network(config, fixed, device, is_map), parts.to(fixed, device)


def filled(
    directory: Path,
    config: Config,
    is_map: bool,
    device: torch.device,
    names: dict[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    source: Path,
) -> tuple[TextDiT | Baseline, Parts | None]:
    """A network ready to be evaluated, and a flow's parts with the code that its weights have. Raises UserError where the weights of these
    names and shapes, of `source`, are not the network's."""
    check_layers(config, names, source)
    unmade, _ = build_network(directory, config, is_map, torch.device("meta"))  # before any memory is asked for
    check_same(shapes_of(unmade), names, source)
    network, fixed = build_network(directory, config, is_map, device)
    fill(network, read, source)
    if fixed is not None and isinstance(network, TextDiT) and network.code_weight is not None:
        fixed = parts.with_trained_code(fixed, config.flow.code, network.code_weight.detach(), config.run.seed)
        network.code = fixed.code
    return network.eval(), fixed


def check_layers(config: Config, names: dict[str, tuple[int, ...]], source: Path) -> None:
    """Refuse a config of more layers than there are weights, of which each has some: making it would take for ever. Raises UserError."""
    if config.model.layers > len(names):
        raise UserError(f"{source}: these are not the weights of its config.yaml, which has {config.model.layers:,} layers; {DAMAGED}")


@torch.no_grad()
def fill(network: nn.Module, read: Callable[[str], Tensor], source: Path) -> None:
    """Copy its weights into a network, one after another. Raises UserError where they are no finite numbers."""
    for name, p in network.named_parameters():
        value = read(name)
        if not bool(value.isfinite().all()):
            raise UserError(f"{source}: {name} has values that are no finite numbers, and whatever it computes is none; take another model")
        put(p, value)


def check_rows(directory: Path, config: Config) -> None:
    """Refuse a run or a converted model whose rows are not those of its config. Raises UserError."""
    if (length := read_description(directory / SHARDS)["length"]) != config.data.length:
        raise UserError(
            f"{directory}: rows have {length} tokens by shards/prepared.json, and {config.data.length} by config.yaml (data.length); "
            "restore these files"
        )


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Logical shapes of a network's weights, by name."""
    return {name: logical_shape(p) for name, p in network.named_parameters()}


def check_same(wanted: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]], source: Path) -> None:
    """Refuse weights that are not those of the network that a config describes. Raises UserError."""
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            here, there = (f"has the shape {each[name]}" if name in each else "is missing" for each in (given, wanted))
            raise UserError(f"{source}: these are not the weights of its config.yaml: {name} {here}, and in that network it {there}")
