"""The GPU backends on a GPU: the CPU's bits, whatever the memory, the stream and the size; and what a step launches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from configs import CONFIGS
from helpers import (
    GRAD_LAYOUTS,
    LAYOUTS,
    assert_same_bits,
    assert_same_results,
    make_parameters,
    pairwise,
    results,
    set_grads,
    values,
)
from steps import CONFIGURED, assert_near, assert_optimizers_near, parameters_of
from torch import Tensor
from torch.amp import GradScaler
from torch.nn import Parameter

import fusedopt
from fusedopt._state import NARROW
from fusedopt.backends import BACKENDS, choose
from fusedopt.codecs import MASTERS, ROUNDINGS, STATE_DTYPES
from fusedopt.optim import OPTIMIZERS

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DOUBLE = (torch.float64, torch.complex128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)
# One number, none, less than a tile of any kernel, and several with a ragged end.
SHAPES = ((), (0,), (2, 3, 5, 83), (3, 7001))
CLIPPED, INT8 = {"max_grad_norm": 0.5}, {"state_dtype": "int8", "min_quantized_size": 100}


@pytest.fixture(params=[name for name in BACKENDS if name not in ("cpu", "eager")])
def backend(request: pytest.FixtureRequest) -> str:
    reason = BACKENDS[request.param].unavailable() or BACKENDS[request.param].refuses(torch.empty(1, device=DEVICE))
    if reason:
        pytest.skip(reason)
    return request.param


# --- an optimizer on the CPU and its twin on the GPU ---


def on_gpu(tensor: Tensor) -> Tensor:
    """The same view of the same memory, there."""
    if tensor.is_conj():
        return on_gpu(tensor.conj()).conj()
    if tensor.is_neg():
        return torch._neg_view(on_gpu(torch._neg_view(tensor)))
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.detach().untyped_storage())
    return whole.to(DEVICE, copy=True).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def set_grad(param: Tensor, grad: Tensor) -> None:
    """`param.grad = grad`, of any dtype: torch compares dtypes only at the assignment."""
    data = param.data
    param.data = torch.empty(data.shape, dtype=grad.dtype, device=grad.device)
    param.grad = grad
    param.data = data


def twins(cls: Any, params: Sequence[Parameter], backend: str, **options: Any) -> tuple[Any, Any]:
    copies = [Parameter(on_gpu(param)) for param in params]
    return cls(params, **options), cls(copies, **options, backend=backend)


def set_both(cpu: Any, gpu: Any, step: int, **how: Any) -> None:
    """Gradients for both, as `set_grads` makes them."""
    set_grads(parameters_of(cpu), step, **how)
    for param, copy in zip(parameters_of(cpu), parameters_of(gpu), strict=True):
        assert param.grad is not None
        set_grad(copy, on_gpu(param.grad))


def results_here(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in results(optimizer).items()}


def assert_twins(cpu: Any, gpu: Any) -> None:
    assert all(param.device.type == DEVICE for param in parameters_of(gpu))
    assert_same_results(results_here(gpu), results_here(cpu))


# --- the same bits ---


@pytest.mark.parametrize(
    "row",
    pairwise(
        configured=CONFIGURED,
        dtype=DTYPES,
        state=STATE_DTYPES,
        narrow=[(master, rounding) for master in MASTERS for rounding in ROUNDINGS],
        grad=(None, torch.float32, torch.bfloat16),
        layout=list(LAYOUTS),
        grad_layout=list(GRAD_LAYOUTS),
    ),
    ids=lambda row: "-".join(str(getattr(value, "id", value)).removeprefix("torch.") for value in row.values()),
)
def test_same_bits_as_on_the_cpu(row: dict[str, Any], backend: str) -> None:
    cls, config = row["configured"].values
    dtype, (master, rounding), layout = row["dtype"], row["narrow"], row["grad_layout"]
    options: dict[str, Any] = {}
    if dtype not in DOUBLE:  # whose last bit is free, and may decide a code
        options = {"state_dtype": row["state"], "min_quantized_size": 100}
    if dtype in NARROW:
        master = master if dtype == torch.bfloat16 or master == "float32" else None
        # Nothing is left to draw where the master has all bits.
        rounding = "nearest" if master in ("float32", "split16") else rounding
        options |= {"rounding": rounding, "master": master}
    grad = dtype if dtype.is_complex else row["grad"]
    cpu, gpu = twins(cls, make_parameters(SHAPES, dtype, row["layout"]), backend, **config, **options)
    how = {"layout": "conjugate" if layout == "imaginary" and dtype.is_complex else layout}
    for step in range(3):
        set_both(cpu, gpu, step, dtype=grad, awkward=step == 2 and dtype not in DOUBLE, **how)
        cpu.step()
        gpu.step()
    if dtype in DOUBLE:
        for (name, ours), theirs in zip(results_here(gpu).items(), results(cpu).values(), strict=True):
            assert_near(ours, theirs, 3, name)
    else:
        assert_twins(cpu, gpu)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_that_come_and_go(name: str, backend: str) -> None:
    cpu, gpu = twins(OPTIMIZERS[name], make_parameters(SHAPES * 2), backend, **CONFIGS[name][0])
    for step in range(5):
        set_both(cpu, gpu, step)
        for optimizer in (cpu, gpu):
            for index, param in enumerate(parameters_of(optimizer)):
                if (step + index) % 3 == 0:
                    param.grad = None
            optimizer.step()
    assert_twins(cpu, gpu)


@pytest.mark.parametrize("zero_grads", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping(dtype: torch.dtype, zero_grads: bool, backend: str) -> None:
    """Also where some layouts differ; the norm stays on the GPU."""
    params = [*make_parameters(SHAPES, dtype), *make_parameters(SHAPES, dtype, "stepped")]
    cpu, gpu = twins(fusedopt.AdamW, params, backend, max_grad_norm=0.5, zero_grads=zero_grads)
    for step in range(3):
        set_both(cpu, gpu, step, layout="stepped" if step else "contiguous")
        cpu.step()
        gpu.step()
        assert gpu.grad_norm.device.type == DEVICE and gpu.grad_norm > 0.5
        assert_same_bits(gpu.grad_norm.cpu(), cpu.grad_norm, "norm")
        for param, copy in zip(parameters_of(cpu), parameters_of(gpu), strict=True):
            assert_same_bits(copy.grad.cpu(), param.grad, "gradient")
    assert_twins(cpu, gpu)


def test_clip_grad_norm(backend: str) -> None:
    """Whatever backend steps: the norm of gradients on a GPU has the bits of those on the CPU, and so have they."""
    cpu, gpu = twins(fusedopt.SGD, make_parameters(SHAPES), backend)
    set_both(cpu, gpu, 0)
    norms = [fusedopt.clip_grad_norm_(parameters_of(optimizer), 0.5) for optimizer in (cpu, gpu)]
    assert_same_bits(norms[1].cpu(), norms[0])
    for param, copy in zip(parameters_of(cpu), parameters_of(gpu), strict=True):
        assert_same_bits(copy.grad.cpu(), param.grad, "gradient")


@pytest.mark.parametrize(("fused", "capturable"), [(False, False), (True, False), (True, True)])
def test_grad_scaler(fused: bool, capturable: bool, backend: str) -> None:
    """Whether it unscales gradients or leaves that to the step; a step with an infinite gradient is skipped."""
    cpu, gpu = twins(fusedopt.AdamW, make_parameters(SHAPES), backend, fused=fused)
    gpu.param_groups[0]["capturable"] = capturable
    scalers = [GradScaler(device, init_scale=2.0**9, growth_interval=2) for device in ("cpu", DEVICE)]
    for scaler, device in zip(scalers, ("cpu", DEVICE)):
        scaler.scale(torch.ones((), device=device))  # creates its scale
    for step in range(6):
        set_both(cpu, gpu, step)
        for optimizer, scaler in zip((cpu, gpu), scalers):
            for param in parameters_of(optimizer):
                param.grad.mul_(scaler.get_scale())
            if step == 2:
                parameters_of(optimizer)[-1].grad[0, 5] = torch.inf
            scaler.step(optimizer)
            scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert float(next(iter(gpu.state.values()))["step"]) == 5
    if not capturable:
        assert_twins(cpu, gpu)
        return
    # Scalars that are computed on the GPU may differ in their last bit.
    for (name, ours), theirs in zip(results_here(gpu).items(), results(cpu).values(), strict=True):
        assert_near(ours, theirs, 5, name)


def test_every_memory_path_for_the_sanitizer(backend: str) -> None:
    """Few and small steps, since `make gpu` runs them where each access to memory is checked."""
    for options in ({}, INT8, CLIPPED):
        params = [param for layout in LAYOUTS for param in make_parameters(SHAPES[:3], torch.bfloat16, layout)]
        cpu, gpu = twins(fusedopt.AdamW, params, backend, **options, rounding="stochastic")
        set_both(cpu, gpu, 0)
        cpu.step()
        gpu.step()
        assert_twins(cpu, gpu)


def test_a_checkpoint_goes_back_to_the_cpu(backend: str) -> None:
    cpu, gpu = twins(fusedopt.AdamW, make_parameters(SHAPES), backend, **INT8)
    set_both(cpu, gpu, 0)
    cpu.step()
    gpu.step()
    again = fusedopt.AdamW(parameters_of(cpu), **INT8)
    again.load_state_dict(gpu.state_dict())
    set_both(again, gpu, 1)
    again.step()
    gpu.step()
    assert_twins(again, gpu)


def test_swap_amid_training() -> None:
    params = [Parameter(on_gpu(param)) for param in make_parameters(SHAPES)]
    ours, theirs = (
        torch.optim.AdamW([Parameter(param.detach().clone()) for param in params], lr=0.05, fused=fused)
        for fused in (False, True)
    )
    for step in range(6):
        for optimizer in (ours, theirs):
            for index, param in enumerate(parameters_of(optimizer)):
                param.grad = values(param.shape, 2, step, index).to(DEVICE)
            optimizer.step()
        if step == 2:
            fusedopt.swap(ours)
    for param in parameters_of(ours):
        assert choose(param, None, "").name not in ("cpu", "eager")
    assert all(float(state["step"]) == 6 for state in theirs.state.values())
    for state in theirs.state.values():
        state["step"] = state["step"].cpu()  # where torch's fused step keeps it
    assert_optimizers_near(ours, theirs, 6)


# --- size ---

PAST_INT32 = 2**31 + 100_077
# Whole blocks of 8-bit state, but for the last.
PLACES = (slice(0, 4096), slice(2**31 - 4096, 2**31 + 4096), slice(2**31 + 98_304, PAST_INT32))


@pytest.mark.parametrize(("name", "options"), [("SGD", {}), ("Lion", {"state_dtype": "int8"})])
def test_more_than_2_to_the_31_elements(name: str, options: dict[str, Any], backend: str) -> None:
    if torch.cuda.mem_get_info()[0] < 6 * PAST_INT32:  # parameter, gradient, codes; and room for what is drawn
        pytest.skip("the GPU has too little memory")
    settings = {"lr": 0.01, "weight_decay": 0.1, "min_quantized_size": 1, **options}
    data = torch.empty(PAST_INT32, dtype=torch.bfloat16, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    param = Parameter(data.normal_(generator=generator))
    gpu = OPTIMIZERS[name]([param], **settings, backend=backend)
    pieces = [Parameter(param.detach()[place].cpu()) for place in PLACES]
    cpu = OPTIMIZERS[name](pieces, **settings)
    param.grad = torch.empty_like(param, requires_grad=False)
    for _ in range(2):
        param.grad.normal_(generator=generator)
        for piece, place in zip(pieces, PLACES):
            piece.grad = param.grad[place].cpu()
        gpu.step()
        cpu.step()
    for piece, place in zip(pieces, PLACES):
        assert_same_bits(param.detach()[place].cpu(), piece, str(place))


# --- streams and graphs ---


def test_gradients_of_another_stream(backend: str) -> None:
    """The step runs on the caller's stream, after what that stream waits for."""
    cpu, gpu = twins(fusedopt.AdamW, make_parameters(SHAPES), backend)
    producer, stepper = torch.cuda.Stream(), torch.cuda.Stream()
    for step in range(4):
        set_both(cpu, gpu, step)
        torch.cuda.synchronize()
        with torch.cuda.stream(producer):
            torch.cuda._sleep(10_000_000)  # some milliseconds
            for param in parameters_of(gpu):
                param.grad.mul_(2)
        stepper.wait_stream(producer)
        with torch.cuda.stream(stepper):
            gpu.step()
        for param in parameters_of(cpu):
            param.grad.mul_(2)
        cpu.step()
        torch.cuda.synchronize()
        assert_twins(cpu, gpu)


