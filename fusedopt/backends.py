"""The backends: what each serves, which one is chosen, and the eager reference."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import importlib
import importlib.metadata
import importlib.util
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from ._gpu import Driver
from .binding import RULES, Rule
from .codecs import STORAGE_DTYPES, Key, State, decode, decode_parameter, encode, encode_parameter


@dataclass
class Update:
    """One parameter's share of a step, for any backend. Tensors are plain: a DTensor comes as its local shard."""

    rule: Rule
    param: Tensor
    grad: Tensor
    states: list[State]
    scalars: tuple[float, ...]
    grad_scale: float = 1.0
    master: Tensor | None = None
    key: Key | None = None  # for stochastic rounding


class Backend:
    """A way to run a step."""

    name: str
    summary: str
    plans = False
    """Whether the native module plans its steps."""

    def unavailable(self) -> str | None:
        """None when it can run here, else the reason and the remedy."""
        raise NotImplementedError

    def refuses(self, param: Tensor, rule: Rule | None = None) -> str | None:
        """None when it can step this parameter by `rule`, or by any of `RULES`, else the reason."""
        raise NotImplementedError

    def rule_number(self, rule: Rule) -> int:
        """What the native module knows the rule by."""
        raise NotImplementedError


class Cpu(Backend):
    """The native module. Its steps are planned and run by `fusedopt._native.Plan`."""

    name = "cpu"
    summary = "native SIMD and threads, for tensors on the CPU"
    plans = True

    def unavailable(self) -> str | None:
        try:
            native()
        except ImportError as error:
            return (
                f"the native module does not load ({error}); install a C++ compiler and reinstall fusedopt "
                "with FUSEDOPT_NATIVE=1 to see why it does not build"
            )
        return None

    def refuses(self, param: Tensor, rule: Rule | None = None) -> str | None:
        if param.device.type != "cpu":
            return f"it is on {param.device}, and the cpu backend steps tensors on the CPU"
        if param.is_neg() or param.is_conj():
            return "it is a negative or conjugate view, which has no memory of its own values to update"
        reason = _unreachable(param)
        if reason:
            return reason
        return None if rule is None else _compile().refusal(rule)

    def rule_number(self, rule: Rule) -> int:
        number: int = _compile().rule_number(rule)
        return number


class Gpu(Backend):
    """A backend whose kernels read a table, which the native module fills."""

    @property
    def plans(self) -> bool:  # type: ignore[override]
        return BACKENDS["cpu"].unavailable() is None

    def rule_number(self, rule: Rule) -> int:
        return native().rule_number(rule.name) if RULES.get(rule.name) is rule else _number_of(rule)

    def driver(self) -> Driver:
        """What launches its kernels, for one plan."""
        raise NotImplementedError


_own_rules = itertools.count(1)


@functools.cache
def _number_of(rule: Rule) -> int:
    """Of a user's rule, which has no kernel in the native module."""
    return -next(_own_rules)


class Triton(Gpu):
    """Triton kernels: `fusedopt.kernels`."""

    name = "triton"
    summary = "one launch for all tensors stored alike, for tensors on a GPU"

    def unavailable(self) -> str | None:
        if not (torch.cuda.is_available() or interpreted()):
            return "torch sees no GPU; on a CPU only Triton's interpreter runs it, with TRITON_INTERPRET=1 set"
        return triton_missing()

    def refuses(self, param: Tensor, rule: Rule | None = None) -> str | None:
        if param.device.type != ("cpu" if interpreted() else "cuda"):
            return f"it is on {param.device}, and the triton backend steps tensors on a GPU"
        if param.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(param.device) < (8, 0):
            return f"its GPU, {torch.cuda.get_device_name(param.device)}, is older than Ampere"
        if param.is_neg() or param.is_conj():
            return "it is a negative or conjugate view, which has no memory of its own values to update"
        return _unreachable(param)

    def driver(self) -> Driver:
        from .kernels.driver import TritonDriver

        return TritonDriver()


