"""The command line: `megaflow` and `python -m megaflow` are this file. Every command's code is imported when it is called."""

import argparse
import difflib
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from megaflow import __version__, evaluation_file, process
from megaflow.errors import UserError

EPILOG = """a.b=c overrides any key of a config; `megaflow config --keys` lists all keys.
exit codes: 0 done; 1 failed; 2 bad input, or a disk that refuses: one sentence says what;
75 stopped by SIGTERM or SIGUSR1 after saving, the same command continues; 130 by Ctrl-C, or SIGTERM where nothing is saved"""


PLACES = ("CONFIG", "DIR", "FILE", "FOLDER", "OUT", "PATH", "RUN", "SWEEP")
"""Arguments that are files or folders."""


def place(text: str) -> str:
    """A path, which an empty variable of a script is not: it would be this folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty; give a file or folder, . for this one")
    return text


class Exact(argparse.ArgumentParser):
    """Options by their whole names: what is repeated by a job later is to mean the same then. What is wrong is a UserError."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings | {"allow_abbrev": False})

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        kind = {"type": place} if settings.get("metavar") in PLACES else {}
        return super().add_argument(*names, **kind | settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:  # type: ignore[override]
        found, rest = super().parse_known_args(args, namespace)
        if option := next((word.partition("=")[0] for word in rest if word.startswith("-")), ""):
            near = difflib.get_close_matches(option, self._option_string_actions.keys() - {"--help"}, n=1)
            self.error(f"there is no option {option}" + (f"; did you mean {near[0]}?" if near else ""))
        return found, rest

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} ({self.prog} --help lists what there is)")


