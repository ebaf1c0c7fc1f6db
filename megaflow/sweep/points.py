"""Points in the folder of a sweep: which of them are there, how they ended, and who works on them.

DIR/NAME/            the run of a point, as any other
DIR/NAME/point.json  what it is a point of: its identity, choice, seed; how it ended last
DIR/NAME/console.log what its commands have said
DIR/sweeps/NAME.json the sweeps that were run here, for the report

A point's identity is what its config says, without what the machine alone has to do with: the same point is trained once, whichever sweep
asks for it, under whatever name.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from megaflow import evaluation_file
from megaflow.config.check import contradictions, resolve
from megaflow.config.load import Loaded, load, meant
from megaflow.errors import UserError
from megaflow.files import read_if_whole, sealed, write_atomically
from megaflow.launch import records
from megaflow.model import flops
from megaflow.show import foreseen, known, rows_of, rows_read, tokenizer_of
from megaflow.sweep.design import BESIDES, BYS, EVALUATION, TEACHER, Point, Sweep, judges_of, slug, written
from megaflow.train import outcome
from megaflow.train.run import MAY_CHANGE, read_run

UNMEASURED = "how fast it trains is not measured yet, or could not be"
FILE, LOG, CLAIM = "point.json", "console.log", ".claim"
DONE, FAILED, REFUSED, EARLY, STOPPED = "done", "failed", "refused", "stopped early", "stopped"


@dataclass(frozen=True)
class Placed:
    """A point with its run's directory and identity; `refused` says why its config cannot be trained."""

    point: Point
    directory: Path
    identity: str
    words: list[str]
    """All overrides of the command line."""
    refused: str = ""
    steps: int = 0
    """Of its config, 0 where that is refused."""
    kind: str = ""
    """Its identity but for seed and steps: what is as fast as it."""
    rows: str = ""
    """What tells the rows of its shards from others (show.rows_of); empty of a map, which has its flow's."""


def place(sweep: Sweep, all_points: list[Point], speeds: dict[str, float] | None = None, listing: bool = False) -> list[Placed]:
    """Where every point is, or is to be. A point that two choices of a sweep come to is there once.

    speeds: tokens a second by kinds of points, where the budget is one of seconds (speed.py); listing: only to be looked at, for which
    shards need not be there. Raises UserError where they must: without them a point is not known again.
    """
    folder = Path(sweep.dir)
    # what was refused has no run, and leaves its name to one that is not
    noted = recorded(folder)
    refusals = {path for path, content in noted.items() if content.get("state") == REFUSED and not (path / "config.yaml").exists()}
    there = {content["identity"]: path for path, content in noted.items() if path not in refusals}
    by_name: dict[str, tuple[Path, str]] = {}
    missing: list[str] = []
    found: list[Placed] = []
    taken = {path.name for path in there.values()} | {file.parent.name for file in folder.glob("*/config.yaml")}  # or runs of no sweep
    for point in all_points:
        words, refused, steps, kind, rows = point.words(), "", 0, "", ""
        if point.teacher:
            words.append(f"distill.teacher={by_name[point.teacher][0]}")
        try:
            # a map is known by what its own config says and by its flow, which need not be there yet
            loaded, vocab = (load(point.base, words), None) if point.teacher else known(point.base, words)
            kind = identity_of(loaded, point.stage, besides=("run.seed", "train.steps"))
            if sweep.budget:
                words.append(f"train.steps={steps_of(sweep.budget, loaded, vocab, (speeds or {}).get(kind))}")
                loaded, vocab = known(point.base, words)
            if at := loaded.config.train.pause_at:
                raise UserError(f"train.pause_at={at}: points of a sweep train to their end; leave it out")
            if not point.teacher:
                contradictions(loaded)
                if point.stage == "distill" and not loaded.config.distill.teacher:
                    raise UserError("distill.teacher is not set; give the sweep a teacher, or a base that has one")
            if vocab is not None and not point.teacher:
                resolve(loaded, vocab)
            if vocab is None and not point.teacher and not listing:
                missing.append(loaded.config.data.path)
            of = by_name[point.teacher][1] if point.teacher else weights_of(loaded) if point.stage == "distill" else ""
            identity, steps = identity_of(loaded, point.stage, teacher=of), loaded.config.train.steps
            rows = rows_of(loaded.config.data.path) if point.stage == "pretrain" and vocab is not None else ""
        except UserError as error:
            refused = str(error).removeprefix("command line: ")
            identity = hashed([point.base, words])
        directory = there.get(identity)
        if directory is None:
            name = point.name if point.name not in taken else f"{point.name}-{identity[:6]}"
            directory = folder / name
            there[identity] = directory
            taken.add(name)
        by_name[point.name] = directory, identity
        found.append(Placed(point, directory, identity, words, refused, steps, kind, rows))
    if missing:
        raise UserError(f"data.path={missing[0]}: no shards are there, on which points are to be trained; prepare them first")
    return found