class Cuda(Gpu):
    """The native module's CUDA kernels, in csrc/cuda."""

    name = "cuda"
    summary = "CUDA C++ in the native module, one launch for all tensors stored alike, for tensors on an NVIDIA GPU"

    def unavailable(self) -> str | None:
        reason = BACKENDS["cpu"].unavailable()
        if reason:
            return reason
        if _cuda_stand_in():
            return None
        if not native().cuda_toolkit():
            return "the native module was built without nvcc; reinstall fusedopt with FUSEDOPT_CUDA=1 to see why"
        if torch.version.cuda is None or not torch.cuda.is_available():
            return "torch sees no NVIDIA GPU"
        return _cuda_unavailable(torch.cuda.current_device())

    def refuses(self, param: Tensor, rule: Rule | None = None) -> str | None:
        if param.device.type != ("cpu" if _cuda_stand_in() else "cuda"):
            return f"it is on {param.device}, and the cuda backend steps tensors on a GPU"
        if rule is not None and RULES.get(rule.name) is not rule:
            return f"rule {rule.name!r} is not one of fusedopt's, and the triton backend compiles others"
        if param.is_neg() or param.is_conj():
            return "it is a negative or conjugate view, which has no memory of its own values to update"
        reason = _unreachable(param)
        if reason:
            return reason
        return None if _cuda_stand_in() else _cuda_unavailable(param.device.index or 0)

    def driver(self) -> Driver:
        from ._cuda import CudaDriver

        return CudaDriver()


@functools.cache
def _cuda_unavailable(device: int) -> str | None:
    return native().cuda_unavailable(device) or None


def _cuda_stand_in() -> bool:
    """Whether a test's stand-in for the driver runs the kernels on the CPU."""
    return "FUSEDOPT_CUDA_DRIVER" in os.environ


def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def triton_missing() -> str | None:
    """Why there is no Triton that can compile the kernels; None where there is."""
    version = _triton_version()
    if version is None:
        return "Triton is not installed; pip install 'triton>=3.6'"
    if tuple(map(int, version.split(".")[:2])) < (3, 6):
        return f"Triton is {version}, and it takes 3.6, which comes with a newer torch: pip install --upgrade torch"
    return None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, which is decided as they are defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class Eager(Backend):
    """The reference: one torch operation after another. Its results define every other backend's."""

    name = "eager"
    summary = "the reference, in torch operations, for any device"

    def unavailable(self) -> str | None:
        return None

    def refuses(self, param: Tensor, rule: Rule | None = None) -> str | None:
        return None

    @staticmethod
    @torch.no_grad()
    def step(update: Update) -> None:
        double = update.param.dtype in (torch.float64, torch.complex128)
        dtype = torch.float64 if double else torch.float32
        scalars = update.scalars if double else tuple(ctypes.c_float(value).value for value in update.scalars)
        grad = decode(update.grad, dtype)
        if update.grad_scale != 1:
            grad = grad * (update.grad_scale if double else ctypes.c_float(update.grad_scale).value)
        param = decode_parameter(update.param, update.master, dtype)
        states = [decode(state, dtype) for state in update.states]
        param, *states = update.rule.reference(param, grad, *states, *scalars)
        encode_parameter(param, update.param, update.master, update.key)
        for values, state in zip(states, update.states, strict=True):
            encode(values, state)


BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Cpu(), Triton(), Cuda(), Eager())}
"""Every backend by name, fastest first."""


@functools.cache
def native() -> ModuleType:
    """The native module, loaded on first use.

    Raises:
        ImportError: it was not built, or does not load.
    """
    # A sanitizer's build is tested through this variable, in place of the installed module.
    directory = os.environ.get("FUSEDOPT_NATIVE_PATH")
    if directory:
        module = _load(sorted(Path(directory).glob("_native*.so")), directory)
    else:
        module = importlib.import_module("fusedopt._native")
    module.use_exchange_api(getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))
    return module


def _compile() -> ModuleType:
    # Imported when used: it imports this module.
    return importlib.import_module("fusedopt._compile")


def _load(found: list[Path], directory: str) -> ModuleType:
    if not found:
        raise ImportError(f"FUSEDOPT_NATIVE_PATH={directory!r} holds no _native*.so")
    spec = importlib.util.spec_from_file_location("fusedopt._native", found[0])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def is_traced() -> bool:
    """Whether a dispatch mode, as `make_fx`'s, is to see every operation."""
    return torch._C._len_torch_dispatch_stack() > 0


