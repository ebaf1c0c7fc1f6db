"""Runs made into something else: consolidated models, and the same checkpoint in the files of another number of processes.

folder     a converted model: what is in its folder, and how it becomes a network again
convert    `megaflow convert`
recut      a run's checkpoint in other files
verify     what was written against what it was made of
"""

from megaflow.export.folder import load

__all__ = ["load"]
