"""What devices can do at most, and what share of it a run makes use of.

Of GPUs it is what their vendor says, dense: a figure "with sparsity" is halved. Of a CPU it is a product of matrices that is measured
when it is asked for. A device that is not in the table has no peak, and a run on it no MFU.
"""

import functools
import statistics
import time
from typing import NamedTuple

import torch


class Device(NamedTuple):
    """Peak FLOP/s of dense products in bf16, in TF32 and in fp32 without tensor cores, None where there is no such arithmetic; bytes a
    second from memory; bytes of memory."""

    bf16: float | None
    tf32: float | None
    fp32: float
    bandwidth: float
    memory: float


# by torch.cuda.get_device_name(), whole: a part of a GPU (MIG) and its relatives with other figures have longer names
GPUS = {
    # NVIDIA H100 Tensor Core GPU data sheet: https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet
    "NVIDIA H100 80GB HBM3": Device(989.5e12, 494.5e12, 67e12, 3.35e12, 80e9),
    "NVIDIA H100 PCIe": Device(756.5e12, 378e12, 51e12, 2.0e12, 80e9),
    # NVIDIA H200 Tensor Core GPU data sheet: https://resources.nvidia.com/en-us-data-center-overview-mc/en-us-data-center-overview/hpc-datasheet-sc23-h200
    "NVIDIA H200": Device(989.5e12, 494.5e12, 67e12, 4.8e12, 141e9),
    # NVIDIA HGX platform, HGX B200 over its eight GPUs: https://www.nvidia.com/en-us/data-center/hgx/
    "NVIDIA B200": Device(2.25e15, 1.125e15, 75e12, 8.0e12, 180e9),
    # NVIDIA A100 data sheet: https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
    "NVIDIA A100-SXM4-80GB": Device(312e12, 156e12, 19.5e12, 2.039e12, 80e9),
    "NVIDIA A100 80GB PCIe": Device(312e12, 156e12, 19.5e12, 1.935e12, 80e9),
    "NVIDIA A100-SXM4-40GB": Device(312e12, 156e12, 19.5e12, 1.555e12, 40e9),
    "NVIDIA A100-PCIE-40GB": Device(312e12, 156e12, 19.5e12, 1.555e12, 40e9),
    # NVIDIA L40S data sheet: https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413
    "NVIDIA L40S": Device(362.05e12, 183e12, 91.6e12, 864e9, 48e9),
    # NVIDIA A10 data sheet: https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a10/pdf/a10-datasheet.pdf
    "NVIDIA A10": Device(125e12, 62.5e12, 31.2e12, 600e9, 24e9),
    # NVIDIA Ada GPU architecture, appendix A, sums in fp32: https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
    "NVIDIA GeForce RTX 4090": Device(165.2e12, 82.6e12, 82.6e12, 1.008e12, 24e9),
    # NVIDIA V100 data sheet: https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf
    "Tesla V100-SXM2-32GB": Device(None, None, 15.7e12, 900e9, 32e9),
    "Tesla V100-SXM2-16GB": Device(None, None, 15.7e12, 900e9, 16e9),
    "Tesla V100-PCIE-32GB": Device(None, None, 14e12, 900e9, 32e9),
    "Tesla V100-PCIE-16GB": Device(None, None, 14e12, 900e9, 16e9),
}


def gpu(device: torch.device) -> Device | None:
    """What the vendor says of this GPU; None of one that is not in the table. Old drivers leave the vendor's name out."""
    name = torch.cuda.get_device_name(device)
    return GPUS.get(name) or GPUS.get(f"NVIDIA {name}")


def peak(device: torch.device, precision: str) -> float | None:
    """FLOP/s of dense products on a device, for train.precision fp32 or bf16; None where it is not known.

    fp32 on a GPU is TF32 where torch is allowed to use it (torch.set_float32_matmul_precision). A CPU has what `measured_product` finds,
    in fp32 for either precision.
    """
    if device.type == "cpu":
        return measured_product()
    found = gpu(device) if device.type == "cuda" else None
    if found is None:
        return None
    if precision == "bf16":
        return found.bf16
    allowed = torch.get_float32_matmul_precision() != "highest"
    return found.tf32 if allowed and found.tf32 is not None else found.fp32


@functools.cache
def measured_product(size: int = 1024, seconds: float = 0.5) -> float:
    """FLOP/s of fp32 products of square matrices on the CPU, with the threads that torch has: the median over `seconds`, three at least.

    Measured once a process; processes that share a machine get their share of it if all measure at the same time.
    """
    left, right = torch.rand(2, size, size, generator=torch.Generator().manual_seed(0))
    out = left @ right  # the first product also makes the threads
    taken: list[float] = []
    start = time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - start < seconds:
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        taken.append(time.perf_counter() - began)
    return 2.0 * size**3 / statistics.median(taken)


def mfu(flops: float, tokens_per_second: float, peak: float | None, count: int) -> float | None:
    """Model FLOPs utilisation (PaLM, appendix B): model FLOPs a token, of flops.py, times tokens a second over the peak of `count` devices.

    None where the peak is not known.
    """
    return None if peak is None else flops * tokens_per_second / (peak * count)