def check_tokens(sweep: Sweep, all_points: list[Point]) -> None:
    """Refuse a halving or a search that would decide by nats of other tokens. Raises UserError."""
    deciding = [name for name in (sweep.draw.get("by", ""), sweep.metric) if name in BYS or name.endswith("nats_per_token")]
    if sweep.draw["kind"] not in ("halving", "optuna") or not deciding:
        return
    usual = load(sweep.base).config.data.path
    paths = dict.fromkeys(str(point.overrides.get("data.path", usual)) for point in all_points if TEACHER not in point.labels)
    if len({tokens for path in paths if (tokens := tokenizer_of(path))}) > 1:
        told = f"{deciding[0]} is nats a token, and {' and '.join(list(paths)[:2])} have other tokens"
        raise UserError(f"{sweep.file}: {told}; choose metric=likelihood.bits_per_char with evaluate, and no halving")


def recorded(folder: Path) -> dict[Path, dict[str, Any]]:
    """The points that are there, of whichever sweep."""
    found = {}
    for file in sorted(folder.glob(f"*/{FILE}")):
        content = record(file.parent)
        if "identity" in content:
            found[file.parent] = content
    return found


def record(directory: Path) -> dict[str, Any]:
    """What is noted of a point; empty where nothing is."""
    return read_if_whole(directory / FILE)


def note(placed: Placed, state: str, said: str = "", at: float | None = None) -> None:
    """How a point stands now, or at a time.time() before."""
    point = placed.point
    content = {"identity": placed.identity, "labels": point.labels, "seed": point.seed, "stage": point.stage, "base": point.base}
    content |= {
        "words": placed.words,
        "steps": placed.steps,
        "rows": placed.rows,
        "time": time.time() if at is None else at,
        "state": state,
        "said": said,
    }
    placed.directory.mkdir(parents=True, exist_ok=True)
    write_atomically(placed.directory / FILE, json.dumps(content, indent=1))


def identity_of(loaded: Loaded, stage: str, besides: tuple[str, ...] = (), teacher: str = "") -> str:
    """Of a config and the rows of its shards, but for what is the machine's and `besides`; teacher: the identity of the flow that a map is
    of."""
    values = {name: value for name, value in meant(loaded.config).items() if not name.startswith((*MAY_CHANGE, *besides))}
    return hashed([stage, values, rows_of(loaded.config.data.path)] + ([teacher] if teacher else []))


def weights_of(loaded: Loaded) -> str:
    """What tells the flow that a map is distilled from, one that no sweep trains, from others and from itself at another step. Raises
    UserError where there is none."""
    teacher = Path(loaded.config.distill.teacher)
    if not loaded.config.distill.teacher:
        return ""
    return hashed([identity_of(read_run(teacher), "pretrain", besides=("train.steps",)), outcome.newest_step(teacher)])