def test_two_optimizers_on_two_streams(backend: str) -> None:
    pairs = [twins(fusedopt.AdamW, make_parameters(((300_001,), (77,))), backend, lr=lr) for lr in (0.1, 0.01)]
    streams = [torch.cuda.Stream() for _ in pairs]
    for (cpu, gpu), _ in zip(pairs, streams):
        set_both(cpu, gpu, 0)
    torch.cuda.synchronize()
    for _ in range(20):
        for (_, gpu), stream in zip(pairs, streams):
            with torch.cuda.stream(stream):
                gpu.step()
    torch.cuda.synchronize()
    for cpu, gpu in pairs:
        for _ in range(20):
            cpu.step()
        assert_twins(cpu, gpu)


class Training:
    """A loss of parameters on the GPU whose gradients depend on them; inputs and lr are filled in place."""

    def __init__(self, cls: Any, config: dict[str, Any], backend: str, **options: Any) -> None:
        self.params = [Parameter(on_gpu(param)) for param in make_parameters(((5, 7), (700,), (3, 2049)))]
        self.inputs = [torch.empty_like(param, requires_grad=False) for param in self.params]
        self.lr = torch.tensor(config["lr"], device=DEVICE)
        self.optimizer = cls(self.params, **{**config, "lr": self.lr}, capturable=True, backend=backend, **options)

    def at(self, step: int) -> None:
        for index, given in enumerate(self.inputs):
            given.copy_(values(given.shape, 5, step, index))
        if step == 6:
            self.lr.mul_(0.5)

    def step(self) -> None:
        loss = torch.stack([(param.sin() * given).sum() for param, given in zip(self.params, self.inputs)]).sum()
        loss.backward()
        self.optimizer.step()


