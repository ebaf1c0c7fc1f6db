"""Small shards of texts of verifiable tasks, and configs to train on them."""

import json
from pathlib import Path

from megaflow.config.load import load
from megaflow.data.prepare import prepare
from megaflow.evaluate.verifiable import drawn, task

ROOT = Path(__file__).parents[2]
CONFIG = """
base: {root}/configs/sums.yaml
data: {{path: {place}/data, source: [{place}/texts.jsonl], length: {length}, validation_fraction: 0.2, workers: 1, {fields}}}
model: {{layers: 1, hidden: 16, heads: 2, belief_dim: 8}}
train: {{steps: 4, global_batch: 8, validation_rows: 8}}
log: {{wandb: "off"}}
"""


def prepared(place: Path, name: str, length: int, fields: str, held_out: bool = False) -> str:
    """The config of texts of a task, prepared."""
    place.mkdir(parents=True)
    asked, source = task(name), drawn(task(name), 0, held_out)
    problems = [next(source) for _ in range(200)]
    lines = [problem._asdict() if asked.prompted else {"text": problem.answer} for problem in problems]
    (place / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (place / "config.yaml").write_text(CONFIG.format(root=ROOT, place=place, length=length, fields=fields))
    prepare(load(place / "config.yaml").config.data)
    return str(place / "config.yaml")
