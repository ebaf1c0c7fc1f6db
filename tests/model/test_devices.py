"""Peaks of devices: whole names only, the arithmetic that is used, and nothing where nothing is known."""

import time

import pytest
import torch

from megaflow.model import devices
from megaflow.model.devices import GPUS, gpu, measured_product, peak

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch):
    def name(text: str) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: text)

    return name


def test_gpus_are_known_by_their_whole_name(named):
    named("NVIDIA H100 PCIe")
    assert gpu(GPU) is GPUS["NVIDIA H100 PCIe"]
    named("A100-SXM4-40GB")  # drivers before 460
    assert gpu(GPU) is GPUS["NVIDIA A100-SXM4-40GB"]


@pytest.mark.parametrize("name", ["NVIDIA A10G", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H200 NVL", "NVIDIA GeForce RTX 4090 D", ""])
def test_an_unknown_gpu_has_no_peak(named, name):
    named(name)
    assert gpu(GPU) is None and peak(GPU, "bf16") is None and peak(GPU, "fp32") is None


def test_the_arithmetic_of_the_run_decides(named, monkeypatch):
    named("NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert (peak(GPU, "bf16"), peak(GPU, "fp32")) == (312e12, 19.5e12)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert peak(GPU, "fp32") == 156e12
    named("Tesla V100-SXM2-16GB")  # knows neither bf16 nor TF32
    assert (peak(GPU, "bf16"), peak(GPU, "fp32")) == (None, 15.7e12)


@pytest.mark.parametrize("name", GPUS)
def test_figures_are_of_the_units_they_are_said_to_be(name):
    """Tensor cores do a product in TF32 in twice the time of bf16; memory is read in tens of milliseconds. Halved twice, or not at all,
    a figure is out of these ranges."""
    found = GPUS[name]
    if found.bf16 is not None and found.tf32 is not None:
        assert 1.9 < found.bf16 / found.tf32 < 2.1 and found.tf32 >= found.fp32
    assert 0.01 < found.memory / found.bandwidth < 0.06
    assert 10e12 < found.fp32 < 100e12


def test_another_kind_of_device_has_no_peak():
    assert peak(torch.device("meta"), "bf16") is None


def test_a_cpu_is_measured_once(monkeypatch):
    """Three products of eight by eight that take 1, 3 and 2 seconds of the clock: the median is 2."""
    measured_product.cache_clear()
    clock = iter([0.0, 0.0, 1.0, 1.0, 4.0, 4.0, 6.0, 6.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert measured_product(8, 5.0) == 2.0 * 8**3 / 2.0
    assert measured_product(8, 5.0) == 2.0 * 8**3 / 2.0  # the clock is not read again
    measured_product.cache_clear()


def test_a_cpu_has_what_is_measured(monkeypatch):
    monkeypatch.setattr(devices, "measured_product", lambda: 1e11)
    assert peak(CPU, "fp32") == peak(CPU, "bf16") == 1e11
