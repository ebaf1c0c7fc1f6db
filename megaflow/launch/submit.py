"""`megaflow submit`: a stage as a Slurm job, or several that wait for one another.

What a config says is checked here, by the rules of the stages themselves, so that no job waits for hours to be refused.
"""

import contextlib
import errno
import os
import re
import shlex
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from megaflow.config import load
from megaflow.config.check import batch_split, resolve
from megaflow.errors import UserError
from megaflow.files import write_atomically
from megaflow.launch import records, script, slurm, status
from megaflow.launch.records import TRAINING
from megaflow.launch.script import Job, Resources
from megaflow.show import is_there, known
from megaflow.train import outcome
from megaflow.train.run import continued

STAGES = ("prepare", "pretrain", "distill", "evaluate", "convert")
FLAGS = ("mauve", "frontier")
OPTIONS = {
    "evaluate": (
        *("steps", "samples", "rows", "draws", "temperature", "clock", "seed", "data", "text", "json"),
        *("judge", "temperatures", "gammas", "entropy", *FLAGS),
        *("verify", "ode-likelihood", "probes"),
    ),
    "convert": ("to", "step", "weights", "precision", "shard-size", "processes"),
}
"""Of the commands that know no config."""
Check = Callable[[list[str], Collection[str]], None]
"""Refuses the words of a command that it would refuse itself; what lies at the paths given is still to be made. Raises UserError."""
LATEST = 60
"""Seconds by which Slurm may tell a job earlier than it was asked to."""


@dataclass
class Step:
    """One job of a submission: the words after `megaflow`, what they work on, and where its jobs are noted."""

    stage: str
    words: list[str]
    directory: Path
    place: Path
    waits: list[str] = field(default_factory=list)
    """Dependencies of sbatch, 'afterok:12'."""
    kept: tuple[Path, str] | None = None
    """The file of its config as it is now, and what is in it: what the job reads."""
    mounts: tuple[str, ...] = ()
    """What a container has to see besides."""

    @property
    def name(self) -> str:
        own = Path(self.directory).absolute().name
        return own if self.stage in TRAINING else f"{own}.{self.stage}"


def submit(
    config: str,
    overrides: list[str],
    resources: Resources,
    after: list[str] | None = None,
    then: list[list[str]] | None = None,
    dry_run: bool = False,
    templates: str | None = None,
    check: Check = lambda words, coming: None,
) -> None:
    """Render, show and submit the job of `config`, and those of `then`, each a stage and its words, which follow one another.

    after: directories whose jobs must have succeeded before; check: of commands that know no config. Prints scripts, ids, and how to follow
    them. Raises UserError.
    """
    stages = [word.partition("=")[2] for word in overrides if word.startswith("stage=")]
    overrides = [word for word in overrides if not word.startswith("stage=")]
    steps = [step(stages[-1] if stages else "pretrain", [config, *overrides], resources, None, bool(after))]
    for stage, *words in then or []:
        run = next((earlier.directory for earlier in reversed(steps) if earlier.stage in (*TRAINING, "evaluate")), None)
        for each in (each for each in steps if each.stage in TRAINING):
            if at := known(each.words[1], each.words[2:])[0].config.train.pause_at:
                raise UserError(f"train.pause_at={at}: the run pauses there, and --then {stage} would begin; leave one of them out")
        steps.append(step(stage, words, resources, run, True))
    single(steps, resources)
    coming = {os.path.abspath(path) for path in after or []}
    for each in steps:
        if each.stage in OPTIONS:
            check(each.words, coming)
        coming.add(os.path.abspath(each.directory))
    limits(resources)
    source = script.folder(templates)
    in_order(steps, after or [])
    seen = apart([path for each in steps for path in mounts(each, resources.mounts)])
    for each in steps:
        each.mounts = seen
        if each.stage not in OPTIONS:
            each.kept = load.frozen(each.words[1], each.place / "configs")
            each.words[1] = as_argument(each.kept[0])
    steps[0].waits = [f"afterok:{id}" for directory in after or [] for id in queued(directory, dry_run)]
    if not dry_run:
        for each in steps:
            free(each)
    before = ""
    for number, each in enumerate(steps):
        waits = each.waits + ([f"afterok:{before}"] if before else [])
        job = Job(
            name=each.name,
            words=each.words,
            place=each.place.absolute(),
            resources=replace(needed(each.stage, resources), mounts=each.mounts),
            directory=str(each.directory) if each.stage in TRAINING else "",
            dependency=",".join(waits),
        )
        text = script.render(job, source, Path.cwd())
        print(text, flush=True)
        before = f"JOB_{number + 1}" if dry_run else sent(each, text)


