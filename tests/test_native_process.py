"""The native backend in its process: after a fork, beside torch's threads, in memory, with very large tensors."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LAYOUTS, assert_same_results, make_parameters, results, set_grads, threads
from torch.nn import Parameter

import fusedopt
from fusedopt.backends import native
from fusedopt.optim import OPTIMIZERS

pytestmark = pytest.mark.usefixtures("one_thread")


def test_in_a_forked_child() -> None:
    """After the parent's threads have worked: in the child they are gone, and waiting for them would be for ever."""

    def make() -> Any:
        # Each small enough for torch to make its state without threads, which in the child would hang in torch.
        params = make_parameters([(20_000,)] * 5)
        optimizer = fusedopt.AdamW(params, weight_decay=0.1, backend="cpu")
        set_grads(params, 0)
        return optimizer

    with threads(2):
        planned, fresh, expected = make(), make(), make()
        planned.step()
        for _ in range(2):
            expected.step()
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # kills it
            code = 1
            try:
                for optimizer in (planned, fresh, fresh):
                    optimizer.step()
                for a, b, c in zip(*(optimizer.param_groups[0]["params"] for optimizer in (planned, fresh, expected))):
                    assert bytes(a.detach().numpy()) == bytes(b.detach().numpy()) == bytes(c.detach().numpy())
                assert "forked" in native().thread_runtime()
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)  # past pytest
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        planned.step()
    assert_same_results(results(planned), results(expected))
    assert "forked" not in native().thread_runtime()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc/self/maps")
def test_one_openmp_runtime() -> None:
    """torch's, and no other beside it."""
    code = (
        "import re, torch, fusedopt\n"
        "def runtimes():\n"
        "    return set(re.findall(r'/\\S*lib(?:gomp|omp|iomp5)[^/\\s]*', open('/proc/self/maps').read()))\n"
        "before = runtimes()\n"
        "param = torch.nn.Parameter(torch.ones(100_000))\n"
        "param.grad = torch.ones(100_000)\n"
        "torch.set_num_threads(2)\n"
        "fusedopt.AdamW([param], backend='cpu').step()\n"
        "assert len(before) == 1 and runtimes() == before, (before, runtimes())\n"
        "from fusedopt.backends import native\n"
        "assert 'none' not in native().thread_runtime(), native().thread_runtime()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- size ---


def resident_peak() -> int:
    """The most memory this process has held since the last call, in bytes."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.parametrize("layout", ["contiguous", "stepped"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_takes_no_memory(name: str, layout: str) -> None:
    """None that grows with the model: a copy of any tensor here would be 8 MiB or more."""
    x = torch.zeros(1 << 22)
    param = Parameter(LAYOUTS[layout](x))
    param.grad = LAYOUTS[layout](x)
    optimizer: Any = OPTIMIZERS[name]([param], backend="cpu", state_dtype="bfloat16")
    with threads(2):
        optimizer.step()  # makes the states and the plan
        resident_peak()
        before = resident_peak()
        optimizer.step()
        assert resident_peak() - before < 1 << 20


def available_memory() -> int:
    """In bytes; 0 where the system does not say."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 0)


@pytest.mark.slow
@pytest.mark.skipif(available_memory() < 10 << 30, reason="needs 10 GiB of free memory")
def test_more_elements_than_int32_counts() -> None:
    size = (1 << 31) + 1000
    places = torch.tensor([0, 1, (1 << 31) - 1, 1 << 31, (1 << 31) + 1, size - 1])
    param = Parameter(torch.zeros(size, dtype=torch.bfloat16))
    param.grad = torch.zeros(size, dtype=torch.bfloat16)
    param.grad[places] = torch.arange(1, len(places) + 1, dtype=torch.bfloat16)
    fusedopt.SGD([param], lr=1.0, backend="cpu").step()
    assert param[places].tolist() == [-1, -2, -3, -4, -5, -6]
    assert int(torch.count_nonzero(param)) == len(places)