def parser() -> argparse.ArgumentParser:
    """The whole command line; building it imports nothing heavy."""
    top = Exact(
        prog="megaflow",
        description="Pretraining of flow language models, from raw text to one-step text.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"megaflow {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Exact)

    def with_config(name: str, help: str, optional: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.add_argument("config", metavar="CONFIG", nargs="?" if optional else None, help="YAML file")
        command.add_argument("overrides", metavar="a.b=c", nargs="*", help="values over those of the file")
        return command

    def with_resources(command: argparse.ArgumentParser) -> None:
        command.add_argument("--nodes", type=int, default=1, help="hosts (default 1)")
        command.add_argument("--gpus-per-node", type=int, default=0, help="GPUs of each host, each a rank (default 0: CPUs alone)")
        command.add_argument("--processes-per-node", type=int, default=1, help="ranks of each host without GPUs (default 1)")
        command.add_argument("--cpus-per-node", type=int, default=None, help="cores of each host")
        command.add_argument("--time", default="", help="limit, as H:MM:SS or D-HH:MM:SS; before it the job saves and queues again")
        command.add_argument("--margin", type=int, default=120, help="seconds before the limit at which it saves (default 120)")
        for option in ("partition", "account", "qos", "constraint"):
            command.add_argument(f"--{option}", default="", help="as of sbatch")
        command.add_argument("--container", default="", metavar="IMAGE", help="image that ranks run in, by pyxis (srun --container-image)")
        command.add_argument(
            "--mount", action="append", default=[], metavar="DIR", help="of --container: a folder that it has to see besides run and shards"
        )
        command.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="another option, such as --sbatch=--exclusive")
        command.add_argument("--templates", default=None, metavar="DIR", help="folder of job.sbatch and site.sh (default: slurm/)")

    with_config("prepare", "raw text to token shards")
    with_config("pretrain", "stage 1: a flow, or the autoregressive baseline, on token shards")
    with_config("distill", "stage 2: a flow map from a trained flow (distill.teacher=RUN)")
    show = with_config("config", "print the resolved config and where each value came from", optional=True)
    show.add_argument("--keys", action="store_true", help="list every key, what it means and accepts")

    health = with_config("doctor", "what a run needs and whether it is here, with what mends it; under srun or torchrun on all hosts", True)
    health.add_argument("--place", metavar="DIR", default=".", help="folder that runs are to lie in (default: this one)")
    health.add_argument("--json", action="store_true", help="JSON instead of a line a finding")

    layouts = with_config("plan", "memory, communication and time of every layout of a config, predicted")
    layouts.add_argument("--gpus", type=int, required=True, help="how many GPUs")
    layouts.add_argument("--memory", type=float, default=None, metavar="GB", help="of a GPU, in 1e9 bytes (default: what its vendor says)")
    layouts.add_argument("--gpu", type=str.lower, default="h100", help="a100, b200, h100 or h200, in nodes of eight (default h100)")
    layouts.add_argument(
        "--vocab", type=int, help="entries of the vocabulary, without shards (default: what data.tokenizer says, else 50257)"
    )
    layouts.add_argument("--json", action="store_true", help="JSON of all layouts instead of a table of the fastest")

    inspect = commands.add_parser(
        "inspect", help="what a folder of token shards holds", description="What a folder of token shards holds; checks every file of it."
    )
    inspect.add_argument("path", metavar="PATH", help="folder that prepare has written")
    inspect.add_argument("--rows", type=int, default=3, help="first rows of each split to decode (default 3)")
    inspect.add_argument("--json", action="store_true", help="JSON instead of plain text")
    inspect.add_argument("--to", choices=("mds", "webdataset"), default=None, help="convert to this format, into --out")
    inspect.add_argument("--out", metavar="DIR", default=None, help="new folder for --to")

    sample = commands.add_parser("sample", help="text from a run", description="Text from a run.")
    sample.add_argument("run", metavar="RUN", help="run directory")
    sample.add_argument("--count", type=int, default=4, help="texts (default 4)")
    sample.add_argument("--steps", type=int, default=None, help="steps of a flow (default 64) or flow map (default 1)")
    sample.add_argument(
        "--method", choices=("auto", "ode", "flow_map", "stochastic", "ancestral"), default="auto", help="sampler (default: auto)"
    )
    sample.add_argument(
        "--last", type=float, default=None, help="share of the clock for the last step (default: 0.5 of flow_map, else as any other)"
    )
    sample.add_argument(
        "--clock", metavar="LAW", default="auto", help="law that the steps are even on, as of flow.clock.name (default: that of training)"
    )
    sample.add_argument("--gamma", type=float, default=None, help="share of fresh noise of --method stochastic, 0 to 1 (default 0.75)")
    sample.add_argument("--temperature", type=float, default=1.0, help="of the posteriors, above 0 (default 1)")
    sample.add_argument("--prompt", metavar="TEXT", default=None, help="what every text begins with")
    sample.add_argument("--infill", metavar="TEXT", default=None, help="text with blanks to fill in, 'The ___ of ___'")
    sample.add_argument("--blank", type=int, default=None, help="tokens of a blank (default 8)")
    sample.add_argument("--seed", type=int, default=0, help="of noise and draws (default 0)")
    sample.add_argument("--json", action="store_true", help="JSON with tokens instead of plain text")

    evaluate = commands.add_parser(
        "evaluate", help="likelihood and judged samples of a run", description="Likelihood and judged samples of a run."
    )
    evaluate.add_argument("run", metavar="RUN", help="run directory; the result is written to RUN/evaluation.json")
    evaluate.add_argument("--steps", default="1,2,4,16,64", help="step counts to sample with (default 1,2,4,16,64)")
    evaluate.add_argument("--samples", type=int, default=64, help="texts per step count (default 64)")
    evaluate.add_argument("--rows", type=int, default=256, help="validation rows of the likelihood (default 256)")
    evaluate.add_argument("--draws", type=int, default=8, help="draws of noise and time per row, at least 2 for a flow (default 8)")
    evaluate.add_argument("--temperature", type=float, default=1.0, help="of the posteriors that write samples, above 0 (default 1)")
    evaluate.add_argument(
        "--clock", metavar="LAW", default="auto", help="of the samples: the law that their grids are even on (default auto)"
    )
    evaluate.add_argument("--seed", type=int, default=0, help="of noise and draws (default 0)")
    evaluate.add_argument("--data", metavar="PATH", default=None, help="the run's shards, where they are no longer at its data.path")
    evaluate.add_argument(
        "--text",
        metavar="FILE",
        action="append",
        default=[],
        help="another text whose likelihood is measured too; as often as wanted",
    )
    evaluate.add_argument(
        "--judge",
        metavar="FOLDER",
        action="append",
        default=[],
        help="a causal language model (Hugging Face folder, or an autoregressive run) that judges texts too; as often as wanted",
    )
    evaluate.add_argument("--mauve", action="store_true", help="MAUVE of the samples, by the states of the first --judge folder")
    evaluate.add_argument(
        "--ode-likelihood", type=int, metavar="STEPS", default=None, help="of a flow: the likelihood by so many steps of its equation too"
    )
    evaluate.add_argument("--probes", default=None, metavar="N", help="of --ode-likelihood: of the divergence, or exact (default 1)")
    evaluate.add_argument(
        "--verify", metavar="TASK", default=None, help="problems to solve: sums, brackets or sudoku, with options as in sums:digits=3"
    )
    evaluate.add_argument("--frontier", action="store_true", help="judge texts over temperatures and gammas, and read them at one entropy")
    evaluate.add_argument("--temperatures", default=None, metavar="T,T,…", help="of --frontier (default 0.7,0.8,0.9,1)")
    evaluate.add_argument("--gammas", default=None, metavar="G,G,…", help="of --frontier: shares of fresh noise (default: none is added)")
    evaluate.add_argument("--entropy", type=float, default=None, help="of --frontier: nats to read it at (default: those of real text)")
    evaluate.add_argument("--json", metavar="FILE", default=None, help="write the JSON to this file as well")

    versus = commands.add_parser(
        "compare", help="evaluations of several runs side by side, and what differs", description="Evaluations side by side, row by row."
    )
    versus.add_argument("runs", metavar="RUN", nargs="+", help="runs that were evaluated alike; the first is what others are compared with")
    versus.add_argument("--json", metavar="FILE", default=None, help="write the comparison to this file")
    versus.add_argument("--html", metavar="FILE", default=None, help="draw the comparison, or the evaluation of one run, as a page")

    convert = commands.add_parser(
        "convert",
        help="a run's network as safetensors or for transformers, or its checkpoint in other files",
        description="A run, converted; verified.",
    )
    convert.add_argument("run", metavar="RUN", help="run directory")
    convert.add_argument("out", metavar="OUT", help="a new folder")
    convert.add_argument(
        "--to",
        choices=("safetensors", "hf", "onnx", "vllm", "run"),
        default=None,
        help="safetensors: the network alone (default); hf: so that transformers opens it besides; onnx: a map's one step as one file; "
        "vllm: why it cannot be; run: a run, its checkpoint cut anew",
    )
    convert.add_argument(
        "--from", dest="origin", choices=("run", "hf"), default="run", help="hf: RUN is a folder of convert, and becomes the run OUT again"
    )
    convert.add_argument("--step", type=int, default=None, help="of the checkpoint (default: the newest)")
    convert.add_argument("--weights", choices=("averaged", "live"), default=None, help="of a network: which (default averaged)")
    convert.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default=None, help="of a network: its numbers' (default fp32)")
    convert.add_argument(
        "--shard-size", metavar="5GB", default=None, help="of a network: most bytes a file, in KB, MB, GB, TB (default 5GB)"
    )
    convert.add_argument("--processes", type=int, default=None, help="of a run: how many write a file a group each (default 1)")

    submission = with_config("submit", "a stage as a Slurm job, or several that follow one another; CONFIG of stage=evaluate is a run")
    with_resources(submission)
    submission.add_argument("--after", action="append", default=[], metavar="DIR", help="wait for the jobs of this run, or of these shards")
    submission.add_argument(
        "--then", action="append", nargs="+", default=[], metavar="STAGE …", help="another stage once this one is done, with its own words"
    )
    submission.add_argument("--dry-run", action="store_true", help="print the script and do nothing")

    state = commands.add_parser("status", help="how runs are doing, here and in Slurm's queue", description="How runs are doing.")
    state.add_argument("places", metavar="DIR", nargs="*", default=["runs"], help="runs, or folders of runs (default runs)")
    state.add_argument("--json", action="store_true", help="JSON instead of a table")
    state.add_argument("--live", action="store_true", help="again and again until all are finished, or Ctrl-C")

    log = commands.add_parser("logs", help="what a run's Slurm job has written", description="The log of a run's newest Slurm job.")
    log.add_argument("run", metavar="DIR", help="run, or shards")
    log.add_argument("--rank", type=int, default=None, help="of one rank of the last attempt, counted over all hosts")
    log.add_argument("--job", default=None, help="id of an earlier job")
    log.add_argument("-f", "--follow", action="store_true", help="go on with what comes, until the job is over")

    end = commands.add_parser("cancel", help="end runs: what trains saves first", description="End the jobs and processes of runs.")
    end.add_argument("places", metavar="DIR", nargs="+", help="runs, or folders of runs")

    grid = commands.add_parser(
        "sweep", help="many runs of one config, several at once, and their report", description="Run what is left of a sweep, and report."
    )
    grid.add_argument("sweep", metavar="SWEEP", help="YAML file of a base config and axes")
    grid.add_argument("overrides", metavar="key=value", nargs="*", help="values over those of the file: seeds=5, set.train.steps=100")
    grid.add_argument("--jobs", type=int, default=None, help="points at once (default: as many as GPUs, or as cores)")
    grid.add_argument("--retry", action="store_true", help="try points again that have failed")
    grid.add_argument("--dry-run", action="store_true", help="list the points, or print the scripts of --slurm, and do nothing")
    grid.add_argument("--slurm", action="store_true", help="as Slurm arrays, an element a point, with the resources of one point below")
    grid.add_argument("--limit", type=int, default=None, help="of --slurm: most elements at once")
    with_resources(grid)

    report = commands.add_parser(
        "report", help="the page and the numbers of a folder of runs, or of a sweep", description="Gather a folder of runs, or a sweep."
    )
    report.add_argument("dir", metavar="DIR", help="folder that holds data, flow, autoregressive and flow_map; or the dir of a sweep")
    return top