def step(stage: str, words: list[str], resources: Resources, run: Path | None, waits: bool) -> Step:
    """A stage with its words, checked. `run` is that of the stage before it; waits: whether anything comes before it. Raises UserError."""
    if stage not in STAGES:
        raise UserError(f"stage={stage}: there is no such stage; there are {', '.join(STAGES)}")
    if stage in OPTIONS:
        # names of runs may have a =, those of the points of a sweep always have
        options = [word for word in words if re.match(r"-{0,2}[a-z][a-z-]*=", word) and not Path(word).exists()]
        plain = [word for word in words if word not in options]
        outs = 1 if stage == "convert" else 0
        if len(plain) == outs and run is not None:
            plain = [str(run), *plain]
        if len(plain) != outs + 1:
            raise UserError(f"{stage} takes RUN{' OUT' * outs} and options as name=value, not {shlex.join(words) or 'nothing'}")
        directory = run_of(plain[0])
        if not waits and not (directory / "config.yaml").exists():
            raise UserError(f"{directory}: no run is there to {stage}; give its directory or config, or --after what makes it")
        given = [option(stage, word) for word in options]
        if stage == "convert" and os.path.lexists(plain[1]):
            raise UserError(f"{plain[1]}: this is there already, and nothing is written over; give a new folder, or remove it")
        return Step(stage, [stage, as_argument(directory), *plain[1:], *given], directory, records.place_of(directory))
    plain = [word for word in words if "=" not in word or Path(word).is_file()]  # points of a sweep have a = in their names
    options = [word for word in words if word not in plain]
    if len(plain) != 1:
        raise UserError(f"{stage} takes a CONFIG and overrides a.b=c, not {shlex.join(words) or 'nothing'}")
    path = plain[0]
    loaded, vocab = known(path, options)
    if stage == "prepare":
        data = Path(loaded.config.data.path)
        return Step(stage, [stage, path, *options], data, data.absolute().with_name(f"{data.absolute().name}.slurm"))
    config = loaded.config
    if stage == "distill" and not config.distill.teacher:
        raise UserError(f"{path}: distill.teacher is not set; give the run of a flow, distill.teacher=RUN")
    if stage == "distill" and not waits and not is_there(config.distill.teacher):
        raise UserError(f"distill.teacher={config.distill.teacher}: no run is there; submit it first, and this --after it")
    if vocab is None and not waits:
        raise UserError(f"data.path={config.data.path}: no shards are there; submit stage=prepare, and this --after {config.data.path}")
    if vocab is not None and not (stage == "distill" and not is_there(config.distill.teacher)):
        whole = resolve(loaded, vocab)
        if (Path(config.run.dir) / "config.yaml").exists():
            continued(whole, stage)
    ranks, tensor = resources.nodes * resources.ranks, config.parallel.tensor
    if ranks % tensor:
        raise UserError(f"{ranks} ranks are no multiple of parallel.tensor={tensor}; ask for other --nodes or --gpus-per-node")
    batch_split(config, ranks // tensor)
    directory = Path(config.run.dir)
    return Step(stage, [stage, path, *options], directory, directory / "slurm")


def option(stage: str, word: str) -> str:
    """An option name=value as its command takes it. Raises UserError."""
    name, _, value = word.lstrip("-").partition("=")
    if name not in OPTIONS[stage]:
        raise UserError(f"{stage} has no option {name}; it has {', '.join(OPTIONS[stage])}")
    if name in FLAGS:
        if value != "true":
            raise UserError(f"{name}={value}: write {name}=true, or leave it out")
        return f"--{name}"
    return f"--{name}={value}"


def in_order(steps: list[Step], after: list[str]) -> None:
    """Refuse a stage that nothing before it makes possible: it would wait for hours to say so. Raises UserError."""
    made, outs, trained = {os.path.abspath(path) for path in after}, set[str](), set[str]()
    for each in steps:
        if each.stage in TRAINING:
            if (run := os.path.abspath(each.directory)) in trained:
                raise UserError(f"run.dir={each.directory}: two stages train this run; give each its own")
            trained.add(run)
        if each.stage == "distill":
            teacher = known(each.words[1], each.words[2:])[0].config.distill.teacher
            if os.path.abspath(teacher) == os.path.abspath(each.directory):
                raise UserError(f"distill.teacher={teacher}: this is the map's own run.dir; give it another")
            if not is_there(teacher) and os.path.abspath(teacher) not in made:
                raise UserError(f"distill.teacher={teacher}: no run is there, and nothing that comes before makes it")
        if each.stage == "convert":
            if (out := os.path.abspath(each.words[2])) in outs:
                raise UserError(f"{each.words[2]}: two stages convert into this folder; give each its own")
            outs.add(out)
        made.add(os.path.abspath(each.directory))


def mounts(each: Step, more: tuple[str, ...] = ()) -> list[str]:
    """Files' folders and folders that a step reads and writes: its run and what that names, what its config or options name, and `more`."""
    found = [str(each.directory if each.stage != "prepare" else each.directory.absolute().parent), *more, *named_by(each.directory)]
    if each.stage not in OPTIONS:
        config = known(each.words[1], each.words[2:])[0].config
        found += [config.data.path, config.distill.teacher, config.model.start, *named_by(Path(config.distill.teacher))]
        files = [*config.data.source, config.data.tokenizer] if each.stage == "prepare" else []
    elif each.stage == "convert":
        files = [os.path.abspath(each.words[2])]
    else:
        found += [word.partition("=")[2] for word in each.words if word.startswith(("--judge=", "--data="))]
        files = [word.partition("=")[2] for word in each.words if word.startswith(("--text=", "--json="))]
    found += [os.path.dirname(os.path.abspath(file)) for file in files if os.path.lexists(os.path.dirname(os.path.abspath(file)))]
    return [path for path in found if path]


def named_by(run: Path) -> list[str]:
    """The shards and the teacher of a run that is there."""
    if not (run / "config.yaml").is_file():
        return []
    config = load.load_recorded(run / "config.yaml").config
    return [config.data.path, config.distill.teacher]


def apart(folders: list[str]) -> tuple[str, ...]:
    """Absolute, with where links lead: those that lie within none of the others, nor below the working directory, which is mounted
    anyway."""
    folders = [each for folder in folders for each in (os.path.abspath(folder), os.path.realpath(folder))]
    kept: list[Path] = [Path.cwd()]
    for folder in sorted(dict.fromkeys(Path(folder) for folder in folders), key=lambda path: len(path.parts)):
        if not any(folder.is_relative_to(other) for other in kept):
            kept.append(folder)
    return tuple(map(str, kept[1:]))


def as_argument(path: Path) -> str:
    """A path as a command takes it: one that begins with a dash would be an option."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def run_of(given: str) -> Path:
    """A run's directory, given as that or as the config that it is made by. Raises UserError."""
    return Path(known(given, [])[0].config.run.dir) if Path(given).is_file() else Path(given)


def needed(stage: str, resources: Resources) -> Resources:
    """What a stage takes of what was asked for: all but training is one process, and two of them know no GPU."""
    if stage in TRAINING:
        return resources
    return replace(resources, nodes=1, processes=1, gpus=min(1, resources.gpus) if stage == "evaluate" else 0)


def single(steps: list[Step], resources: Resources) -> None:
    if resources.nodes == 1 and max(resources.processes, resources.gpus) <= 1 or any(each.stage in TRAINING for each in steps):
        return
    raise UserError(f"stage={steps[0].stage} is one process, and has no use for more hosts, GPUs or processes")


def limits(resources: Resources) -> None:
    """Refuse a time limit that is over before anything begins. Raises UserError."""
    if not resources.time or resources.time.upper() in ("UNLIMITED", "INFINITE"):
        return
    seconds = seconds_of(resources.time)
    if seconds <= resources.margin + LATEST:
        raise UserError(
            f"--time {resources.time}: a job is told to save {resources.margin} s before its end (--margin), which Slurm may do up to "
            f"{LATEST} s earlier, and nothing is left to train in; ask for more time"
        )


def seconds_of(text: str) -> int:
    """Of Slurm's forms of a time: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises UserError."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        raise UserError(f"--time {text}: write minutes, H:MM:SS or D-HH:MM:SS")
    days, *rest = found.groups()
    a, b, c = (int(part or 0) for part in rest)
    if days is not None:
        return ((int(days) * 24 + a) * 60 + b) * 60 + c
    return a * 60 + b if found[4] is None else (a * 60 + b) * 60 + c


def queued(directory: str, dry_run: bool) -> list[str]:
    """The jobs of a run, or of shards, that are not over. Raises UserError."""
    known_jobs = records.jobs(records.place_of(directory))
    finished = any((Path(directory) / name).exists() for name in ("summary.json", "prepared.json"))
    if not known_jobs and finished:
        return []
    if not known_jobs:
        raise UserError(f"--after {directory}: no job was submitted for it; give the directory of a run or of shards that has one")
    ids = [line["job"] for line in known_jobs]
    if dry_run and not slurm.here():
        return ids[-1:]
    active = list(slurm.waiting_or_running(ids))
    if any(line["job"] in active and line["stage"] == "next" for line in known_jobs):
        raise UserError(f"--after {directory}: this sweep submits more as it goes, until it has decided; ask again when it is over")
    if not active and (Path(directory) / "sweeps").is_dir():
        raise UserError(f"--after {directory}: no job of this sweep is in the queue; if it is done, leave --after out")
    if not active and not finished:
        raise UserError(f"--after {directory}: its job {ids[-1]} is over and it is not finished; submit that again, or leave --after out")
    return active


def free(each: Step) -> None:
    """Refuse a second job that would train the same run. Raises UserError."""
    if each.stage not in (*TRAINING, "prepare"):
        return
    if each.place.is_dir():
        with contextlib.suppress(slurm.Unreachable):  # whose own sentence is sbatch's
            if strange := slurm.logging_to(each.place.absolute()) - {line["job"] for line in records.jobs(each.place)}:
                told = f"job {min(strange)} writes its log there and is not noted (its sbatch did not answer in time, or was killed)"
                raise UserError(f"{each.place}: {told}; if nobody is just submitting it, scancel {' '.join(sorted(strange))} and ask again")
    ids = [line["job"] for line in records.jobs(each.place) if line["stage"] == each.stage]
    if active := slurm.waiting_or_running(ids):
        id, job = next(iter(active.items()))
        raise UserError(f"{each.directory}: job {id} is already there for it, {job}; wait, megaflow cancel it, or choose another run.dir")
    if each.stage in TRAINING and (pid := status.here(each.directory)):  # after the jobs, whose processes may be of this host
        raise UserError(f"{each.directory}: process {pid} of this host trains it; wait, megaflow cancel it, or choose another run.dir")


def sent(each: Step, text: str) -> str:
    """Submit a script, note it, and say how to follow it. Returns the job's id. Raises UserError."""
    new = each.kept is not None and not each.kept[0].exists()  # an earlier job may read it
    try:
        each.place.mkdir(parents=True, exist_ok=True)
        if each.kept is not None and new:
            each.kept[0].parent.mkdir(parents=True, exist_ok=True)
            write_atomically(*each.kept)
        if not os.access(each.place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "it is not writable")
    except OSError as error:
        raise UserError(f"{each.place}: cannot be written to ({error.strerror}); choose another place for the run") from None
    try:
        id = slurm.submit(text)
    except slurm.Unanswered:  # the job may be there, and read what was kept for it
        raise
    except UserError:
        with contextlib.suppress(OSError):  # empty folders that were made for it
            if each.kept is not None and new:
                each.kept[0].unlink()
                each.kept[0].parent.rmdir()
                each.kept[0].parent.parent.rmdir()
            each.place.rmdir()
            each.directory.rmdir()
        raise
    if each.stage in TRAINING:
        outcome.begin(each.directory)  # what is said there is of an attempt before
    print(f"\njob {id}: {each.stage} {each.directory}", flush=True)
    content = {"job": id, "stage": each.stage, "time": time.time(), "words": each.words, "directory": str(each.directory)}
    records.add_job(each.place, content)
    (each.place / f"{id}.sbatch").write_text(text, "utf-8")
    of = shlex.quote(str(each.directory))
    print(f"  log     {each.place / f'{id}.log'}    megaflow logs {of} -f --job {id}")
    print(f"  state   megaflow status {of}\n  end it  megaflow cancel {of}\n")
    return id
