"""The run directory: what a run is, whether this config may continue it, and who is writing to it.

config.yaml      the resolved config            origin.json    where each value came from
run.json         stage, git state, package versions, command line of every start
metrics.jsonl    one line a logged step; a curve without gaps or double steps, whatever happened to the process
checkpoints/     see checkpoint.py              flow.safetensors   the flow's fixed parts, see model/parts.py
summary.json     of a finished run: seconds, speed, memory
ended.json       how the last attempt ended, see outcome.py
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import secrets
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from megaflow.config.check import is_map
from megaflow.config.load import ConfigError, Loaded, assemble, flatten, load, load_recorded, to_yaml
from megaflow.config.schema import Config, keys
from megaflow.errors import UserError, naming
from megaflow.files import lines, read_json, write_atomically

MAY_CHANGE = (
    "parallel.",
    "log.",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.micro_batch",
    "train.pause_at",
    "train.hang_timeout",
    "train.skip_nonfinite",
    "run.dir",
    "data.path",
    "data.format",
    "data.source",
    "data.workers",
    "model.attention",
    "distill.teacher",
)
"""Keys that a continued run may change: of the machine, or of prepare alone (of shards it compares the rows, of a teacher the weights).
train.steps may grow."""

TEACHER_DATA = tuple(f"data.{name}" for name in ("path", "normalize", "tokenizer", "vocab_size", "length", "packing", "mask_documents"))
"""Keys of the data that a flow map takes over; those that only prepare reads may differ, if it is distilled on other text."""

PACKAGES = (
    "torch",
    "deepspeed",
    "mosaicml-streaming",
    "tokenizers",
    "safetensors",
    "numpy",
    "omegaconf",
    "transformers",
    "wandb",
    "flash-attn",
)


LOCK_PATIENCE = 120.0
"""Seconds that a launcher's next attempt waits for the lock: a file server lets go of a host that is gone after some 90 s (NFSv4)."""


def lock(directory: Path, patience: float = 0.0) -> TextIO:
    """Hold the run for this process until the returned file is closed; the kernel lets go of it where the process dies.

    Raises UserError where another process holds it, for as long as `patience` seconds.
    """
    end = time.monotonic() + patience
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{directory}: cannot write the run directory ({error.strerror}); choose another run.dir") from None
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            if time.monotonic() < end:
                time.sleep(0.1)
                continue
            file.seek(0)
            holder = file.read().strip() or "unknown"
            told = f"{directory}: process {holder} is already working on this run; wait for it, or choose another run.dir"
            raise UserError(told) from None
    with naming(directory / ".lock"):
        file.seek(0)
        file.truncate()
        file.write(f"{os.getpid()} on {os.uname().nodename}")
        file.flush()
    return file


def open_run(loaded: Loaded, stage: str) -> Loaded:
    """Make the run directory, or check that this config continues the run that is there. Returns the config to use.

    A continued run keeps its recorded `auto` values. Raises ConfigError naming the changed keys.
    """
    directory = Path(loaded.config.run.dir)
    if not (directory / "config.yaml").exists():
        # config.yaml last: it makes the directory a run, and a kill in between leaves none
        write_atomically(directory / "run.json", json.dumps({"stage": stage, "starts": []}, indent=1))
        write_atomically(directory / "origin.json", json.dumps(loaded.origin, indent=1))
        write_atomically(directory / "config.yaml", to_yaml(loaded.config))
        return loaded
    merged = assemble([("run", continued(loaded, stage))])
    merged.origin.update(loaded.origin)
    write_atomically(directory / "config.yaml", to_yaml(merged.config))
    write_atomically(directory / "origin.json", json.dumps(merged.origin, indent=1))
    return merged