def parsed() -> argparse.Namespace:
    """The words of the command line; overrides may stand after options too, where argparse by itself takes no more of them."""
    line = parser()
    arguments, rest = line.parse_known_args()
    if "overrides" not in arguments or any(word.startswith("-") or "=" not in word for word in rest):
        return line.parse_args()  # says what is wrong with them
    arguments.overrides += rest
    return arguments


def main() -> None:
    """Run a command. Bad input is one sentence on stderr and exit code 2, never a traceback."""
    began = time.monotonic() - time.process_time()  # the interpreter's own start is part of what a command takes
    process.print_anything()
    arguments = None
    process.settle()
    if not isinstance(sys.stderr, process.Console):
        sys.stderr = process.Console(sys.stderr)
    try:
        arguments = parsed()
        code = run(arguments, began)
    except UserError as error:
        process.let_the_first_speak(code=2)
        print(f"megaflow: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt as error:
        kept = "what is finished"
        if arguments is not None and arguments.command in ("pretrain", "distill"):
            kept = "the last checkpoint, if there is one (SIGTERM and SIGUSR1 save before they stop)"
        print(f"megaflow: {str(error) or f'interrupted; the same command goes on from {kept}'}", file=sys.stderr)
        code = 130
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # the reader of our output, the last thing a command does, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(0)
        print(f"megaflow: {error.filename or 'a file'}: {error.strerror or error}; nothing finished is lost", file=sys.stderr)
        code = 2
    sys.exit(code)


def run(arguments: argparse.Namespace, began: float) -> int:
    """One branch a command; `began`, a time.monotonic(), is before the imports, which are part of a stage's seconds. Raises UserError."""
    if arguments.command == "prepare":
        from megaflow.config.load import load
        from megaflow.data.prepare import prepare

        prepare(load(arguments.config, arguments.overrides).config.data, began)
        return 0
    if arguments.command in ("pretrain", "distill"):
        process.leave_on_signals()
        from megaflow.train import stages
        from megaflow.train.loop import NotFinite

        try:
            return getattr(stages, arguments.command)(arguments.config, arguments.overrides, began)
        except NotFinite as error:
            print(f"megaflow: {error}", file=sys.stderr)
            return 1
    if arguments.command == "config":
        from megaflow import show

        print(show.all_keys() if arguments.keys else show.resolved(arguments.config, arguments.overrides))
        return 0
    if arguments.command == "plan":
        from megaflow import show
        from megaflow.plan.table import plan

        loaded, vocab = show.known(arguments.config, arguments.overrides, sizes=True)
        if arguments.vocab is not None and vocab is not None and arguments.vocab != vocab:
            raise UserError(f"--vocab={arguments.vocab}: {loaded.config.data.path} is prepared and has {vocab}; leave --vocab out")
        vocab = arguments.vocab if vocab is None else vocab
        vocab = show.foreseen(loaded) if vocab is None else vocab
        print(plan(loaded, vocab, arguments.gpus, arguments.memory, arguments.gpu, arguments.json))
        return 0
    if arguments.command == "inspect":
        from megaflow.data import inspection
        from megaflow.data.convert import convert as convert_shards

        if (arguments.to is None) != (arguments.out is None):
            raise UserError("--to and --out go together: --to says the format, --out the new folder")
        if arguments.rows < 0:
            raise UserError(f"--rows: {arguments.rows} is below 0")
        found = inspection.inspect(arguments.path, arguments.rows)
        if arguments.to is not None:
            convert_shards(arguments.path, arguments.to, arguments.out)
            found = inspection.inspect(arguments.out, arguments.rows)
        print(as_json(found) if arguments.json else inspection.as_text(found))
        return 0
    if arguments.command == "sample":
        from megaflow.evaluate.generate import sample

        way = arguments.method, arguments.temperature, arguments.gamma
        given = arguments.prompt, arguments.infill, arguments.blank
        found = sample(arguments.run, arguments.count, arguments.steps, *way, arguments.seed, arguments.last, arguments.clock, *given)
        print(as_json(found) if arguments.json else "\n\n".join(found["texts"]))
        return 0
    if arguments.command == "evaluate":
        from megaflow.evaluate.evaluation import evaluate, table

        steps = [whole(part, "--steps") for part in arguments.steps.split(",")]
        sizes = arguments.samples, arguments.rows, arguments.draws
        asked = arguments.seed, arguments.temperature, arguments.json
        more = {"data": arguments.data, "clock": arguments.clock, "texts": arguments.text}
        more |= {
            "causal": arguments.judge,
            "along": frontier_of(arguments),
            "mauve": arguments.mauve,
            "verify": arguments.verify,
            "ode": ode_of(arguments),
        }
        with process.making(os.path.join(arguments.run, evaluation_file.FILE)):
            found = evaluate(arguments.run, steps, *sizes, *asked, began=began, **more)
        print(table(found))
        return 0
    if arguments.command == "compare":
        from megaflow.evaluate import compare

        print(compare.table(compare.compare(arguments.runs, arguments.json, arguments.html)))
        return 0
    if arguments.command == "convert":
        from megaflow.export.convert import convert

        model = arguments.weights, arguments.precision, arguments.shard_size
        print("\n".join(convert(arguments.run, arguments.out, *model, arguments.step, arguments.to, arguments.processes, arguments.origin)))
        return 0
    if arguments.command == "submit":
        from megaflow.launch.submit import submit

        chain = arguments.after, arguments.then
        resources, dry = resources_of(arguments), arguments.dry_run
        submit(arguments.config, arguments.overrides, resources, *chain, dry, arguments.templates, check=check_words)
        return 0
    if arguments.command in ("status", "cancel", "logs"):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is lost of what only looks
    if arguments.command in ("status", "cancel"):
        from megaflow.launch import status

        if arguments.command == "status":
            status.status(arguments.places, arguments.json, arguments.live)
        else:
            status.cancel(arguments.places)
        return 0
    if arguments.command == "logs":
        from megaflow.launch.logs import logs

        logs(arguments.run, arguments.rank, arguments.job, arguments.follow)
        return 0
    if arguments.command == "doctor":
        from megaflow.doctor.command import doctor

        return doctor(arguments.place, arguments.config, arguments.overrides, arguments.json)
    if arguments.command == "sweep":
        from megaflow.sweep.command import sweep

        resources = resources_of(arguments)
        if not arguments.slurm and (resources != type(resources)() or arguments.limit is not None or arguments.templates is not None):
            raise UserError("resources of jobs, --limit and --templates are of --slurm; give that too, or leave them out")
        if arguments.slurm and arguments.jobs is not None:
            raise UserError("--jobs is of this machine; of --slurm, --limit says how many elements of an array run at once")
        at_once = arguments.limit if arguments.slurm else arguments.jobs
        return sweep(
            arguments.sweep,
            arguments.overrides,
            at_once,
            arguments.retry,
            arguments.dry_run,
            resources if arguments.slurm else None,
            arguments.templates,
            sys.argv[1:],
            check_words,
        )
    from megaflow.launch.status import is_sweep

    if is_sweep(arguments.dir):
        from megaflow.sweep import gather

        gather.report(arguments.dir)
        return 0
    from megaflow.evaluate.gather import report

    report(arguments.dir)
    return 0


def check_words(words: list[str], coming: Collection[str]) -> None:
    """Refuse the words of a later evaluate or convert that it would itself refuse before it reads anything, and what they name that is not
    there; but for what lies at or below the absolute paths `coming`, which is still to be made. Raises UserError."""

    def here(path: str) -> bool:
        return not any(Path(os.path.abspath(path)).is_relative_to(Path(place).absolute()) for place in coming)

    try:
        arguments = parser().parse_args(words)
    except UserError as error:
        raise UserError(f"{shlex.join(words)}: {error}") from None
    if arguments.command == "evaluate":
        from megaflow.evaluate import answers, causal_judge, evaluation, hugging_face, kept, mauve_score

        steps = [whole(step, "--steps") for step in arguments.steps.split(",")]
        if arguments.verify is not None:
            answers.named(arguments.verify)
        evaluation.check_numbers(steps, arguments.samples, arguments.rows, arguments.draws, arguments.temperature, arguments.clock)
        frontier_of(arguments)
        ode_of(arguments)
        for judge in map(Path, filter(here, arguments.judge or [])):
            causal_judge.check_run(judge) if causal_judge.is_run(judge) else hugging_face.check(judge)
        if arguments.mauve:
            mauve_score.check(arguments.judge or [])
        for text in filter(here, arguments.text or []):
            evaluation.hashed(text)
        kept.check_out("--json", arguments.json if arguments.json and here(arguments.json) else None, "evaluation", Path(arguments.run))
    elif arguments.command == "convert":
        from megaflow.export.convert import check_place, checked
        from megaflow.export.source import check_step

        check_place(Path(arguments.out))
        if here(arguments.run):
            check_step(Path(arguments.run), arguments.step)
        model = arguments.weights, arguments.precision, arguments.shard_size
        checked(*model, arguments.step, arguments.to, arguments.processes, arguments.origin)


def frontier_of(arguments: argparse.Namespace) -> Any:
    """What `evaluate --frontier` is to write. Raises UserError."""
    from megaflow.evaluate import frontier

    if not arguments.frontier:
        for option in ("temperatures", "gammas", "entropy"):
            if getattr(arguments, option) is not None:
                raise UserError(f"--{option} belongs to --frontier; give both, or leave it out")
        return None
    heats = list(frontier.TEMPERATURES) if arguments.temperatures is None else decimals(arguments.temperatures, "--temperatures")
    return frontier.Asked(heats, decimals(arguments.gammas, "--gammas") if arguments.gammas is not None else [], arguments.entropy)


def ode_of(arguments: argparse.Namespace) -> Any:
    """What `evaluate --ode-likelihood` is to take. Raises UserError."""
    from megaflow.evaluate.likelihood import Ode

    if arguments.ode_likelihood is None:
        if arguments.probes is not None:
            raise UserError("--probes belongs to --ode-likelihood; give both, or leave it out")
        return None
    probes = 1 if arguments.probes is None else None if arguments.probes == "exact" else whole(arguments.probes, "--probes")
    return Ode(arguments.ode_likelihood, probes)


def resources_of(arguments: argparse.Namespace) -> Any:
    """What a job is to have. Raises UserError."""
    from megaflow.launch.script import Resources

    for option in ("nodes", "processes_per_node", "cpus_per_node", "margin"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise UserError(f"--{option.replace('_', '-')}: {value} is not a positive number")
    if arguments.gpus_per_node < 0:
        raise UserError(f"--gpus-per-node: {arguments.gpus_per_node} is below 0")
    if arguments.gpus_per_node and arguments.processes_per_node > 1:
        raise UserError("--processes-per-node is of hosts without GPUs; with --gpus-per-node each GPU is a rank")
    if arguments.mount and not arguments.container:
        raise UserError("--mount is of --container: without one a job sees what its hosts see")
    if missing := next((path for path in arguments.mount if not os.path.isdir(path)), None):
        raise UserError(f"--mount {missing}: no such folder here")
    return Resources(
        nodes=arguments.nodes,
        gpus=arguments.gpus_per_node,
        processes=arguments.processes_per_node,
        cpus=arguments.cpus_per_node,
        time=arguments.time,
        partition=arguments.partition,
        account=arguments.account,
        qos=arguments.qos,
        constraint=arguments.constraint,
        container=arguments.container,
        mounts=tuple(os.path.abspath(path) for path in arguments.mount),
        margin=arguments.margin,
        more=tuple(arguments.sbatch),
    )


def as_json(found: dict) -> str:
    escaped = sys.stdout is not None and sys.stdout.encoding.lower() != "utf-8"  # the console's own escapes are not JSON
    return json.dumps(found, ensure_ascii=escaped)


def whole(text: str, option: str) -> int:
    """A positive integer of an option. Raises UserError."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise UserError(f"{option}: {text!r} is not a positive whole number")
    return int(text)


def decimals(text: str, option: str) -> list[float]:
    """Numbers of an option, parted by commas. Raises UserError."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option}: {text!r} is not a list of numbers, 0.5,1") from None


if __name__ == "__main__":
    main()
