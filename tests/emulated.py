"""The CUDA kernels on the CPU, compiled from their own source, against the reference. `test_cuda.py` runs this file.

The native module launches them as on a GPU, through a stand-in for NVIDIA's driver that FUSEDOPT_CUDA_DRIVER names. It
is loaded once, so these tests need a process of their own.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, pairwise, values
from test_codecs import any_bits, hard_to_round
from torch import Tensor
from updates import (
    LAID,
    STORED,
    assert_near_codes,
    at_step,
    buffered,
    case_of,
    hard_to_quantize,
    name_of,
    parts,
    updates,
)

from fusedopt._clip import TREE, _halved, _tree_sums, clip_coefficient, grad_norm
from fusedopt._state import NARROW, new_master
from fusedopt.backends import Eager, Update, native
from fusedopt.binding import RULES
from fusedopt.codecs import (
    BLOCK,
    MASTERS,
    SIGNED,
    STATE_DTYPES,
    UNSIGNED,
    Codes,
    DynamicMap,
    Key,
    decode,
)
from fusedopt.kernels.tables import launches_of

DRIVER = ctypes.CDLL(os.environ["FUSEDOPT_CUDA_DRIVER"])
for name in ("emulated_launches", "emulated_wide_reads"):
    getattr(DRIVER, name).restype = ctypes.c_longlong
pytestmark = pytest.mark.usefixtures("one_thread")

FORM = ("param", "grad", "states", "master", "stochastic", "aligned", "dims", "zero_grad")


def launch_of(launch: Any, name: str, **changes: Any) -> Any:
    """The native module's form of a launch."""
    table, scalars = launch.table.cast("q").tolist(), launch.scalars.cast("d").tolist()
    form = dict(zip(FORM, launch.form))
    form["states"] = list(form["states"])
    given = {**form, "device": 0, "rule": native().rule_number(name), "table": table, "scalars": scalars}
    return native().make_launch(**{**given, **changes})


def step(
    updates: Sequence[Update], by_address: bool = False, factor: float = 1.0, skip: float = 0.0, **changes: Any
) -> int:
    """Steps them on the emulated GPU, and returns the number of launches."""
    control = torch.tensor([factor, skip], dtype=torch.float64)
    # Gradients in memory of their own last until the launch.
    updates = [replace(update, grad=update.grad.resolve_conj().resolve_neg()) for update in updates]
    launches = launches_of(updates)
    for made, rule in launches:
        launch = launch_of(made, rule.name, **changes)
        table, scalars = (torch.frombuffer(bytearray(given), dtype=torch.uint8) for given in (made.table, made.scalars))
        addresses = (table.data_ptr(), scalars.data_ptr()) if by_address else (0, 0)
        native().cuda_prepare(launch)
        native().cuda_step(launch, 0, control.data_ptr(), *addresses)
    return len(launches)


# --- against the reference ---


def check(case: dict[str, Any]) -> None:
    ours, theirs = updates(case), updates(case)
    for number in range(2):
        now = at_step(ours, number, case)
        grads = [update.grad.clone() for update in now]
        step(now, by_address=number == 1)
        for update, grad in zip(now, grads):
            assert_same_bits(update.grad, grad, "gradient")
        for update in at_step(theirs, number, case):
            Eager.step(update)
    is_double = case["param"] in (torch.float64, torch.complex128)
    compare = assert_near_codes if is_double else assert_same_bits
    for update, expected in zip(ours, theirs):
        for (name, found), reference in zip(parts(update).items(), parts(expected).values()):
            compare(found, reference, f"{name} {list(update.param.shape)}")


@pytest.mark.parametrize("row", pairwise(**STORED, **LAID), ids=name_of)
def test_same_bits_as_the_reference(row: dict[str, Any]) -> None:
    check(case_of(row))