def _unreachable(tensor: Tensor) -> str | None:
    """Why only torch operations can reach the tensor's elements, where that is so."""
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"it is a {type(tensor).__name__}, whose memory only torch operations can reach"
    if is_traced():
        return "a dispatch mode, as of make_fx, is to see every operation"
    try:
        has_memory = bool(tensor.data_ptr()) or not tensor.numel()
    except RuntimeError:
        has_memory = False
    return None if has_memory else "it has no memory of its own, as under a transform of torch.func"


_override: contextvars.ContextVar[str | None] = contextvars.ContextVar("fusedopt_backend", default=None)


def check_backend(name: str | None, where: str) -> str | None:
    """`name`, if it is None or a backend that runs here.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: it cannot run here; the message has the reason and the remedy.
    """
    if name is None:
        return None
    if name not in BACKENDS:
        raise ValueError(f"{where}: there is no backend {name!r}; choose one of {', '.join(BACKENDS)}")
    reason = BACKENDS[name].unavailable()
    if reason:
        raise RuntimeError(f"{where}: the backend {name!r} cannot run here: {reason}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the steps inside the `with` block on this backend; an optimizer's own `backend=` goes before it.

    Raises:
        ValueError, RuntimeError: as `check_backend`.
    """
    token = _override.set(check_backend(name, "use_backend"))
    try:
        yield
    finally:
        _override.reset(token)


def requested_backend() -> str | None:
    """What `use_backend` or FUSEDOPT_BACKEND asks for; None to choose automatically."""
    return _override.get() or _from_environment()


@functools.cache
def _from_environment() -> str | None:
    return check_backend(os.environ.get("FUSEDOPT_BACKEND") or None, "FUSEDOPT_BACKEND")


def choose(param: Tensor, requested: str | None, what: str, rule: Rule | None = None) -> Backend:
    """The backend that steps `param` by `rule`, or by any of `RULES`: the requested one, or the fastest that can.

    Raises:
        RuntimeError: the requested backend cannot step this parameter, named `what`.
    """
    if requested is not None:
        reason = BACKENDS[requested].refuses(param, rule)
        if reason:
            raise RuntimeError(f"backend={requested!r} cannot step {what}: {reason}")
        return BACKENDS[requested]
    backends = BACKENDS.values()
    return next(backend for backend in backends if not backend.refuses(param, rule) and not backend.unavailable())


@dataclass(frozen=True)
class Explanation:
    """The backends here; prints as a table, and iterates over rows of (name, status, what it serves)."""

    rows: tuple[tuple[str, str, str], ...]
    notes: tuple[str, ...]

    def __iter__(self) -> Iterator[tuple[str, str, str]]:
        return iter(self.rows)

    def __str__(self) -> str:
        width = max(len(name) for name, _, _ in self.rows)
        lines = []
        for name, status, serves in self.rows:
            lines += [f"{name:<{width}}  {serves}", f"{'':<{width}}  {status}"]
        return "\n".join([*lines, *self.notes])


def explain() -> Explanation:
    """Which backend serves what on this machine, and why the others do not."""
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in STORAGE_DTYPES)
    rows = []
    for backend in BACKENDS.values():
        reason = backend.unavailable()
        status = f"does not run: {reason}" if reason else "runs"
        if backend.name == "cpu" and not reason:
            module = native()
            others = ", ".join(module.instruction_sets())
            status = (
                f"runs: {module.instruction_set()} (of {others}), {torch.get_num_threads()} thread(s), "
                f"threads: {module.thread_runtime()}"
            )
        rows.append((backend.name, status, backend.summary))
    try:
        in_use = requested_backend() or "the first that can step the parameter"
    except (RuntimeError, ValueError) as error:
        in_use = f"none; {error}"
    notes = (
        f"in use: {in_use}",
        f"every backend: every rule, any mix of {dtypes}; complex64, complex128; 8-bit state",
        *_compile().refusals(),
    )
    return Explanation(tuple(rows), notes)
