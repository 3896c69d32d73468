"""One of the four processes of test_muon_distributed.py: `muon_ranks.py RANK WORLD FOLDER quick|all`.

They step the shards, or the copies, of what one process steps whole. With the native products, which have the same bits
wherever a matrix lies in memory, to the same bits.
"""

from __future__ import annotations

import datetime
import inspect
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import FSDP_ON_CPU, assert_same_bits, values
from torch import Tensor, distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel

from fusedopt import _muon, _owners
from fusedopt._muon import Muon
from fusedopt._owners import cost_of
from fusedopt.backends import BACKENDS

# Rows that two and four do not divide, fewer than there are processes, and shapes that are there more than once.
MATRICES = [(7, 5), (3, 7), (1, 3), (33, 48), (16, 16), (16, 16), (16, 16), (48, 33), (2, 64)]
if "src_data_rank" in inspect.signature(distribute_tensor).parameters:  # older releases of torch fail to shard these
    MATRICES += [(0, 4), (5, 0)]
STACKS = [(6, 7, 5), (4, 3, 8), (1, 5, 5), (6, 7, 5)]
KERNELS = [(6, 3, 3, 2), (5, 2, 3, 3), (3, 5, 1, 1)]
OPTIONS: dict[str, Any] = {"lr": 0.125, "weight_decay": 0.25, "adamw_weight_decay": 0.5}
NORMUON: dict[str, Any] = {**OPTIONS, "beta2": 0.75, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed(whole: Tensor, like: Tensor) -> Tensor:
    if not isinstance(like, DTensor):
        return whole.clone()
    return distribute_tensor(whole, like.device_mesh, like.placements)


def train(shared: Sequence[Tensor], optimizer: Any, whole: Sequence[Tensor], expected: Any, steps: range) -> None:
    """Steps of both with the same gradients, of which some are None at times, and some zero."""
    for step in steps:
        for index, (mine, param) in enumerate(zip(shared, whole, strict=True)):
            kind = (index + step) % 5
            param.grad = None if kind == 4 else values(param.shape, step, index).to(param.dtype) * (kind > 0)
            mine.grad = None if param.grad is None else placed(param.grad, mine)
        optimizer.step()
        expected.step()


def assert_orthogonalized_alike(a: Tensor, b: Tensor, backend: str | None, what: str) -> None:
    """torch's products of small matrices depend on how they are aligned, and so do those of all in float64."""
    if backend == "cpu" and a.dtype != torch.float64:
        assert_same_bits(a, b, what)
    else:
        # Five steps multiply errors by up to 3.4445 each, 2^9 in all, and rows much shorter than others by 2^4 more.
        atol = 2**13 * torch.finfo(torch.promote_types(a.dtype, torch.float32)).eps
        rtol = torch.finfo(a.dtype).eps  # of the parameter's own rounding
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{what}: {text}")


def assert_equal(shared: Sequence[Tensor], optimizer: Any, whole: Sequence[Tensor], expected: Any) -> None:
    for index, (mine, param) in enumerate(zip(shared, whole, strict=True)):
        what = f"parameter {index}, {tuple(param.shape)}"
        assert_orthogonalized_alike(full(mine.detach()), param.detach(), optimizer._backend, what)
        states, wanted = optimizer.state[mine], expected.state[param]
        assert states.keys() == wanted.keys() and "momentum_buffer" in states or "exp_avg" in states, what
        for name, state in states.items():
            if name.endswith("_scale"):
                continue
            assert isinstance(state, DTensor) == (isinstance(mine, DTensor) and name != "step"), (what, name)
            if name == "row_exp_avg_sq":
                assert_orthogonalized_alike(full(state), wanted[name], optimizer._backend, f"{name} of {what}")
            else:
                assert_same_bits(full(state), wanted[name], f"{name} of {what}")


def assert_copies_agree(copies: Sequence[Tensor]) -> None:
    """The same bits in all processes, whatever the products."""
    for copy in copies:
        first = copy.detach().clone()
        distributed.broadcast(first, 0)
        assert_same_bits(first, copy.detach())


def check(
    mesh: DeviceMesh | None, placements: Sequence[Any], shapes: Sequence[tuple[int, ...]], backend: str, **options: Any
) -> None:
    """Of parameters placed so, and of whole ones. Without a mesh all processes have copies."""
    dtype = options.pop("dtype", torch.float32)
    whole = [Parameter(values(shape, 99, index).to(dtype)) for index, shape in enumerate(shapes)]
    if mesh is None:
        shared = [Parameter(param.detach().clone()) for param in whole]
    else:
        shared = [Parameter(distribute_tensor(p.detach(), mesh, placements)) for p in whole]
    group: Any = None if mesh else distributed.group.WORLD
    settings = {"algorithm": "muon", "flatten": options.pop("flatten", None)}
    optimizer = Muon([{"params": shared, **settings}], process_group=group, backend=backend, **options)
    expected = Muon([{"params": whole, **settings}], backend=backend, **options)
    train(shared, optimizer, whole, expected, range(3))
    assert_equal(shared, optimizer, whole, expected)
    if mesh is None:
        assert_copies_agree(shared)


def check_placements(two: DeviceMesh, four: DeviceMesh, backend: str) -> None:
    for mesh, placements in [
        (two["inner"], [Shard(0)]),
        (four, [Shard(0)]),
        (four, [Shard(1)]),
        (four, [Replicate()]),
        (two, [Replicate(), Shard(0)]),
        (two, [Shard(1), Replicate()]),
        (two, [Shard(0), Shard(1)]),
        (None, []),
    ]:
        check(mesh, placements, MATRICES, backend, **NORMUON)
        check(mesh, placements, [*STACKS, *KERNELS], backend, **NORMUON)
    check(four, [Shard(2)], [*STACKS, *KERNELS], backend, **NORMUON)
    check(four, [Shard(1)], STACKS, backend, flatten=True, **NORMUON)
    check(four, [Shard(1)], KERNELS, backend, flatten=False, **NORMUON)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_owners, "_LEAST", 16)  # so that there are several buckets
        for mesh, placements in [(four, [Shard(0)]), (two, [Replicate(), Shard(0)]), (None, [])]:
            check(mesh, placements, [*MATRICES, *STACKS, *KERNELS], backend, **NORMUON)
    cautious = {**OPTIONS, "cautious": True, "maximize": True, "ns_coefficients": "polar_express"}
    check(four, [Shard(0)], MATRICES, backend, **cautious)
    check(four, [Shard(0)], [(12, 5), (12, 12), (2, 12, 4)], backend, split=4, **NORMUON)
    check(two, [Replicate(), Shard(0)], [(12, 5), (12, 12)], backend, split=(6, 4, 2), **NORMUON)
    check(four, [Shard(0)], MATRICES, backend, dtype=torch.bfloat16, master="float32", **OPTIONS)
    check(four, [Shard(0)], MATRICES, backend, dtype=torch.float64, **NORMUON)
    # Shards of whole blocks of 256, so that each is quantized as in the whole.
    check(four, [Shard(0)], [(16, 64), (32, 256)], backend, state_dtype="int8", min_quantized_size=0, **OPTIONS)


