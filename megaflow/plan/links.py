"""What GPUs send to each other with, and the words that a plan names them by.

Within a node of eight all reach all by NVLink; between nodes every GPU has a network adapter of its own. Figures are of one direction.
"""

from typing import NamedTuple

from megaflow.errors import UserError
from megaflow.model.devices import GPUS, Device

NODE = 8
"""GPUs of a node."""


class Links(NamedTuple):
    """Bytes a second of a GPU in one direction: within its node, between nodes, and to its host."""

    node: float
    network: float
    host: float


LINKS = {
    # NVLink 900 GB/s both ways and PCIe Gen5 128 GB/s both ways: H100 data sheet, https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet
    # eight adapters of 400 Gb/s: DGX H100 and H200, https://docs.nvidia.com/dgx/dgxh100-user-guide/introduction-to-dgxh100.html
    "h100": ("NVIDIA H100 80GB HBM3", Links(450e9, 50e9, 64e9)),
    "h200": ("NVIDIA H200", Links(450e9, 50e9, 64e9)),
    # NVLink 1.8 TB/s both ways, eight adapters of 400 Gb/s: DGX B200, https://docs.nvidia.com/dgx/dgxb200-user-guide/introduction-to-dgxb200.html
    "b200": ("NVIDIA B200", Links(900e9, 50e9, 64e9)),
    # NVLink 600 GB/s both ways, eight adapters of 200 Gb/s, PCIe Gen4: DGX A100, https://docs.nvidia.com/dgx/dgxa100-user-guide/introduction-to-dgxa100.html
    "a100": ("NVIDIA A100-SXM4-80GB", Links(300e9, 25e9, 32e9)),
}


def of(name: str) -> tuple[Device, Links]:
    """Raises UserError for a name that is not in the table."""
    if name not in LINKS:
        raise UserError(f"--gpu={name} is not known here; use {', '.join(LINKS)}")
    device, links = LINKS[name]
    return GPUS[device], links