def run_eagerly(training: Training, steps: range) -> None:
    for step in steps:
        training.at(step)
        training.optimizer.zero_grad(set_to_none=True)
        training.step()


CAPTURABLE = [case for case in CONFIGURED if "capturable" in inspect.signature(case.values[0]).parameters]


@pytest.mark.parametrize("options", [{}, INT8, CLIPPED], ids=["", "int8", "clipped"])
@pytest.mark.parametrize(("cls", "config"), CAPTURABLE)
def test_graph_of_a_whole_step(cls: Any, config: dict[str, Any], options: dict[str, Any], backend: str) -> None:
    """Replays do what steps do: counters advance, and a learning rate that is changed in between takes effect."""
    captured, plain = (Training(cls, config, backend, **options) for _ in range(2))
    run_eagerly(plain, range(8))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run_eagerly(captured, range(3))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    captured.optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(3, 8):
        captured.at(step)
        graph.replay()
    torch.cuda.synchronize()
    assert all(float(state["step"]) == 8 for state in captured.optimizer.state.values())
    assert_same_results(results_here(captured.optimizer), results_here(plain.optimizer))


# --- what a step costs ---


def many(backend: str, count: int = 300, **options: Any) -> torch.optim.Optimizer:
    params = [Parameter(torch.randn(5000, device=DEVICE)) for _ in range(count)]
    return fusedopt.AdamW(params, **options, backend=backend)


