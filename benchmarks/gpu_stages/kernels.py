"""What the device does, and whether the kernels give what float64 gives."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from step import batches_of, model_config
from torch import Tensor

from gpu_stages.figures import Setting, equal_bits, error, figure
from train.config import Precision
from train.engine.accelerator import set_convolutions
from train.families.megrezo.model import MegrezO
from train.modules.attention import Segments, varlen_attention
from train.modules.loss import token_losses

GEOMETRIES = {
    "vision": (16, 16, 72, False),
    "audio": (20, 20, 64, False),
    "resampler": (20, 20, 128, False),
    "LLM": (40, 10, 64, True),
}
"""Heads of queries, of keys; the width of a head; causal or not."""

LENGTHS = [1, 129, 1024]


def rates(setting: Setting) -> list[dict[str, Any]]:
    """The bf16 product of two large matrices, and a copy within the device's memory."""
    side, values = setting.of_size(8192, 256), setting.of_size(2**31, 2**20)
    a = torch.randn(side, side, device=setting.device, dtype=torch.bfloat16)
    product_s = _seconds(setting, lambda: a @ a)
    block = torch.zeros(values, device=setting.device, dtype=torch.bfloat16)
    target = torch.empty_like(block)
    copy_s = _seconds(setting, lambda: target.copy_(block))
    return [
        setting.speed("product", 2 * side**3 / product_s / 1e12, "TFLOP/s", at_least=750),
        setting.speed("copy, read and written", 2 * block.nbytes / copy_s / 1e12, "TB/s", at_least=4.1),
    ]


def _seconds(setting: Setting, run: Callable[[], Any], times: int = 20) -> float:
    """Mean of one, after some that warm up."""
    for _ in range(3):
        run()
    setting.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        run()
    setting.synchronize()
    return (time.perf_counter() - began) / times


def attention(setting: Setting) -> list[dict[str, Any]]:
    """Packed attention in bf16 against SDPA in float64, segment by segment; and the same twice."""
    figures = []
    lengths = LENGTHS if setting.size == "4b" else [1, 33, 65]
    for name, (heads, kv_heads, width, causal) in GEOMETRIES.items():
        rows = [64] * len(lengths) if name == "resampler" else lengths
        shapes = [(sum(rows), heads), (sum(lengths), kv_heads), (sum(lengths), kv_heads)]
        random = torch.Generator().manual_seed(0)
        qkv = [torch.randn(*shape, width, generator=random).bfloat16() for shape in shapes]
        gradient = torch.randn(qkv[0].shape, generator=random).bfloat16()
        found = _packed(setting, qkv, gradient, rows, lengths, causal)
        expected = _one_by_one(setting, qkv, gradient, rows, lengths, causal)
        worst = max(error(*both) for both in zip(found, expected, strict=True))
        figures.append(figure(f"{name}: out, dq, dk, dv", worst, "share of the largest", at_most=1e-2))
        torch.use_deterministic_algorithms(True)
        try:
            twice = [_packed(setting, qkv, gradient, rows, lengths, causal) for _ in range(2)]
        finally:
            torch.use_deterministic_algorithms(False)
        same = all(a.equal(b) for a, b in zip(*twice, strict=True))
        figures.append(equal_bits(f"{name}: deterministic, twice", same))
    return figures


def _packed(
    setting: Setting, qkv: list[Tensor], gradient: Tensor, rows: list[int], lengths: list[int], causal: bool
) -> list[Tensor]:
    q, k, v = (x.to(setting.device).requires_grad_() for x in qkv)
    segments = [Segments.of(of, q.device) for of in (rows, lengths)]
    out = varlen_attention(q, k, v, *segments, causal=causal)
    return [out, *torch.autograd.grad(out, (q, k, v), gradient.to(setting.device))]


def _one_by_one(
    setting: Setting, qkv: list[Tensor], gradient: Tensor, rows: list[int], lengths: list[int], causal: bool
) -> list[Tensor]:
    q, k, v = (x.to(setting.device, torch.float64).requires_grad_() for x in qkv)
    repeats = q.shape[1] // k.shape[1]
    outputs = []
    for q_n, k_n, v_n in zip(q.split(rows), k.split(lengths), v.split(lengths), strict=True):
        keys, values = (x.repeat_interleave(repeats, dim=1).transpose(0, 1) for x in (k_n, v_n))
        outputs.append(F.scaled_dot_product_attention(q_n.transpose(0, 1), keys, values, is_causal=causal))
    out = torch.cat([output.transpose(0, 1) for output in outputs])
    return [out, *torch.autograd.grad(out, (q, k, v), gradient.to(out))]


def loss(setting: Setting) -> list[dict[str, Any]]:
    """Head and cross-entropy in chunks against full float64 logits, with random weights."""
    tokens, width, words = (1024, 2560, 122_880) if setting.size == "4b" else (96, 32, 512)
    random = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(tokens, width, generator=random), torch.randn(words, width, generator=random)
    weight *= width**-0.5
    targets = torch.randint(words, (tokens,), generator=random).to(setting.device)
    figures = []
    for dtype, accepted in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        inputs = [x.to(setting.device, dtype).requires_grad_() for x in (hidden, weight)]
        losses = token_losses(inputs[0], inputs[1], targets)
        found = [losses, *torch.autograd.grad(losses.sum(), inputs)]
        exact = [x.detach().double().requires_grad_() for x in inputs]
        expected_losses = F.cross_entropy(exact[0] @ exact[1].T, targets, reduction="none")
        expected = [expected_losses, *torch.autograd.grad(expected_losses.sum(), exact)]
        worst = max(error(*both) for both in zip(found, expected, strict=True))
        name = str(dtype).removeprefix("torch.")
        figures.append(figure(f"{name}: losses and gradients", worst, "share of the largest", at_most=accepted))
    return figures


def float32(setting: Setting) -> list[dict[str, Any]]:
    """A small model in float32 without TF32, on the device and on the CPU: loss, and the norm of each gradient."""
    set_convolutions(Precision.fp32)
    torch.backends.cuda.matmul.allow_tf32 = False
    config = model_config("tiny")
    _, [batch, *_] = batches_of(config, 1, 0)
    losses, gradients = [], []
    for device in ("cpu", setting.device):
        torch.manual_seed(0)
        model: Any = MegrezO(config)
        model.to(device)
        total = model.train()(batch=batch.to(device)).loss_sum / len(batch.targets)
        total.backward()
        losses.append(float(total.detach()))
        gradients.append({name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})
    on_cpu, there = gradients
    largest = max(float(gradient.norm()) for gradient in on_cpu.values())
    worst = max(float((there[name] - gradient).norm()) for name, gradient in on_cpu.items()) / largest
    return [
        figure("loss", abs(losses[1] / losses[0] - 1), "relative", at_most=1e-5),
        figure("gradients", worst, "share of the largest norm", at_most=1e-4),
    ]


STAGES = {"rates": rates, "attention": attention, "loss": loss, "float32": float32}
