"""What a device can compute at most: what the MFU (model FLOPs utilization) is a share of."""

import re

import torch

from train.config import Options, Precision

PEAK_TFLOPS = {
    "A10": 125.0,
    "A10G": 70.0,
    "A30": 165.0,
    "A40": 149.7,
    "A100": 312.0,
    "A800": 312.0,
    "L4": 121.0,
    "L40": 181.05,
    "L40S": 362.05,
    "H20": 148.0,
    "H100": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.5,
    "H200": 989.4,
    "H200 NVL": 835.5,
    "H800": 989.4,
    "H800 PCIe": 756.5,
    "GH200": 989.4,
    "B100": 1750.0,
    "B200": 2250.0,
    "B300": 2250.0,
    "GB200": 2500.0,
    "GB300": 2500.0,
    "RTX 3090": 71.0,
    "RTX 4090": 165.2,
    "RTX 5090": 209.5,
    "RTX A6000": 154.8,
    "RTX 6000 Ada": 364.2,
}
"""10^12 bf16 operations a second with float32 sums, dense, by NVIDIA's data sheets; names as CUDA gives them."""

_OTHER_CHIPS = re.compile(r"\b(MIG|Laptop|Max-Q|Ti|D)\b", re.IGNORECASE)
"""Part of a GPU, or another one of a similar name."""


def peak_of(device_name: str) -> float | None:
    """The peak of a GPU in 10^12 bf16 operations a second, by its CUDA name; None where it is not known."""
    known = [name for name in PEAK_TFLOPS if re.search(rf"\b{name}\b", device_name)]
    if not known:
        return None
    return None if _OTHER_CHIPS.search(device_name) else PEAK_TFLOPS[max(known, key=len)]


def peak_flops(options: Options, device: torch.device) -> float | None:
    """Operations a second of one rank's device at most: as `run.peak_tflops` says, or a known GPU's in bf16."""
    tflops = options.run.peak_tflops
    if tflops is None and device.type == "cuda" and options.run.precision is Precision.bf16:
        tflops = peak_of(torch.cuda.get_device_name(device))
    return None if tflops is None else tflops * 1e12
