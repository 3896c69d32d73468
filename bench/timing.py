"""Clocks: interleaved samples, their spread, memory bandwidth, and the memory high-water mark of a call."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import gc
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

Call = Callable[[], object]
Sampler = Callable[[], float]  # takes one measurement, returns seconds per call
Key = TypeVar("Key", bound=Hashable)

SAMPLE_SECONDS = 5e-4  # calls shorter than this are repeated within a sample, against the clock's own cost
MIN_ROUNDS = 5
CUDA_COPY_BYTES = 8 << 30  # the most that bandwidth is measured over: far more than any cache


@dataclasses.dataclass(frozen=True)
class Spread:
    """The 20th, 50th and 80th percentile of a set of samples."""

    p20: float
    median: float
    p80: float

    @classmethod
    def of(cls, samples: list[float]) -> Spread:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(fifths[0], statistics.median(samples), fifths[3])


def host_sampler(call: Call, device: torch.device, before: Call | None = None) -> Sampler:
    """Seconds the calling thread spends in `call`; `before`, if given, runs untimed before each single call.

    On the CPU that is the whole of the call; on a GPU it is what it takes to launch it, while the GPU has nothing else
    to do: the queue of launches would hold up repeated calls.
    """
    repeats = 1 if before or device.type == "cuda" else _repeats(call, device)

    def sample() -> float:
        if before:
            before()
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats

    return sample


def device_sampler(call: Call, device: torch.device, before: Call | None = None) -> Sampler:
    """Seconds the device spends on `call`: by events on a GPU, the same as the host's time on the CPU.

    On a GPU `call` finds none of its data in the cache, as after a backward; and filling it with other data gives
    the host a start, so that launching counts only where it takes longer than the work.
    """
    if device.type == "cpu":
        return host_sampler(call, device, before)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flushed = torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)

    def sample() -> float:
        if before:
            before()
        flushed.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return sample


def _repeats(call: Call, device: torch.device) -> int:
    shortest = min(_once(call, device) for _ in range(3))
    return max(1, min(1000, round(SAMPLE_SECONDS / max(shortest, 1e-9))))


def _once(call: Call, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given; nothing to wait for on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    samplers: Mapping[Key, Sampler],
    *,
    rounds: int | None,
    seconds: float,
    seed: int,
    progress: Callable[[float], None] = lambda fraction: None,
) -> dict[Key, list[float]]:
    """One sample of each sampler per round, in an order shuffled anew each round, so that noise favours none.

    Takes `rounds` rounds if given, else as many as start within `seconds`, and at least `MIN_ROUNDS`.
    The i-th samples of all keys belong to the same round. `progress` is told the part that is done, in 0..1.
    Garbage is not collected meanwhile, for a pause would grow with what the whole process holds.
    """
    order = random.Random(seed)
    keys = list(samplers)
    samples: dict[Key, list[float]] = {key: [] for key in keys}
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        start, done = time.perf_counter(), 0
        while done < rounds if rounds else done < MIN_ROUNDS or time.perf_counter() - start < seconds:
            order.shuffle(keys)
            for key in keys:
                samples[key].append(samplers[key]())
            done += 1
            spent = (time.perf_counter() - start) / seconds
            progress(done / rounds if rounds else min(done / MIN_ROUNDS, spent, 1.0))
    finally:
        if collecting:
            gc.enable()
    return samples


def bandwidth_samplers(nbytes: int, device: torch.device) -> tuple[dict[str, Sampler], dict[str, int]]:
    """Samplers of the device's memory bandwidth, and the bytes that one call of each reads and writes.

    "in-place" multiplies a buffer in place; "copy" copies one half of it to the other. On the CPU the buffer has
    `nbytes`, since what fits in a cache is faster; a GPU's is large whatever is measured beside it.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps to reuse is not free
        nbytes = min(CUDA_COPY_BYTES, available_bytes(device) // 4)
    buffer = torch.ones(max(2, nbytes // 4), device=device)
    source, target = buffer.tensor_split(2)
    source = source[: target.numel()]
    calls: dict[str, Call] = {"in-place": lambda: buffer.mul_(1.0), "copy": lambda: target.copy_(source)}
    moved = {"in-place": 2 * buffer.nbytes, "copy": 2 * target.nbytes}
    return {name: device_sampler(call, device) for name, call in calls.items()}, moved


MATMUL_SIZE = 2048  # of square matrices: large enough for any processor's full rate


def matmul_samplers(device: torch.device) -> tuple[dict[str, Sampler], float]:
    """Samplers of torch's product of two square matrices, by the name of the dtype, and its flops."""
    dtypes = [torch.float32, torch.bfloat16] + [torch.float16] * (device.type == "cuda")
    calls: dict[str, Call] = {}
    for dtype in dtypes:
        matrix = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device).to(dtype)
        calls[str(dtype).removeprefix("torch.")] = functools.partial(torch.mm, matrix, matrix, out=matrix.clone())
    return {name: device_sampler(call, device) for name, call in calls.items()}, 2.0 * MATMUL_SIZE**3


def training_interlude(device: torch.device, seed: int) -> Call:
    """Forward and backward of a small MLP: what lies between two optimizer steps in training.

    It fills the caches with other data and leaves torch's threads as training leaves them.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(512, 512, generator=generator).to(device).requires_grad_() for _ in range(3)]
    x = torch.randn(256, 512, generator=generator).to(device)

    def forward_backward() -> None:
        y = x
        for weight in weights:
            y = torch.relu(y @ weight * 512**-0.5)
        torch.autograd.grad(y.square().mean(), weights)

    return forward_backward


def peak_extra_bytes(call: Call, before: Call | None = None, *, device: torch.device) -> int | None:
    """Memory that `call` holds at its peak beyond what was held before it; the least of three measurements.

    `before`, if given, runs ahead of each call, and what it leaves is held before.

    On CUDA: of torch's allocator. On Linux: of the process's resident memory, whoever allocates it; free memory is
    handed back first, so that reusing it counts. Pages are counted, so a few 100 kB are noise. Elsewhere None.
    """
    if device.type == "cuda":
        if before:
            before()
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - held
    try:
        return min(_resident_growth(call, before) for _ in range(3))
    except (OSError, AttributeError):  # no writable /proc/self/clear_refs, or a libc without malloc_trim
        return None


def _resident_growth(call: Call, before: Call | None) -> int:
    if before:
        before()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # 5: reset the high-water mark
    held = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - held)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def available_bytes(device: torch.device) -> int:
    """Memory that may still be allocated on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 8 << 30  # no Linux: a guess that a laptop can bear; --memory overrules it
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
