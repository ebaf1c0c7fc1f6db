"""RUN/evaluation.json for those who show it: cards of converted models, sweeps, status. `evaluate` writes it, see evaluate/kept.py."""

from pathlib import Path
from typing import Any

from megaflow.files import read_if_sealed

FILE = "evaluation.json"
MEASURES = 9
"""What an evaluation holds, and by which estimators; one of another number is measured anew, and compared with none."""


def read(file: Path) -> dict[str, Any]:
    """An evaluation. Empty where there is none, and where it is not as it was written or not of this version: that is as good as none."""
    found = read_if_sealed(file)
    return found if found.get("measures") == MEASURES else {}