def check_at_random(two: DeviceMesh, four: DeviceMesh, backend: str) -> None:
    """Any shapes, placed in any way: the same in all processes, which draw alike."""
    draw = random.Random(0)
    for _ in range(60):
        mesh = draw.choice([two, four, two["inner"]])
        shapes = [tuple(draw.randint(0, 9) for _ in range(draw.choice([2, 2, 3, 4]))) for _ in range(6)]
        placements = [draw.choice([Replicate(), Shard(0), Shard(1)]) for _ in range(mesh.ndim)]
        options = draw.choice([OPTIONS, NORMUON, {**NORMUON, "split": 1}])
        check(mesh, placements, shapes, backend, **options)


# --- models ---


def make_model() -> Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Embedding(11, 6),
        torch.nn.Linear(6, 9),
        torch.nn.Tanh(),
        torch.nn.Linear(9, 10, bias=False),
        torch.nn.Tanh(),
        torch.nn.Linear(10, 1),
    )


def check_model(model: Module, backend: str, group: Any = None) -> None:
    """Of a model that is trained, each process with inputs of its own: matrices by Muon, the rest by AdamW."""
    whole = make_model()
    optimizer = Muon(model, process_group=group, backend=backend, **NORMUON)
    expected = Muon(whole, backend=backend, **NORMUON)
    assert {"muon", "adamw"} == {each["algorithm"] for each in optimizer.param_groups}
    for step in range(3):
        optimizer.zero_grad()
        torch.manual_seed(10 * step + distributed.get_rank())
        model(torch.randint(0, 11, (4,))).square().mean().backward()
        for param, mine in zip(whole.parameters(), model.parameters(), strict=True):
            param.grad = full(mine.grad).clone()
            assert param.grad.any()
        optimizer.step()
        expected.step()
    assert_equal([*model.parameters()], optimizer, [*whole.parameters()], expected)
    averages = [state["row_exp_avg_sq"] for state in expected.state.values() if "row_exp_avg_sq" in state]
    assert averages and all(map(torch.all, averages))
    if group:
        assert_copies_agree([*model.parameters()])