def new_gradients(optimizer: torch.optim.Optimizer) -> None:
    for param in parameters_of(optimizer):
        param.grad = torch.randn_like(param)


@pytest.mark.parametrize("options", [{}, INT8, CLIPPED, {"capturable": True}], ids=str)
def test_no_step_waits_for_the_gpu(options: dict[str, Any], backend: str) -> None:
    """But the first, which creates the state."""
    optimizer = many(backend, **options)
    for step in range(3):
        new_gradients(optimizer)
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def kernels(call: Callable[[], object]) -> list[str]:
    """The names of those that `call` launches."""
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    # What the host names shows among the device's events too.
    others = ("Memcpy", "Memset", "Optimizer.")
    return [event.name for event in events if not event.name.startswith(others)]


@pytest.mark.parametrize("options", [{}, INT8], ids=str)
def test_one_launch_for_any_number_of_tensors(options: dict[str, Any], backend: str) -> None:
    """And one for each way to store them."""
    optimizer = many(backend, **options)
    optimizer.add_param_group({"params": [Parameter(param.detach().bfloat16()) for param in parameters_of(optimizer)]})
    for _ in range(2):
        new_gradients(optimizer)
        optimizer.step()
    new_gradients(optimizer)
    found = kernels(optimizer.step)
    assert len(found) == 2, found


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_several_devices_in_one_optimizer(backend: str) -> None:
    cpu, gpu = twins(fusedopt.AdamW, make_parameters(SHAPES * 2), backend, max_grad_norm=0.5)
    for index, param in enumerate(parameters_of(gpu)):
        param.data = param.data.to(f"cuda:{index % 2}")
    for step in range(3):
        set_grads(parameters_of(cpu), step)
        for param, copy in zip(parameters_of(cpu), parameters_of(gpu), strict=True):
            assert param.grad is not None
            copy.grad = param.grad.to(copy.device)
        cpu.step()
        gpu.step()
    assert_twins(cpu, gpu)