def continued(loaded: Loaded, stage: str) -> dict[str, Any]:
    """The values with which a resolved config continues the run that is there. Raises ConfigError naming keys that may not change."""
    directory = Path(loaded.config.run.dir)
    recorded, kind = read_config(directory), stage_of(directory)
    if kind != stage:
        raise ConfigError(f"{directory}: this run was started by megaflow {kind}, not by megaflow {stage}; choose another run.dir")
    old, new = flatten(recorded.config), flatten(loaded.config)
    changed = []
    for name, value in new.items():
        if loaded.origin[name] == "auto":  # a default of its time counts as what nobody chose, too
            new[name] = old[name] if recorded.origin.get(name) in ("auto", "default") else value
        unread = stage == "pretrain" and name.startswith("distill.") and not loaded.config.train.joint
        if new[name] != old[name] and not unread and not name.startswith(MAY_CHANGE):
            changed.append(name)
    if "train.steps" in changed:
        if new["train.steps"] < old["train.steps"]:
            raise ConfigError(f"{directory}: train.steps may grow from {old['train.steps']}, not shrink to {new['train.steps']}")
        changed.remove("train.steps")
    if changed:
        listed = ", ".join(f"{name} (was {old[name]!r}, now {new[name]!r})" for name in changed)
        raise ConfigError(f"{directory}: this run was started with other values of {listed}; set them back or choose another run.dir")
    return new


def read_config(directory: str | Path) -> Loaded:
    """The resolved config of an existing run. Raises UserError where there is no run, or it was written with other keys."""
    directory = Path(directory)
    if not (directory / "config.yaml").is_file():
        what = "no such directory" if not directory.is_dir() else "not a run directory (it has no config.yaml)"
        raise UserError(f"{directory}: {what}; give the run.dir of a pretrain or distill config")
    file = str(directory / "config.yaml")
    loaded = load_recorded(file)
    if loaded.origin["run.dir"] == "default":  # whichever version has recorded a config, this is in it
        raise UserError(f"{file}: not the config of a run; the run directory is damaged, start it afresh elsewhere")
    loaded.origin.update({k: str(v) for k, v in read_json(directory / "origin.json").items() if k in keys()})
    loaded.config.run.dir = str(directory)
    return loaded


def read_run(directory: str | Path) -> Loaded:
    """The same of what has checkpoints of training: a run, and no converted model. Raises UserError."""
    loaded = read_config(directory)
    stage_of(directory)
    return loaded


def load_distill(path: str, overrides: list[str]) -> Loaded:
    """A distill config over what its teacher passes on: network, flow and data. Raises ConfigError where it contradicts them."""
    name = load(path, overrides).config.distill.teacher
    if not name:
        raise ConfigError(f"{path}: distill.teacher is not set; give the run directory of a trained flow, distill.teacher=RUN")
    teacher = read_run(name)
    if is_map(teacher.config) or teacher.config.model.family != "flow":
        what = "a flow map already" if is_map(teacher.config) else f"a baseline, model.family={teacher.config.model.family}"
        raise ConfigError(f"distill.teacher={name} is {what}; a flow map is distilled from a pretrained flow")
    inherited = {k: v for k, v in flatten(teacher.config).items() if k.startswith(("model.", "flow.")) or k in TEACHER_DATA}
    loaded = load(path, overrides, inherited, f"teacher {name}")
    new = flatten(loaded.config)
    for k in inherited:
        if new[k] != inherited[k] and k != "data.path" and not k.startswith(MAY_CHANGE):
            raise ConfigError(
                f"{loaded.origin[k]}: {k}={new[k]!r} contradicts the teacher's {inherited[k]!r}; network, flow and data are the teacher's"
            )
    loaded.origin.update({k: "auto" for k in inherited if teacher.origin.get(k) == "auto"})
    return loaded


def stage_of(directory: str | Path) -> str:
    """'pretrain' or 'distill'. Raises UserError."""
    file = Path(directory) / "run.json"
    if not file.exists():
        raise UserError(
            f"{directory}: it has a config.yaml and no run.json, as a converted model has, which cannot be trained on or distilled from; "
            "give a run, or restore its run.json"
        )
    return read_json(file, "stage", "starts")["stage"]


def record_start(directory: Path, config: Config, processes: int, step: int) -> None:
    """Append this start to run.json: when, from which step, by which command, code and packages."""
    content = read_json(directory / "run.json", "starts")
    content["starts"].append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "step": step,
            "processes": processes,
            "parallel": dataclasses.asdict(config.parallel),
            "command": sys.argv,
            "git": git_state(),
            "versions": versions(),
        }
    )
    write_atomically(directory / "run.json", json.dumps(content, indent=1))


