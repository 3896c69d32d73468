"""The kernels of RMSNorm and of gated linear units, compiled for GPUs that need not be here, as `aot` does."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import triton
from triton.compiler import ASTSource

from fusedopt.bench.aot import target
from fusedopt.kernels import glu, rms_norm
from fusedopt.kernels.glu_kernels import fusedopt_glu, fusedopt_glu_backward
from fusedopt.kernels.rms_norm_backward import (
    fusedopt_rms_norm_backward,
    fusedopt_rms_norm_backward_of_long_rows,
    fusedopt_rms_norm_grad_weight,
    fusedopt_rms_norm_means,
)
from fusedopt.kernels.rms_norm_forward import fusedopt_rms_norm

SHARED = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
"""Bytes of shared memory that a program may take."""

Kernels = dict[str, tuple[Any, dict[str, Any]]]
"""By name, a kernel and those of its arguments that choose it, with its options."""


def _warp(arch: str) -> int:
    return 64 if arch.startswith("gfx") else 32


def rms_norm_kernels(form: rms_norm.Form, arch: str) -> Kernels:
    """Those that serve a form."""
    found: Kernels = {"forward": (fusedopt_rms_norm, form.forward(_warp(arch)))}
    backward = form.backward(SHARED[arch], _warp(arch))
    if backward:
        found["backward"] = fusedopt_rms_norm_backward, backward
    else:
        found["means"] = fusedopt_rms_norm_means, form.means(_warp(arch))
        found["backward"] = fusedopt_rms_norm_backward_of_long_rows, form.backward_of_long_rows(_warp(arch))
    if form.weight:
        found["grad_weight"] = fusedopt_rms_norm_grad_weight, form.grad_weight()
    return found


def glu_kernels(form: glu.Form, arch: str) -> Kernels:
    """Those that serve a form."""
    return {
        "forward": (fusedopt_glu, form.forward(_warp(arch))),
        "backward": (fusedopt_glu_backward, form.backward(_warp(arch))),
    }


def compiled(kernel: Any, arguments: dict[str, Any], arch: str) -> Any:
    """As `aot.compiled`; the types of what does not choose the kernel are its annotations."""
    signature = {p.name: "constexpr" if p.is_constexpr else p.annotation_type for p in kernel.params}
    constants = {(p.num,): arguments[p.name] for p in kernel.params if p.is_constexpr}
    options = {name: value for name, value in arguments.items() if name not in signature}
    return triton.compile(ASTSource(kernel, signature, constants), target=target(arch), options=options)


def copies(kernel: Any) -> Counter[int]:
    """By width in bits, NVIDIA's copies from the device's memory to shared memory, beside `Figures.loads`."""
    found = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?\], (0x[0-9a-f]+|\d+)", kernel.asm["ptx"])
    return Counter(8 * int(size, 0) for size in found)
