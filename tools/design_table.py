"""Choices on equal trunk, tokens, data order and seeds, by a grid or one by one, measured and put into a table with its errors.

    python tools/design_table.py configs/quickstart/flow.yaml --out runs/clocks --seeds 3 train.steps=300 \\
        --axis flow.clock.name uniform argmax ce_linear --axis flow.code frame learned
    python tools/design_table.py configs/quickstart/flow.yaml --out runs/trunk --seeds 3 train.steps=300 \\
        --point model.time=tokens --point model.layers=8 model.hidden=136

Points are one value of every axis each, all combinations; without an axis the config as it is; and what each --point says. Every point is
trained and evaluated by the ordinary commands, with the overrides for all of them and run.seed 0, 1, … OUT/table.md has a line a point:
likelihood in nats a token with the standard error over seeds, its paired difference from the first point (the same seeds, so that what
seeds share cancels), judge and entropy of texts; and where some runs can be given the beginning of a text, the likelihood of the second
half of a row given the first. A combination that the config refuses, or whose run ended early, has the sentence that says why. Killed,
it goes on where it was; more seeds or values run only what is new.
"""

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STEPS = "32"


def slug(point: tuple[str, ...], seed: int) -> str:
    return "".join(c if c.isalnum() or c in ".=-" else "_" for c in "-".join([*point, f"seed={seed}"]))


