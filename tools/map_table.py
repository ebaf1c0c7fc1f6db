"""Ways to a flow map on equal data, trunk, tokens and seeds: maps of one flow by what stage 2 may be, and flow and map trained together.

    python tools/map_table.py configs/quickstart/flow.yaml configs/quickstart/flow_map.yaml --out runs/maps --seeds 3 \\
        --flow train.steps=300 --map train.steps=150 \\
        --distill distill.objective=psd --distill distill.objective=esd --joint distill.objective=psd

Every seed trains one flow, with the overrides of --flow, by the first config; from it a map for every --distill, words of KEY=VALUE, by the
second config with those of --map; and for every --joint a flow and a map together, by the first config with what of the second is distill.*
and as many steps as both stages have. OUT/table.md has a line for each, the flow itself first: its diagonal's bound in nats a token, and
judge and entropy of texts in 1, 2 and 4 steps, by the map, or by Euler's method for the flow. A combination that the config refuses, or
whose run ended early, has the sentence that says why. Killed, it goes on where it was.
"""

import argparse
import time
from pathlib import Path

from design_table import Result, measured, of_given, progress, shown, slug, values_of

from megaflow.config.load import flatten, load

STEPS = "1,2,4"


def table(names: list[str], results: dict[str, list[Result]]) -> str:
    """Markdown of what has been measured."""
    counts = STEPS.split(",")
    lines = ["| way | bound, nats/token | " + " | ".join(f"judge / entropy, {count} step{'s' * (count != '1')}" for count in counts) + " |"]
    lines.append("|---|---|" + "---|" * len(counts))

    for name in names:
        runs = results.get(name, [])
        if not runs:
            continue
        if said := next((run for run in runs if isinstance(run, str)), ""):
            lines.append(f"| {name} | {said} |" + " |" * len(counts))
            continue
        cells = [shown(values_of(runs, "likelihood", "nats_per_token"), 3)]
        for count in counts:
            cells.append(" / ".join(shown(values_of(runs, "samples", count, key), 2) for key in ("judge_bits_per_char", "entropy")))
        lines.append(f"| {name}{of_given(runs)} | " + " | ".join(cells) + " |")
    seeds = max(map(len, results.values()))
    return "\n".join([*lines, "", f"{seeds} seeds, mean ± standard error over them.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="of the flow")
    parser.add_argument("map_config", help="of the map")
    parser.add_argument("--flow", nargs="*", default=[], metavar="a.b=c", help="of flows, and of joint training")
    parser.add_argument("--map", nargs="*", default=[], metavar="a.b=c", help="of maps")
    parser.add_argument("--distill", nargs="+", action="append", default=[], metavar="a.b=c", help="a map")
    parser.add_argument("--joint", nargs="*", action="append", default=[], metavar="a.b=c", help="a flow and a map together")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rows", type=int, default=256)
    arguments = parser.parse_args()
    flow, of_map = load(arguments.config, arguments.flow), load(arguments.map_config, arguments.map)
    steps = flow.config.train.steps + of_map.config.train.steps
    set_there = [f"{name}={value}" for name, value in flatten(of_map.config).items() if of_map.origin[name] not in ("default", "auto")]
    shared = [word for word in set_there if word.startswith("distill.") and not word.startswith("distill.teacher=")]
    out, seconds = arguments.out, list[float]()
    out.mkdir(parents=True, exist_ok=True)
    ways: list[tuple[str, str, str, list[str]]] = [("the flow", "pretrain", arguments.config, arguments.flow)]
    for words in arguments.distill:
        name = ", ".join(f"`{word}`" for word in words)
        ways.append((f"two stages, {name}", "distill", arguments.map_config, [*arguments.map, *words]))
    for words in arguments.joint:
        name = ", ".join(f"`{word}`" for word in words)
        joint = [*arguments.flow, *shared, "train.joint=true", f"train.steps={steps}", *words]
        ways.append((", ".join(["joint", name] if name else ["joint"]), "pretrain", arguments.config, joint))
    results: dict[str, list[Result]] = {}
    for seed in range(arguments.seeds):
        teacher = out / slug(("the flow",), seed)
        for place, (name, command, config, words) in enumerate(ways):
            run = out / slug((name.replace("`", ""),), seed)
            of_teacher = [f"distill.teacher={teacher}"] if command == "distill" else []
            chosen = [*words, *of_teacher, f"run.seed={seed}"]
            began, new = time.monotonic(), not (run / "evaluation.json").exists()
            flow_of_seed = results[ways[0][0]][seed] if command == "distill" else ""
            if isinstance(flow_of_seed, str) and flow_of_seed:
                found: Result = flow_of_seed  # of a flow that is not finished nothing is distilled
            else:
                found = measured(command, config, run, chosen, STEPS, arguments.samples, arguments.rows)
            seconds += [time.monotonic() - began] * (new and isinstance(found, dict))
            results.setdefault(name, []).append(found)
            (out / "table.md").write_text(table([way[0] for way in ways], results))
            progress(seed * len(ways) + place + 1, arguments.seeds * len(ways), seconds, run)
    print((out / "table.md").read_text())


if __name__ == "__main__":
    main()