def check_models(two: DeviceMesh, four: DeviceMesh, backend: str) -> None:
    for mesh in (two["inner"], four, two):
        model = make_model()
        fully_shard(model[3], mesh=mesh)
        check_model(fully_shard(model, mesh=mesh), backend)
    # Columns and rows by tensor parallelism, each part then sharded by FSDP, which are strided shards.
    plan = {"1": ColwiseParallel(use_local_output=False), "3": RowwiseParallel()}
    check_model(fully_shard(parallelize_module(make_model(), two["inner"], plan), mesh=two["outer"]), backend)
    check_model(DistributedDataParallel(make_model()), backend, distributed.group.WORLD)


def check_clipping(four: DeviceMesh, backend: str) -> None:
    """All but the first process's shards of gradients are zero, so that the norm of the whole has the same bits."""
    whole = [Parameter(values(shape, 99)) for shape in [(8, 6), (12, 5), (4, 4)]]
    shared = [Parameter(distribute_tensor(p.detach(), four, [Shard(0)])) for p in whole]
    optimizer = Muon(shared, max_grad_norm=0.5, backend=backend, **OPTIONS)
    expected = Muon(whole, max_grad_norm=0.5, backend=backend, **OPTIONS)
    for step in range(2):
        for index, (mine, param) in enumerate(zip(shared, whole, strict=True)):
            # The larger the step, the more it is clipped: of unclipped ones the momentum would point elsewhere.
            param.grad = values(param.shape, step, index) * 10.0**step
            param.grad[len(param) // 4 :] = 0
            mine.grad = placed(param.grad, mine)
        optimizer.step()
        expected.step()
        assert_same_bits(optimizer.grad_norm, expected.grad_norm)
        assert optimizer.grad_norm > 0.5
    assert_equal(shared, optimizer, whole, expected)


# --- the work ---


def check_work(two: DeviceMesh, four: DeviceMesh, backend: str) -> None:
    """Each matrix is orthogonalized in one process, and none has more to do than a matrix above the average."""
    newton_schulz = _muon.newton_schulz
    shapes = [(32, 32)] * 6 + [(32, 16)] * 7 + [(8, 8)] * 5
    costs = [cost_of(*shape) for shape in shapes]
    for mesh, placements in [(four, [Shard(0)]), (two, [Replicate(), Shard(0)]), (four, [Replicate()])]:
        done = torch.zeros(4)

        def counted(xs: Any, *args: Any, done: Tensor = done, **kwargs: Any) -> Any:
            for x in xs:
                done[distributed.get_rank()] += len(x) * cost_of(*x.shape[1:])
            return newton_schulz(xs, *args, **kwargs)

        shared = [Parameter(distribute_tensor(values(s, 1), mesh, placements)) for s in shapes]
        for param in shared:
            param.grad = param.detach().clone()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_muon, "newton_schulz", counted)
            Muon(shared, backend=backend, **OPTIONS).step()
        distributed.all_reduce(done)
        assert done.sum() == sum(costs)
        assert done.max() <= sum(costs) / 4 + max(costs)