def megaflow(*words: str) -> tuple[int, str]:
    """(exit code, last line of what it says) of a command."""
    done = subprocess.run([sys.executable, "-m", "megaflow", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


Result = dict[str, Any] | str
"""An evaluation, or what there is in its place: 'refused: …' of a config that is, 'ended: …' of a run that was over too early."""


def progress(done: int, total: int, seconds: list[float], run: Path) -> None:
    """A line on the console; seconds: what each run took that was not there before, for the time left."""
    left = f"  {statistics.mean(seconds) * (total - done) / 60.0:.0f} min left" if seconds else ""
    print(f"{done}/{total} runs{left}  {run.name}", file=sys.stderr, flush=True)


def measured(command: str, config: str, run: Path, overrides: list[str], steps: str, samples: int, rows: int) -> Result:
    """Train a run by a command, or find it trained, and evaluate it. Raises SystemExit where a signal ended that, or evaluation fails."""
    code, said = megaflow(command, config, f"run.dir={run}", "log.wandb=off", *overrides)
    if code in (1, 2):  # others are of signals, and end this command too
        why = "ended" if (run / "metrics.jsonl").exists() else "refused"
        return f"{why}: {said.removeprefix('megaflow: ').removeprefix('command line: ')}"
    if code == 0:
        code, said = megaflow("evaluate", str(run), "--steps", steps, "--samples", str(samples), "--rows", str(rows), "--draws", "4")
    if code:
        raise SystemExit(f"{run}: exit code {code}: {said}")
    return json.loads((run / "evaluation.json").read_text())


def values_of(results: list[Result], *path: str) -> list[float | None]:
    """What is at a path of each evaluation; None where there is nothing."""
    found: list[Any] = []
    for value in results:
        here: Any = value
        for key in path:
            here = here.get(key) if isinstance(here, dict) else None
        found.append(here)
    return found


def mean_error(values: list[float]) -> tuple[float, float | None]:
    """Mean, and its standard error over two or more seeds."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def shown(values: list[float | None], digits: int, sign: str = "") -> str:
    """Mean ± standard error over seeds; a word where a value does not exist."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "none"
    mean, error = mean_error(known)
    return f"{mean:{sign}.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def of_given(runs: list[Result]) -> str:
    """What has to be said of runs that write nothing without being given some; nothing of others."""
    law = next((run["likelihood"].get("given") for run in runs if isinstance(run, dict)), None)
    return f" (of what is written, given the rest by `{law}`; texts hold that too)" if law else ""


def table(points: list[tuple[str, ...]], results: dict[tuple[str, ...], list[Result]]) -> str:
    """Markdown of what has been measured."""
    rest = "likelihood", "continuation", "nats_per_token"

    def of(point: tuple[str, ...], *path: str) -> list[float | None]:
        return values_of(results.get(point, []), *path)

    given = any(value is not None for point in points for value in of(point, *rest))
    of_pairs = any(value == "source" for point in points for value in of(point, "likelihood", "continuation", "given"))
    rest_of = " answers, given their sources |" if of_pairs else " second half |"
    lines = ["| choice | likelihood, nats/token | against the first | judge, bits/char | entropy, nats |" + rest_of * given]
    lines.append("|---|---|---|---|---|" + "---|" * given)

    def texts(point: tuple[str, ...], key: str) -> list[float | None]:
        """Of texts in STEPS steps, or of a baseline that has none of its own."""
        return [
            a if b is None else b
            for a, b in zip(of(point, "samples", "autoregressive", key), of(point, "samples", STEPS, key), strict=True)
        ]

    first = of(points[0], "likelihood", "nats_per_token")
    for point in points:
        runs = results.get(point, [])
        if not runs:
            continue
        name = ", ".join(f"`{part}`" for part in point) or "the config as it is"
        name += of_given(runs)
        if said := next((run for run in runs if isinstance(run, str)), ""):
            lines.append(f"| {name} | {said} | | | |" + " |" * given)
            continue
        bounds = of(point, "likelihood", "nats_per_token")
        pairs = list(zip(bounds, first, strict=False))
        alike = of_given(runs) == of_given(results.get(points[0], []))
        apart = [None if a is None or b is None or not alike else a - b for a, b in pairs]
        drawn = [shown(texts(point, key), 2) for key in ("judge_bits_per_char", "entropy")]
        difference = "" if point == points[0] else shown(apart, 3, "+")
        drawn += [shown(of(point, *rest), 3)] if given else []
        lines.append(f"| {name} | {shown(bounds, 3)} | {difference} | {' | '.join(drawn)} |")
    seeds = max(map(len, results.values()))
    entropies = {
        f"{unigram:.3f}{' of what is written' if run['likelihood'].get('given') else ''}"
        for runs in results.values()
        for run in runs
        if isinstance(run, dict) and (unigram := run["likelihood"].get("unigram_nats_per_token"))
    }
    unigram = f"; unigram entropy {', '.join(sorted(entropies))}" if entropies else ""
    lines += ["", f"{seeds} seeds, mean ± standard error over them{unigram}.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="of every point")
    parser.add_argument("--axis", nargs="+", action="append", default=[], metavar="KEY VALUE", help="a key and its values")
    parser.add_argument("--point", nargs="+", action="append", default=[], metavar="a.b=c", help="another point")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rows", type=int, default=256)
    arguments = parser.parse_intermixed_args()
    axes = [[f"{key}={value}" for value in values] for key, *values in arguments.axis]
    points = list(dict.fromkeys([*itertools.product(*axes), *map(tuple, arguments.point)]))
    results: dict[tuple[str, ...], list[Result]] = {}
    seconds: list[float] = []
    arguments.out.mkdir(parents=True, exist_ok=True)
    for number, (seed, point) in enumerate(itertools.product(range(arguments.seeds), points)):
        run = arguments.out / slug(point, seed)
        chosen = [*arguments.overrides, *point, f"run.seed={seed}"]
        began, new = time.monotonic(), not (run / "evaluation.json").exists()
        found = measured("pretrain", arguments.config, run, chosen, STEPS, arguments.samples, arguments.rows)
        seconds += [time.monotonic() - began] * (new and isinstance(found, dict))
        results.setdefault(point, []).append(found)
        (arguments.out / "table.md").write_text(table(points, results))
        progress(number + 1, arguments.seeds * len(points), seconds, run)
    print((arguments.out / "table.md").read_text())


if __name__ == "__main__":
    main()