def hashed(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def steps_of(budget: dict[str, float], loaded: Loaded, vocab: int | None, speed: float | None = None) -> int:
    """Steps of a config that has so many tokens or model FLOPs, or seconds at so many tokens a second.

    Raises UserError where FLOPs cannot be counted, or the speed is not known.
    """
    config = loaded.config
    tokens = budget.get("tokens")
    if "seconds" in budget:
        if speed is None:
            raise UserError(UNMEASURED)
        tokens = budget["seconds"] * speed
    if tokens is None:
        size = foreseen(loaded) if vocab is None else vocab
        if size is None:
            raise UserError("budget.flops needs the size of the vocabulary, which only shards have; prepare them first")
        whole = resolve(loaded, size).config
        if why := flops.uncounted(whole) or ("train.joint: what a step costs hangs on its clock" if whole.train.joint else ""):
            raise UserError(f"budget.flops has no formula for this config ({why}); use budget.tokens")
        tokens = budget["flops"] / flops.of_step(whole, size, False, 1.0).model
    step = config.train.global_batch * config.data.length
    if (steps := round(tokens / step)) < 1:
        kind, most = next(iter(budget.items()))
        raise UserError(f"budget.{kind}={most:g} is {tokens:,.0f} tokens, and a step of this config has {step:,}; give more")
    return steps


def unheard(directory: Path) -> list[str]:
    """The last jobs of a point that have left the queue and no attempt of theirs is noted, of one stage and in a row: their hosts could not
    even begin. Of the stage that has most."""
    place = records.place_of(directory)
    heard, found = {line["job"] for line in records.attempts(place)}, dict[str, list[str]]()
    for line in records.jobs(place):
        found[line["stage"]] = [] if line["job"] in heard else [*found.get(line["stage"], []), line["job"]]
    return max(found.values(), key=len, default=[])


def cancelled(directory: Path) -> bool:
    """Whether the last that became of a point's training, since it was submitted, is that somebody has cancelled it."""
    place = records.place_of(directory)
    own = {line["job"] for line in records.jobs(place) if line["stage"] in records.TRAINING}  # and none of what comes after
    attempts = [line for line in records.attempts(place) if line["job"] in own]
    return bool(attempts) and attempts[-1]["time"] > record(directory).get("time", 0.0) and bool(attempts[-1].get("cancelled"))


def stuck(directory: Path, times: int) -> str:
    """What was said last of a point whose jobs have ended so many times one after the other where they could not queue again, with no new
    checkpoint between; empty of others."""
    last = [line for line in reversed(records.attempts(records.place_of(directory))) if line["decision"] != "again"]
    ended = list(itertools.takewhile(lambda line: line["decision"] == "left" and not line.get("cancelled"), last))
    alike = len(ended) >= times and len({line.get("step") for line in ended[:times]}) == 1
    return f"{ended[0]['said']}; so {times} times, with no new checkpoint between" if alike else ""


def stands(directory: Path, evaluate: dict[str, Any]) -> tuple[str, str]:
    """(state, what was said) of a point by what lies there, whoever has worked on it; 'pending' of one that nobody has begun.

    One that was evaluated otherwise than by these options is not done: its numbers are not those of the others.
    """
    content = record(directory)
    if said := another(directory):
        return FAILED, said
    if (directory / "summary.json").exists() and evaluated(directory, evaluate):
        return DONE, ""
    attempts = [line for line in records.attempts(records.place_of(directory)) if line["time"] > content.get("time", 0.0)]
    if content.get("state") == "queued" and attempts and attempts[-1]["decision"] in ("over", "left"):
        return FAILED if attempts[-1]["decision"] == "over" else STOPPED, attempts[-1]["said"]
    state = content.get("state", "pending")
    return ("pending" if state == DONE else state), content.get("said", "")


def another(directory: Path) -> str:
    """Why the run that lies in a point's folder is not that point, a sentence; empty where it is."""
    content, steps = record(directory), read_if_whole(directory / "summary.json").get("steps")
    told = ""
    if steps is not None and content.get("steps") and steps > content["steps"]:
        told = f"somebody has trained it to step {steps}, and the point has {content['steps']}"
    elif content.get("rows") and rows_read(directory) not in (content["rows"], ""):
        told = "its shards were made anew before it began, and it was trained on other rows than it was asked for"
    return told and f"{told}; take its folder out of the sweep's, and the same command trains it again"


def evaluated(directory: Path, evaluate: dict[str, Any]) -> bool:
    """Whether a run has an evaluation by these options, those that are not given by their defaults."""
    return not evaluate or bool(evaluation_of(directory, evaluate))


def evaluation_of(directory: Path, evaluate: dict[str, Any]) -> dict[str, Any]:
    """The evaluation of a run by these options: the sweep's own, which no other sweep of the folder takes the place of, or what somebody
    has made by hand; empty where there is none."""
    wanted = EVALUATION | {name: value for name, value in evaluate.items() if name not in BESIDES}
    wanted["steps"] = [int(part) for part in str(wanted["steps"]).split(",")]
    judges, task = judges_of(evaluate), evaluate.get("verify")
    own = kept_evaluation(directory, evaluate)  # whose name has the options in it
    step = read_if_whole(directory / "summary.json").get("steps", outcome.newest_step(directory))
    for file in (own, directory / evaluation_file.FILE):
        found = evaluation_file.read(file)
        settings = found.get("settings", {})
        same = found.get("step") == step and all(settings.get(name, "auto") == value for name, value in wanted.items())
        if same and set(judges) <= set(settings.get("judges", {})) and (file == own or task in (None, settings.get("verify"))):
            return found
    return {}


def keep_evaluation(directory: Path, evaluate: dict[str, Any]) -> None:
    """Keep for this sweep what it has taken of an evaluation by hand, or of another sweep, whose next one would take its place."""
    own = kept_evaluation(directory, evaluate)
    if evaluate and (found := evaluation_of(directory, evaluate)) and evaluation_file.read(own) != found:
        with contextlib.suppress(OSError):
            write_atomically(own, sealed(found))


def kept_evaluation(directory: Path, evaluate: dict[str, Any]) -> Path:
    return directory / f"evaluation-{hashed(EVALUATION | evaluate)[:6]}.json"


def training(asked: Sweep, each: Placed) -> list[str]:
    """The words after `megaflow` that train a point."""
    group = f"log.group={slug(Path(asked.file).stem)}"
    return [each.point.stage, each.point.base, group, *each.words, f"run.dir={each.directory}"]


def evaluation(asked: Sweep, directory: Path) -> list[list[str]]:
    """The words after `megaflow` that evaluate a point; none where points are only trained."""
    plain = [(name, value) for name, value in asked.evaluate.items() if name != "judge"]
    judges = [("judge", path) for path in judges_of(asked.evaluate)]
    options = [word for name, value in [*plain, *judges] for word in (f"--{name}", written(value))]
    return [["evaluate", str(directory), *options, "--json", str(kept_evaluation(directory, asked.evaluate))]] if asked.evaluate else []


def teacher_of(each: Placed) -> str:
    """The run that a point is a map of; empty of a flow."""
    return next((word.partition("=")[2] for word in each.words if word.startswith("distill.teacher=") and each.point.teacher), "")


def why_orphaned(each: Placed) -> str:
    """What a map says whose flow was refused or has failed."""
    teacher = teacher_of(each)
    said = record(Path(teacher)).get("said") or stands(Path(teacher), {})[1]
    return f"its teacher {teacher} has failed" + (f": {said}" if said else "")


def orphaned(each: Placed) -> bool:
    """Whether a point is a map of a flow that has failed, was refused, or that somebody has stopped."""
    return bool(each.point.teacher) and stands(Path(teacher_of(each)), {})[0] in (FAILED, REFUSED, STOPPED)


def claim(directory: Path) -> TextIO | None:
    """Hold a point for this process until the file is closed; None where another one does."""
    directory.mkdir(parents=True, exist_ok=True)
    file = (directory / CLAIM).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file