def events_of(shared: Sequence[Tensor], backend: str) -> list[str]:
    """What a step does, in order."""
    events: list[str] = []
    newton_schulz, all_to_all_single = _muon.newton_schulz, distributed.all_to_all_single

    class Waited:
        def __init__(self, work: Any, number: int) -> None:
            self._work, self._number = work, number

        def wait(self) -> None:
            events.append(f"wait {self._number}")
            self._work.wait()

    def sent(*args: Any, **kwargs: Any) -> Any:
        number = sum(event.startswith("send") for event in events)
        events.append(f"send {number}")
        assert kwargs["async_op"]
        return Waited(all_to_all_single(*args, **kwargs), number)

    def computed(*args: Any, **kwargs: Any) -> Any:
        events.append("compute")
        return newton_schulz(*args, **kwargs)

    for param in shared:
        param.grad = param.detach().clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_owners, "_LEAST", 1)
        patch.setattr(_muon, "newton_schulz", computed)
        patch.setattr(distributed, "all_to_all_single", sent)
        Muon([{"params": shared, "algorithm": "muon"}], backend=backend, **OPTIONS).step()
    return events


def check_overlap(four: DeviceMesh, backend: str) -> None:
    """Four buckets, one owned by each process: while one is computed the next is on its way."""
    shared = [Parameter(distribute_tensor(values((8, 8), 1), four, [Shard(0)])) for _ in range(4)]
    stages = [
        ["send 0"],
        ["send 1", "wait 0", "compute 0", "send 2"],
        ["send 3", "wait 1", "compute 1", "send 4", "wait 2"],
        ["send 5", "wait 3", "compute 2", "send 6", "wait 4"],
        ["wait 5", "compute 3", "send 7", "wait 6"],
        ["wait 7"],
    ]
    mine = f"compute {distributed.get_rank()}"
    expected = [event for stage in stages for event in stage if not event.startswith("compute") or event == mine]
    assert [event.replace(mine, "compute") for event in expected] == events_of(shared, backend)


def check_stacks_stay(four: DeviceMesh, backend: str) -> None:
    """Nothing is sent of shards of whole matrices; copies are not gathered."""
    shards = [Parameter(distribute_tensor(values((8, 4, 4), 1), four, [Shard(0)]))]
    assert events_of(shards, backend) == ["compute"]
    copies = [Parameter(distribute_tensor(values((1, 4, 4), 1), four, [Replicate()]))]
    assert sorted(set(events_of(copies, backend)) - {"compute"}) == ["send 0", "wait 0"]


def check_refusals(four: DeviceMesh) -> None:
    """Gradients that only some processes have are refused in all of them before anything changes."""
    shared = [Parameter(distribute_tensor(values((8, 6), 1), four, [Shard(0)])) for _ in range(2)]
    optimizer = Muon(shared, **OPTIONS)
    for index, param in enumerate(shared):
        param.grad = None if index == 1 and distributed.get_rank() == 2 else param.detach().clone()
    before = [param.to_local().clone() for param in shared]
    with pytest.raises(RuntimeError, match="gradients of different ones; no parameter was changed"):
        optimizer.step()
    assert not optimizer.state
    for param, value in zip(shared, before, strict=True):
        assert torch.equal(param.to_local(), value)


