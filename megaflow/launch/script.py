"""The sbatch script of a job, rendered from slurm/job.sbatch. Names, paths and overrides go into it as data, whatever they hold."""

import re
import shlex
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from megaflow.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2] / "slurm"
INSTALLED = Path(sysconfig.get_paths()["data"]) / "share" / "megaflow" / "slurm"
TEMPLATE, SITE = "job.sbatch", "site.sh"


@dataclass(frozen=True)
class Resources:
    """What a job asks for. A rank takes one GPU, or on hosts without any one of `processes`."""

    nodes: int = 1
    gpus: int = 0
    """Of each host; 0: CPUs alone."""
    processes: int = 1
    """Ranks of each host, where it has no GPUs."""
    cpus: int | None = None
    """Cores of each host."""
    time: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    container: str = ""
    mounts: tuple[str, ...] = ()
    """Folders that the container has to see, besides the working directory and that of logs."""
    margin: int = 120
    """Seconds before the time limit at which a job is told to save."""
    more: tuple[str, ...] = ()
    """Further options of sbatch, '--exclusive'."""

    @property
    def cores(self) -> int | None:
        """Of each host: what was asked for, and of several ranks without GPUs one each at least. Of GPUs the site knows how many."""
        return self.cpus or (self.processes if self.processes > 1 else None)

    @property
    def ranks(self) -> int:
        """Of each host."""
        return self.gpus or self.processes


@dataclass(frozen=True)
class Job:
    """What runs where: the words after `megaflow`, the folder of scripts and logs, what it waits for."""

    name: str
    words: list[str]
    place: Path
    resources: Resources
    directory: str = ""
    """Of the run that is trained; empty for commands that note no outcome of their own."""
    dependency: str = ""
    array: str = ""


def folder(given: str | None = None) -> Path:
    """The templates: a folder of one's own, that of the checkout, or what was installed. Raises UserError."""
    places = [Path(given)] if given else [REPOSITORY, INSTALLED]
    for place in places:
        if (place / TEMPLATE).is_file() and (place / SITE).is_file():
            return place
    raise UserError(f"{places[0]}: there is no {TEMPLATE} with a {SITE} beside it; give the folder of your copies of both, --templates DIR")


def directive(option: str, value: object = None) -> str:
    """A line for sbatch, which reads words in double quotes much as a shell does, but expands nothing, and takes # for the
    beginning of a comment even there. Raises UserError."""
    text = "" if value is None else str(value)
    if any(ord(character) < 32 for character in option + text) or not re.fullmatch(r"[\w-]+", option):
        raise UserError(f"{option + '=' + text!r} cannot be an option of a Slurm job: it has a line break or another control character")
    if value is None or re.fullmatch(r"[\w./:,@%+=-]+", text):
        return f"#SBATCH --{option}" + ("" if value is None else f"={text}")
    escaped = re.sub(r'([\\"#])', r"\\\1", text)
    return f'#SBATCH --{option}="{escaped}"'


KEPT = "no-requeue", "array", "ntasks", "time"
"""Options of sbatch that are not to be given beside ours, whether or not these are: --time is checked, and ranks are counted."""


def directives(job: Job) -> str:
    """The #SBATCH lines. Raises UserError."""
    resources = job.resources
    log = job.place / ("%A_%a.log" if job.array else "%j.log")
    if "%" in str(job.place) or "\\" in str(job.place):
        raise UserError(f"{job.place}: Slurm reads % and \\ in the names of logs in its own way; give the run a directory without them")
    lines = [
        directive("job-name", job.name),
        directive("nodes", resources.nodes),
        directive("ntasks-per-node", 1),
        directive("output", log),
        directive("open-mode", "append"),
        directive("requeue"),
        directive("signal", f"B:USR1@{resources.margin}"),
    ]
    optional = {
        "gpus-per-node": resources.gpus or "",
        "cpus-per-task": resources.cores or "",
        "time": resources.time,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "dependency": job.dependency,
        "array": job.array,
    }
    lines += [directive(option, value) for option, value in optional.items() if value != ""]
    if job.dependency:
        lines.append(directive("kill-on-invalid-dep", "yes"))  # what waits for a job that failed would wait for ever
    ours = {*KEPT, *(line.removeprefix("#SBATCH --").partition("=")[0] for line in lines)}
    for word in resources.more:
        option, equals, value = word.removeprefix("--").partition("=")
        if option in ours:
            raise UserError(f"--sbatch={word}: megaflow says that itself, by its own options (--time, --nodes, …); leave it out")
        if not word.startswith("--") or not option:
            raise UserError(f"--sbatch {word}: an option of sbatch is written --name or --name=value")
        lines.append(directive(option, value if equals else None))
    return "\n".join(lines)


def render(job: Job, templates: Path, cwd: Path) -> str:
    """The whole script. Raises UserError."""
    resources = job.resources
    srun = ["--ntasks-per-node=1", f"--nodes={resources.nodes}", "--wait=60"]
    if resources.gpus:
        srun.append(f"--gpus-per-node={resources.gpus}")
    if resources.cores:
        srun.append(f"--cpus-per-task={resources.cores}")
    if resources.container:  # pyxis
        seen = dict.fromkeys([str(cwd), *resources.mounts, str(job.place)])
        if wrong := next((path for path in seen if re.search(r"[,:]", path)), None):
            raise UserError(f"{wrong}: pyxis reads , and : in the names of folders that a container sees as its own; rename it")
        srun += [f"--container-image={resources.container}", f"--container-mounts={','.join(f'{path}:{path}' for path in seen)}"]
        srun.append(f"--container-workdir={cwd}")
    values = {
        "directives": directives(job),
        "margin": str(resources.margin),
        "cwd": shlex.quote(str(cwd)),
        "python": shlex.quote(sys.executable),
        "python_of_ranks": "python" if resources.container else shlex.quote(sys.executable),
        "ranks": str(resources.ranks),
        "place": shlex.quote(str(job.place)),
        "directory": shlex.quote(job.directory),
        "site": (templates / SITE).read_text("utf-8").rstrip(),
        "srun": shlex.join(srun),
        "command": shlex.join(job.words),
    }
    template = (templates / TEMPLATE).read_text("utf-8")
    named = set(re.findall(r"@(\w+)@", template))
    if unknown := named - values.keys():
        raise UserError(f"{templates / TEMPLATE}: there is no @{min(unknown)}@; there are {', '.join(f'@{name}@' for name in values)}")
    if missing := {"directives", "command", "place"} - named:
        raise UserError(f"{templates / TEMPLATE}: @{min(missing)}@ is missing, without which it starts nothing")
    return re.sub(r"@(\w+)@", lambda found: values[found[1]], template)
