"""What the trunk should read: linear against belief input, with an autoregressive reference, on equal trunk, tokens and seeds.

    python tools/belief_table.py runs/quickstart/data --out runs/belief_table [--steps 400] [--map-steps 150] [--seeds 3]

Trains every variant with the ordinary command and configs/quickstart/flow.yaml, then flow maps from the belief flow that read the
state in different ways, evaluates all of them, and writes OUT/table.md and OUT/table.json. Killed, it goes on where it was.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

FLOWS = {
    "linear input, no channel term, one-hot state": ["model.input=linear", "flow.code=identity", "flow.skip=off"],
    "linear input, channel term, code": ["model.input=linear", "flow.code=frame", "flow.skip=on"],
    "belief input, code": ["model.input=belief", "flow.code=frame", "flow.skip=on"],
    "belief and linear input, code": ["model.input=both", "flow.code=frame", "flow.skip=on"],
    "autoregressive": ["model.family=autoregressive"],
}
TEACHER = "belief input, code"
MAPS = {"map reads y, linear": "linear", "map reads a hot belief": "hot_belief", "map reads the belief only": "none"}


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)


def megaflow(*words: str) -> None:
    print("megaflow", *words, flush=True)
    subprocess.run([sys.executable, "-m", "megaflow", *words], check=True, stdout=subprocess.DEVNULL)


def evaluated(run: Path, steps: str) -> dict[str, Any]:
    megaflow("evaluate", str(run), "--steps", steps, "--samples", "64", "--rows", "256", "--draws", "4")
    return json.loads((run / "evaluation.json").read_text())


def spread(values: list[float | None], digits: int = 3) -> str:
    """Mean and half the range over seeds; a dash where a value does not exist."""
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    return f"{statistics.mean(known):.{digits}f} ± {(max(known) - min(known)) / 2:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="prepared shards")
    parser.add_argument("--out", type=Path, default=Path("runs/belief_table"))
    parser.add_argument("--config", default="configs/quickstart/flow.yaml")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--map-steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    common = [f"data.path={arguments.data}", "log.wandb=off", "train.checkpoint_every=100"]
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in range(arguments.seeds):
        for name, overrides in FLOWS.items():
            run = arguments.out / f"{slug(name)}_{seed}"
            megaflow(
                "pretrain", arguments.config, f"run.dir={run}", f"run.seed={seed}", f"train.steps={arguments.steps}", *common, *overrides
            )
            results.setdefault(name, []).append(evaluated(run, "32"))
        teacher = arguments.out / f"{slug(TEACHER)}_{seed}"
        for name, reads in MAPS.items():
            run = arguments.out / f"{slug(name)}_{seed}"
            config = arguments.config.replace("flow.yaml", "flow_map.yaml")
            chosen = [f"distill.teacher={teacher}", f"distill.state_input={reads}", f"train.steps={arguments.map_steps}"]
            megaflow("distill", config, f"run.dir={run}", f"run.seed={seed}", *common, *chosen)
            results.setdefault(name, []).append(evaluated(run, "1,2,4,32"))
        write(arguments.out, results)
    print((arguments.out / "table.md").read_text())


def write(out: Path, results: dict[str, list[dict[str, Any]]]) -> None:
    """table.json with every evaluation, table.md with means and half ranges over the seeds that are done."""
    (out / "table.json").write_text(json.dumps(results, indent=1))
    lines = ["| network | bound or likelihood, nats/token | judge, bits/char at 32 steps | entropy, nats |", "|---|---|---|---|"]
    for name in FLOWS:
        runs = results.get(name, [])
        sample = "autoregressive" if name == "autoregressive" else "32"
        bounds = spread([run["likelihood"].get("nats_per_token") for run in runs])
        judged = [spread([run["samples"][sample][key] for run in runs]) for key in ("judge_bits_per_char", "entropy")]
        lines.append(f"| {name} | {bounds} | {' | '.join(judged)} |")
    unigram = results[TEACHER][0]["likelihood"]["unigram_nats_per_token"]
    lines += ["", f"Unigram entropy {unigram:.3f} nats/token; {len(results[TEACHER])} seeds; mean ± half the range.", ""]
    lines += ["| map | 1 step: judge / entropy | 2 steps | 4 steps | 32 steps |", "|---|---|---|---|---|"]
    for name in MAPS:
        runs = results.get(name, [])
        cells = [
            f"{spread([r['samples'][n]['judge_bits_per_char'] for r in runs], 2)} / {spread([r['samples'][n]['entropy'] for r in runs], 2)}"
            for n in ("1", "2", "4", "32")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    (out / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