# --- checkpoints ---


class Bag(Module):
    """Matrices, stacks, kernels, vectors and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        for index, shape in enumerate([(7, 5), (3, 7), (33, 48), (1, 3), *STACKS[:2], *KERNELS[:2], (5,), (1,)]):
            self.register_parameter(f"weight{index}", Parameter(values(shape, 99, index)))
        self.embedding = Parameter(values((9, 4), 100))


def check_resuming(two: DeviceMesh, four: DeviceMesh, folder: Path, backend: str) -> None:
    """From two processes to four, and from four to one, through torch's distributed checkpoints."""
    whole = Bag()
    expected = Muon(whole, backend=backend, **NORMUON)
    begun = fully_shard(Bag(), mesh=two["inner"])
    optimizer = Muon(begun, backend=backend, **NORMUON)
    train([*begun.parameters()], optimizer, [*whole.parameters()], expected, range(2))
    if distributed.get_rank() < 2:
        saved = {"model": begun.state_dict(), "optimizer": get_optimizer_state_dict(begun, optimizer)}
        checkpoint.save(saved, checkpoint_id=folder / "two", process_group=two["inner"].get_group())
    distributed.barrier()

    def resumed(model: Module, saved: Path, alone: bool) -> Any:
        optimizer = Muon(model, backend=backend, **{**NORMUON, "lr": 99.0})
        found = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
        checkpoint.load(found, checkpoint_id=saved, **({"no_dist": True} if alone else {}))
        model.load_state_dict(found["model"])
        set_optimizer_state_dict(model, optimizer, found["optimizer"])
        for steps in (range(0), steps_of[alone]):
            train([*model.parameters()], optimizer, [*whole.parameters()], expected, steps)
            assert_equal([*model.parameters()], optimizer, [*whole.parameters()], expected)
        return optimizer

    steps_of = {False: range(2, 4), True: range(4, 6)}
    model = fully_shard(Bag(), mesh=four)
    optimizer = resumed(model, folder / "two", alone=False)
    saved = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    checkpoint.save(saved, checkpoint_id=folder / "four")

    # As one whole dictionary.
    again = Muon(model, backend=backend, **{**NORMUON, "lr": 99.0})
    optimizer.zero_grad()  # so that torch's functions create the state that they load into
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(model, again, get_optimizer_state_dict(model, optimizer, options=options), options=options)
    assert_equal([*model.parameters()], again, [*whole.parameters()], expected)
    again.load_state_dict(optimizer.state_dict())
    assert_equal([*model.parameters()], again, [*whole.parameters()], expected)
    # In older releases of torch one process cannot load alone while there are others.
    if distributed.get_rank() == 0 and "no_dist" in inspect.signature(checkpoint.load).parameters:
        resumed(Bag(), folder / "four", alone=True)
    distributed.barrier()


def main(rank: int, world: int, folder: Path, amount: str) -> None:
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=50),
    )
    two = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("outer", "inner"))
    four = DeviceMesh("cpu", range(4))
    runs = [name for name, each in BACKENDS.items() if not (each.unavailable() or each.refuses(torch.empty(1)))]
    for backend in runs:
        if FSDP_ON_CPU:
            check_models(two, four, backend)
        check_clipping(four, backend)
        check_resuming(two, four, folder / backend, backend)
    for backend in runs if amount == "all" else runs[:1]:
        check_placements(two, four, backend)
    if amount == "all":
        check_at_random(two, four, runs[0])
    check_work(two, four, runs[0])
    check_overlap(four, runs[0])
    check_stacks_stay(four, runs[0])
    check_refusals(four)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    # Without the interpreter's teardown, amid which one of gloo's threads may drop a tensor, ask for the interpreter's
    # lock and abort the process (pytorch#38228, pytorch#190489).
    sys.stdout.flush()
    os._exit(0)