def versions() -> dict[str, str]:
    """Python and the packages that numbers depend on; those that are installed."""
    found = {"python": sys.version.split()[0]}
    for package in ("megaflow", *PACKAGES):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def source_digest() -> str:
    """Of the code that runs: versions of a checkout are all the same."""
    package, found = Path(__file__).resolve().parents[1], hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        found.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def git_state() -> dict[str, Any]:
    """Commit of the code that runs and whether it was changed since; empty where it is not a git checkout."""
    here, git = Path(__file__).resolve().parent, ("git", "--no-optional-locks")  # it reads, and writes no index
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
        status = subprocess.run([*git, "status", "--porcelain"], cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit, "changed_files": len(status.splitlines())}


class Metrics:
    """metrics.jsonl and Weights & Biases. Lines are flushed one by one; on resume, lines after the checkpoint are cut."""

    def __init__(self, config: Config, step: int) -> None:
        directory = Path(config.run.dir)
        path = directory / "metrics.jsonl"
        kept = [line for line in lines(path) if line.get("step", 0) <= step]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.path, self.file = path, path.open("a", encoding="utf-8")
        self.wandb = None if config.log.wandb == "off" else _wandb(config, directory)
        self.board = _tensorboard(directory, step) if config.log.tensorboard else None

    def write(self, line: dict[str, Any]) -> None:
        with naming(self.path):
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        if self.board is not None:
            for name, value in line.items():
                if name != "step" and isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, line["step"])
        self._tell("log", {k: v for k, v in line.items() if k != "step"}, step=line["step"])

    def close(self) -> None:
        with naming(self.path):  # a line that has not found room is tried once more
            self.file.close()
        if self.board is not None:
            self.board.close()
        self._tell("finish")

    def _tell(self, what: str, *arguments: Any, **named: Any) -> None:
        """Weights & Biases is a process of its own; where it dies the run goes on without."""
        if self.wandb is None:
            return
        try:
            getattr(self.wandb, what)(*arguments, **named)
        except Exception as error:  # of its client, its sockets, its service
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"warning: Weights & Biases is gone ({reason}); the run goes on, metrics.jsonl has everything", file=sys.stderr)
            self.wandb = None
            import wandb

            with contextlib.suppress(Exception):
                wandb.teardown()  # left to the end of the process it fails there, with a traceback


def _tensorboard(directory: Path, step: int) -> Any:
    """A writer of event files, without what an earlier start has written of later steps. Raises UserError."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("log.tensorboard=true needs the package tensorboard; pip install tensorboard, or leave it false") from None
    return SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)


def _wandb(config: Config, directory: Path) -> Any:
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):  # nothing is written outside the run
        os.environ.setdefault(name, str((directory / "wandb").resolve()))
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    try:
        return wandb.init(
            project=config.log.project,
            name=directory.name,
            id=_wandb_id(directory),
            dir=str(directory),
            mode="online" if config.log.wandb == "online" else "offline",
            config=flatten(config) | labels(directory),
            group=config.log.group or None,
            resume="allow",
        )
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())
        raise UserError(f"log.wandb={config.log.wandb}: {reason}; see to that, or use log.wandb=offline and wandb sync later") from None


def labels(directory: Path) -> dict[str, str]:
    """What sets a point of a sweep apart from the others, by names of its axes; nothing of other runs."""
    file = directory / "point.json"
    found = read_json(file).get("labels", {}) if file.exists() else {}
    return {f"sweep/{axis}": str(label) for axis, label in found.items()}


def _wandb_id(directory: Path) -> str:
    """One curve for all starts of a run: steps that are taken again after a kill are the same, and synced once."""
    content = read_json(directory / "run.json", "starts")
    if "wandb" not in content:
        content["wandb"] = secrets.token_hex(4)
        write_atomically(directory / "run.json", json.dumps(content, indent=1))
    return content["wandb"]