@pytest.mark.slow
@pytest.mark.parametrize("narrow", STORED["narrow"], ids=str)
@pytest.mark.parametrize("state", STATE_DTYPES)
@pytest.mark.parametrize("param", STORED["param"], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_and_format(rule: str, param: torch.dtype, state: str | None, narrow: tuple[Any, ...]) -> None:
    if narrow != (None, "nearest") and param not in NARROW:
        pytest.skip("only parameters of 16 bits have these")
    check(case_of({"rule": rule, "param": param, "state": state, "narrow": narrow}))


# --- codecs ---


def step_both(make: Callable[[], Update]) -> tuple[Update, Update]:
    """The same update by the kernel and by the reference."""
    ours, theirs = make(), make()
    step([ours])
    Eager.step(theirs)
    return ours, theirs


def assert_same_parts(ours: Update, theirs: Update, what: str = "") -> None:
    for (name, found), expected in zip(parts(ours).items(), parts(theirs).values()):
        assert_same_bits(found, expected, f"{name} {what}")


maps = pytest.mark.parametrize("map", [SIGNED, UNSIGNED], ids=["signed", "unsigned"])


@maps
def test_every_code(map: DynamicMap) -> None:
    """What each code means, and what numbers at and beside every magnitude and every middle of two become."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    assert_same_parts(*step_both(buffered(torch.zeros(256), map, codes)))
    x = hard_to_quantize(map)
    for factor in (1.0, -1.0, 0.7, 1.3e-38, 3e38, 1e-20):
        assert_same_parts(*step_both(buffered(x * factor, map)), f"at {factor}")


@maps
def test_blocks_that_hold_no_numbers(map: DynamicMap) -> None:
    """NaN or infinity costs its block and no other; a block of subnormals is zero; the last block is shorter."""
    x = values((8 * BLOCK + 40,), 1).abs()
    x[5], x[BLOCK + 9], x[2 * BLOCK], x[8 * BLOCK + 39] = torch.nan, torch.inf, -torch.inf, torch.nan
    x[3 * BLOCK : 4 * BLOCK] = 1e-39
    x[4 * BLOCK : 5 * BLOCK] = 0
    ours, theirs = step_both(buffered(x, map))
    assert_same_parts(ours, theirs)
    (state,) = ours.states
    assert isinstance(state, Codes)
    assert state.scale.isnan().nonzero().flatten().tolist() == [0, 1, 2, 8]


def test_what_lies_beyond_a_tensor_is_no_part_of_its_last_block() -> None:
    """The rule makes of nothing, with eps = 2, more than there is."""

    def make() -> Update:
        state = Codes(torch.zeros(300, dtype=torch.uint8), torch.zeros(2), UNSIGNED)
        states = [torch.zeros(300), state]
        return Update(RULES["adamax"], torch.ones(300), torch.full((300,), 1e-3), states, (0.0, 0.1, 0.9, 0.01, 2.0))

    assert_same_parts(*step_both(make))


@pytest.mark.parametrize(
    ("dtype", "master"),
    [*((torch.bfloat16, master) for master in MASTERS), (torch.float16, None), (torch.float16, "float32")],
    ids=str,
)
@pytest.mark.parametrize("key", [None, Key(0x9ABCDEF0, 0xFEDCBA98)], ids=["nearest", "stochastic"])
def test_rounding(dtype: torch.dtype, master: str | None, key: Key | None) -> None:
    """Numbers at and beside values and middles of two, and any others, written to parameters by `p = 0 - 1 * -x`."""
    extreme = torch.tensor([0x7FFFFFFF, -1, *[0x7F7F8001, 0x7F7FFF81] * 30], dtype=torch.int64).to(torch.int32)
    x = torch.cat([hard_to_round(dtype)[::17], any_bits(1 << 13, 5), extreme.view(torch.float32)])

    def make() -> Update:
        low = MASTERS[master]
        param = torch.zeros(x.shape, dtype=dtype)
        return Update(RULES["sgd"], param, -x, [], (0.0, 1.0), master=low and new_master(param, low), key=key)

    assert_same_parts(*step_both(make))


# --- the launch ---


def adam(numel: int, seed: int = 0, dtype: torch.dtype = torch.float32, state: torch.dtype = torch.float32) -> Update:
    first = [values((numel,), number, seed).abs().to(state) for number in (3, 4)]
    scalars = (0.01, 0.9, 0.1, 0.2, 0.03 + seed, 1e-8)
    param, grad = (values((numel,), number, seed, dtype=dtype) for number in (1, 2))
    return Update(RULES["adam"], param, grad, list(first), scalars)


@pytest.mark.parametrize("by_address", [False, True], ids=["by value", "by address"])
@pytest.mark.parametrize("sizes", [(1,), (255, 256, 257), (2047, 2048, 2049, 4096, 1), (5,) * 100])
def test_many_tensors_in_one_launch(sizes: tuple[int, ...], by_address: bool) -> None:
    ours, theirs = ([adam(size, seed) for seed, size in enumerate(sizes)] for _ in range(2))
    before = DRIVER.emulated_launches()
    assert step(ours, by_address) == DRIVER.emulated_launches() - before == 1
    for update, expected in zip(ours, theirs):
        Eager.step(expected)
        assert_same_parts(update, expected)


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_the_factor_of_the_gradient(factor: float) -> None:
    """The product with the gradient's scale is rounded once."""
    ours, theirs = (replace(adam(700), grad_scale=0.7) for _ in range(2))
    step([ours], factor=factor)
    Eager.step(replace(theirs, grad_scale=0.7 * factor))
    assert_same_parts(ours, theirs)


@pytest.mark.parametrize("numel", [700, 4096])
def test_a_step_that_is_skipped(numel: int) -> None:
    ours, before = adam(numel), adam(numel)
    step([ours], skip=1.0, zero_grad=True)
    assert_same_parts(ours, before)
    assert_same_bits(ours.grad, before.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("numel", [700, 4096])
def test_gradients_that_are_zeroed(numel: int, dtype: torch.dtype) -> None:
    ours, theirs = adam(numel, dtype=dtype), adam(numel, dtype=dtype)
    step([ours], zero_grad=True)
    Eager.step(theirs)
    compare = assert_near_codes if dtype == torch.float64 else assert_same_bits
    for (name, found), reference in zip(parts(ours).items(), parts(theirs).values()):
        compare(found, reference, name)
    assert not ours.grad.any()


@pytest.mark.parametrize(
    ("dtype", "state"),
    [*((dtype, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_whole_parts_are_read_16_bytes_at_a_time(dtype: torch.dtype, state: torch.dtype) -> None:
    """All that is read of tensors of 2048 elements, and nothing of unaligned ones."""
    update = adam(2048, dtype=dtype, state=state)
    before = DRIVER.emulated_wide_reads()
    step([update])
    tensors = [update.param, update.grad, *update.states]
    assert (DRIVER.emulated_wide_reads() - before) * 16 == sum(tensor.nbytes for tensor in tensors)
    before = DRIVER.emulated_wide_reads()
    step([adam(255, dtype=dtype, state=state)])
    assert DRIVER.emulated_wide_reads() == before


def test_8_bit_codes_are_read_16_bytes_at_a_time() -> None:
    update = buffered(values((2048,), 1), SIGNED)()
    before = DRIVER.emulated_wide_reads()
    step([update])
    assert (DRIVER.emulated_wide_reads() - before) * 16 == 2048 * (4 + 4 + 1)


def test_random_words_of_large_tensors() -> None:
    """A tensor of which only the last tile is there: its row says that tiles before it have been taken."""
    start = 2**33 + 2**32 - 2048
    key = Key(0x9ABCDEF0, 0xFEDCBA98)
    x = values((4096,), 1)
    update = Update(RULES["sgd"], torch.zeros(4096, dtype=torch.bfloat16), -x, [], (0.0, 1.0), key=key)
    made = launches_of([update])[0][0]
    table = made.table.cast("q").tolist()
    table[0], table[3] = start + 4096, -(start // 2048)
    table[4] -= 2 * start
    table[5] -= 4 * start
    launch = launch_of(made, "sgd", table=table)
    control = torch.tensor([1.0, 0.0], dtype=torch.float64)
    native().cuda_step(launch, 0, control.data_ptr())
    for half, upper in enumerate((start >> 32, (start >> 32) + 1)):
        moved = Key((key.first + upper * 0x9E3779B9 + (start + 2048 * half)) % 2**32, key.second)
        part = slice(2048 * half, 2048 * (half + 1))
        expected = Update(RULES["sgd"], torch.zeros(2048, dtype=torch.bfloat16), -x[part], [], (0.0, 1.0), key=moved)
        Eager.step(expected)
        assert_same_bits(update.param[part], expected.param)


# --- the norm ---

GRADS: list[list[tuple[int, torch.dtype]]] = [
    [],
    [(1, torch.float32)],
    [(1024, torch.float32), (1025, torch.bfloat16), (2048, torch.float32), (3, torch.float16), (5000, torch.float64)],
    [(10 * 1024, torch.bfloat16), *[(7, torch.bfloat16)] * 1020],
    [(1024 * 1024 + 1, torch.float32), (100, torch.float16)],
]


@pytest.mark.parametrize("by_address", [False, True], ids=["by value", "by address"])
@pytest.mark.parametrize("grads", GRADS, ids=lambda grads: str(sum(size for size, _ in grads)))
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "unaligned"])
def test_norm(grads: list[tuple[int, torch.dtype]], by_address: bool, offset: int) -> None:
    made = [values((size + offset,), 5, index, dtype=dtype)[offset:] for index, (size, dtype) in enumerate(grads)]
    control = torch.tensor([0.3, 1.0], dtype=torch.float64)
    norm, clipped, sums = take_norm(made, control, 0.5, by_address)
    expected = grad_norm(made, 0.3)
    assert_same_bits(norm, expected)
    # The norm alone hardly depends on the order in which a tree is summed.
    level = torch.cat([torch.zeros(0), *(_tree_sums(decode(grad, torch.float32) * 0.3) for grad in made)])
    assert_same_bits(sums[: len(level)], level, "sums")
    if len(level) > TREE:
        assert_same_bits(sums[len(level) :], _halved(level), "sums of sums")
    assert clipped.tolist() == [0.3 * clip_coefficient(float(expected), 0.5), 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_whole_trees_are_read_16_bytes_at_a_time(dtype: torch.dtype) -> None:
    grad = values((2048,), 1, dtype=dtype)
    before = DRIVER.emulated_wide_reads()
    take_norm([grad], torch.tensor([1.0, 0.0], dtype=torch.float64), 0.5, False)
    assert (DRIVER.emulated_wide_reads() - before) * 16 == grad.nbytes


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_norm_that_is_no_number(bad: float) -> None:
    grad = values((2000,), 1)
    grad[1500] = bad
    norm, clipped, _ = take_norm([grad], torch.tensor([1.0, 0.0], dtype=torch.float64), 0.5, False)
    assert_same_bits(norm, torch.tensor(bad))
    assert_same_bits(clipped[0], torch.tensor(clip_coefficient(bad, 0.5), dtype=torch.float64))


def take_norm(grads: Sequence[Tensor], control: Tensor, max_norm: float, by_address: bool) -> tuple[Tensor, ...]:
    """Launches as the native module plans them, one for each dtype: the norm, the control it leads to, and the sums."""
    storage = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    rows: dict[torch.dtype, list[int]] = {}
    trees: dict[torch.dtype, int] = {}
    total = 0
    for grad in grads:
        own = -(-grad.numel() // TREE)
        first = trees.get(grad.dtype, 0)
        rows.setdefault(grad.dtype, []).extend([grad.numel(), first, grad.data_ptr(), total])
        trees[grad.dtype] = first + own
        total += own
    aligned = all(grad.data_ptr() % 16 == 0 for grad in grads)
    launches = [
        native().make_norm_launch(device=0, grad=storage[dtype], aligned=aligned, table=table, trees=trees[dtype])
        for dtype, table in rows.items()
    ]
    sums = torch.full((native().cuda_norm_sums(total) + 1,), 7.0)
    tables = torch.tensor([word for table in rows.values() for word in table], dtype=torch.int64)
    norm, clipped = torch.full((), torch.nan), torch.zeros(2, dtype=torch.float64)
    native().cuda_prepare_norm(0)
    address = tables.data_ptr() if by_address else 0
    native().cuda_norm(
        launches, 0, 0, control.data_ptr(), max_norm, sums.data_ptr(), address, clipped.data_ptr(), norm.data_ptr()
    )
    assert sums[-1] == 7, "more sums were written than there is room for"
    return norm, clipped, sums[:-1]


# --- refusals ---


def test_what_does_not_go_by_value_is_refused() -> None:
    room = native().cuda_argument_limit(0)
    updates = [adam(5) for _ in range(room // 88 + 1)]
    with pytest.raises(RuntimeError, match="pass the address of a copy on the device"):
        step(updates)
    expected = adam(5)
    Eager.step(expected)
    step(updates, by_address=True)
    assert_same_parts(updates[-1], expected)
    fitting = [adam(5) for _ in range((room - 56) // 88)]
    step(fitting)
    assert_same_parts(fitting[-1], expected)


def test_errors_are_said() -> None:
    made, rule = launches_of([adam(5)])[0]
    with pytest.raises(RuntimeError, match="cuDeviceGet: invalid argument"):
        native().cuda_prepare(launch_of(made, rule.name, device=7))
    with pytest.raises(ValueError, match="rows of another width"):
        launch_of(made, rule.name, table=[1, 2, 3])
    number = native().add_rule("own", 2, 6, 1, 1)
    with pytest.raises(RuntimeError, match=r"'own' is a user's own.*triton"):
        native().cuda_prepare(launch_of(made, rule.name, rule=number))


def test_whether_it_runs_is_known() -> None:
    reason = native().cuda_unavailable(0)
    if native().cuda_toolkit():
        assert reason == ""
        assert "cuDeviceGet: invalid argument" in native().cuda_unavailable(7)
    else:
        assert "built without CUDA kernels" in reason
