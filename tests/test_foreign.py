"""bitsandbytes' and torchao's optimizers, taken over amid training or from a checkpoint."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, make_parameters
from steps import assert_near, assert_untouched, parameters_of, snapshot, train
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt import _foreign
from fusedopt._state import converted, dtype_of
from fusedopt.codecs import SIGNED, Codes, dequantize, map_of
from fusedopt.optim import OPTIMIZERS

bnb = pytest.importorskip("bitsandbytes")
ao = pytest.importorskip("torchao.optim")

# Of two blocks and more with a part of one, of fewer elements than are quantized, and of whole blocks.
SHAPES = ((65, 64), (33,), (16, 256))

ADAM = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 0.01, "weight_decay": 0.3}
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Adam": (ADAM, {**ADAM, "amsgrad": False, "decoupled_weight_decay": True}),
    "AdamW": (ADAM, {**ADAM, "amsgrad": False, "decoupled_weight_decay": True}),
    "AdEMAMix": (
        {
            "lr": 0.03,
            "betas": (0.7, 0.9, 0.99),
            "alpha": 3.0,
            "eps": 0.02,
            "weight_decay": 0.2,
            "t_alpha": 6,
            "t_beta3": 7,
        },
        {"betas": (0.7, 0.9, 0.99), "alpha": 3.0, "eps": 0.02, "t_alpha": 6, "t_beta3": 7},
    ),
    "Adagrad": ({"lr": 0.1, "eps": 0.01, "weight_decay": 0.2}, {"eps": 0.01, "lr_decay": 0}),
    "Lion": ({"lr": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.3}, {"betas": (0.8, 0.9)}),
    "RMSprop": (
        {"lr": 0.05, "alpha": 0.9, "eps": 0.01, "weight_decay": 0.2, "momentum": 0.5},
        {"alpha": 0.9, "eps": 0.01, "momentum": 0, "centered": False},
    ),
    "SGD": (
        {"lr": 0.05, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.2, "nesterov": True},
        {"momentum": 0.9, "dampening": 0, "nesterov": False},
    ),
}
"""bitsandbytes' arguments, and what becomes of them beside lr and weight_decay."""

# bitsandbytes' AdEMAMix32bit keeps one average of the two, and fails at its first step.
NAMES = {
    f"{paged}{name}{bits}": name
    for paged, name, bits in itertools.product(("", "Paged"), OPTIONS, ("", "8bit", "32bit"))
    if hasattr(bnb.optim, f"{paged}{name}{bits}") and f"{name}{bits}" != "AdEMAMix32bit"
}
IN_8_BITS = [name for name in NAMES if name.endswith("8bit")]
TORCHAO = [f"{name}{bits}" for name in ("Adam", "AdamW") for bits in ("8bit", "4bit", "Fp8")]

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")


@pytest.fixture(autouse=True)
def eager_and_without_overrides() -> Iterator[None]:
    """torchao's step without torch.compile; bitsandbytes' overrides, kept by id, forgotten."""
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.initialize()
    with torch.compiler.set_stance("force_eager"):
        yield
    manager.initialize()


def parameters() -> list[Parameter]:
    return make_parameters(SHAPES)


def theirs(name: str, steps: int = 0, **options: Any) -> Any:
    """bitsandbytes' optimizer by its class's name, after some steps."""
    optimizer = getattr(bnb.optim, name)(parameters(), **{**OPTIONS[NAMES[name]][0], **options})
    train(optimizer, range(steps))
    return optimizer


def torchaos(name: str, steps: int = 0, **options: Any) -> Any:
    optimizer = getattr(ao, name)(parameters(), **ADAM, **options)
    train(optimizer, range(steps))
    return optimizer


def translate(optimizer: Any) -> tuple[Any, _foreign.Translated]:
    name = _foreign.counterpart(optimizer)
    assert name is not None
    names = [[f"parameter {index}" for index in range(len(group["params"]))] for group in optimizer.param_groups]
    return OPTIMIZERS[name], _foreign.translate(optimizer, OPTIMIZERS[name], names)


def made_of(optimizer: Any, **options: Any) -> Any:
    """A new optimizer of fusedopt with copies of the parameters and states, stored as the options say."""
    cls, translated = translate(optimizer)
    copies = {param: Parameter(param.detach().clone()) for param in parameters_of(optimizer)}
    groups = [
        {**group, **options, "params": [copies[param] for param in group["params"]]} for group in translated.groups
    ]
    ours = cls(groups)
    for param, entries in translated.states.items():
        state = ours.state[copies[param]]
        for name, value in entries.items():
            if name in cls.states:
                dtype = dtype_of(copies[param], cls.states[name], ours.param_groups[0])
                state.update(converted(entries, name, copies[param], cls.states[name], dtype, copy=True))
            elif name in cls.counters:
                state[name] = copy.deepcopy(value)
    ours.__setstate__({})
    return ours


def read(entries: Any, name: str, kind: str) -> Tensor:
    """The numbers of a state."""
    if entries[name].dtype != torch.uint8:
        return entries[name].float()
    return dequantize(Codes(entries[name], entries[name + "_scale"], map_of(kind)))


def assert_parameters_near(ours: Any, expected: Any, steps: int) -> None:
    for mine, other in zip(parameters_of(ours), parameters_of(expected), strict=True):
        assert_near(mine, other, steps)


def assert_states_near(ours: Any, expected: Any, steps: int) -> None:
    """The float32 states are those that bitsandbytes' optimizer has."""
    for mine, other in zip(parameters_of(ours), parameters_of(expected), strict=True):
        _, translated = translate(expected)
        for name, value in translated.states[other].items():
            if name in ours.states:
                assert_near(ours.state[mine][name], value, steps, name)


# --- bitsandbytes ---


@pytest.mark.parametrize("name", NAMES)
def test_options(name: str) -> None:
    """Every class is known; options, defaults and storage are fusedopt's, and none of bitsandbytes' is left."""
    options, expected = OPTIONS[NAMES[name]]
    optimizer = theirs(name, min_8bit_size=1000)
    optimizer.param_groups[0].update(lr=0.5, initial_lr=0.25)
    cls, translated = translate(optimizer)
    assert cls.__name__ == ("AdamW" if NAMES[name] == "Adam" else NAMES[name])
    bits = "int8" if name.endswith("8bit") else "float32"
    expected = {**expected, "weight_decay": options["weight_decay"], "state_dtype": bits, "min_quantized_size": 1000}
    assert translated.defaults == {**expected, "lr": options["lr"]}
    params = optimizer.param_groups[0]["params"]
    assert translated.groups == [{**expected, "lr": 0.5, "initial_lr": 0.25, "params": params}]
    assert translated.groups[0]["params"] is params and not translated.states and not translated.state_dtypes
    assert expected.keys() - {"decoupled_weight_decay"} <= cls([Parameter(torch.ones(1))]).defaults.keys()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in IN_8_BITS])
def test_the_mathematics_goes_on(name: str) -> None:
    """In 32 bits the same tensors, and after more steps what bitsandbytes would have."""
    optimizer = theirs(name, steps=4)
    cls, translated = translate(optimizer)
    for param in parameters_of(optimizer):
        state = optimizer.state[param]
        kept = {value.untyped_storage().data_ptr() for value in state.values() if isinstance(value, Tensor)}
        tensors = {n: value for n, value in translated.states[param].items() if n in cls.states}
        assert {value.untyped_storage().data_ptr() for value in tensors.values()} == kept
        assert translated.states[param].get("step", 4) == 4
    ours = made_of(optimizer)
    train(ours, range(4, 8))
    train(optimizer, range(4, 8))
    assert_parameters_near(ours, optimizer, steps=8)
    assert_states_near(ours, optimizer, steps=8)


def stored_by_bitsandbytes(state: Any, ours: str) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Codes, scales and table of each of our states, by what is known of bitsandbytes' format."""
    first = {"SGD": "momentum_buffer", "Adagrad": "sum", "RMSprop": "square_avg"}.get(ours, "exp_avg")
    codes, scale, table = state["state1"], state["absmax1"], state["qmap1"]
    if ours == "AdEMAMix":
        found = {name: (codes[half], scale[half], table) for half, name in enumerate((first, "exp_avg_slow"))}
    else:
        found = {first: (codes, scale, table)}
    if "state2" in state:
        found["exp_avg_sq"] = (state["state2"], state["absmax2"], state["qmap2"])
    return found


@pytest.mark.parametrize("name", IN_8_BITS)
def test_codes_are_taken_bit_for_bit(name: str) -> None:
    """Where the map is ours; and what they stand for is what bitsandbytes reads, within 4 units in the last place."""
    optimizer = theirs(name, steps=3)
    cls, translated = translate(optimizer)
    for param in parameters_of(optimizer):
        entries = translated.states[param]
        if param.numel() < 4096:
            assert all(entries[state].dtype == torch.float32 for state in entries if state in cls.states)
            continue
        for state, (codes, scale, table) in stored_by_bitsandbytes(optimizer.state[param], cls.__name__).items():
            expected = bnb.functional.dequantize_blockwise(
                codes.contiguous(), absmax=scale, code=table, blocksize=256
            )
            if cls.__name__ in ("Adagrad", "RMSprop"):  # a second moment, which bitsandbytes keeps in the signed map
                assert_same_bits(entries[state], expected)
            else:
                assert_same_bits(entries[state], codes)
                assert_same_bits(entries[state + "_scale"], scale)
                # 4 units in the last place are at most 4 * 2^-23 of the number, and the product rounds once more.
                torch.testing.assert_close(
                    read(entries, state, cls.states[state]), expected, rtol=5 * 2.0**-23, atol=0
                )


@pytest.mark.parametrize("name", IN_8_BITS)
def test_the_next_step_from_8_bits(name: str) -> None:
    """One step reads the codes as bitsandbytes does, and rounds to codes only after it."""
    optimizer = theirs(name, steps=4)
    # In 8 bits but where the second moment has to be quantized anew.
    ours = made_of(optimizer, **({"state_dtype": "float32"} if NAMES[name] in ("Adagrad", "RMSprop") else {}))
    train(ours, [4])
    train(optimizer, [4])
    assert_parameters_near(ours, optimizer, steps=5)


def test_a_last_block_without_gradients() -> None:
    """Its scale is 0 too, but none is misplaced."""
    optimizer = bnb.optim.AdEMAMix8bit([Parameter(torch.ones(65, 64))])
    (param,) = parameters_of(optimizer)
    param.grad = torch.ones(65, 64)
    param.grad[-1] = 0
    optimizer.step()
    assert optimizer.state[param]["absmax1"][1, -1] == 0
    assert_same_bits(translate(optimizer)[1].states[param]["exp_avg_slow"], optimizer.state[param]["state1"][1])


def test_overrides_for_one_parameter() -> None:
    """A parameter that GlobalOptimManager keeps in 32 bits, or in 8, has a `state_dtype` of its own."""
    optimizer = theirs("AdamW8bit")
    large, small, whole = parameters_of(optimizer)
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.override_config(large, "optim_bits", 32)
    manager.override_config(small, "min_8bit_size", 1)
    manager.override_config(whole, "lr", 0.05)  # as in its group
    module = torch.nn.Module()
    module.weight = whole
    for steps in range(2):
        train(optimizer, range(steps))
        _, translated = translate(optimizer)
        assert translated.state_dtypes == {large: "float32", small: "int8"}
    assert [translated.states[param]["exp_avg"].dtype for param in (large, small)] == [torch.float32, torch.uint8]

    pending = theirs("AdamW8bit")
    module.weight = parameters_of(pending)[0]
    manager.register_module_override(module, "weight", {"optim_bits": 32})
    assert translate(pending)[1].state_dtypes == {module.weight: "float32"}


def test_a_state_counts_as_it_is() -> None:
    """Loaded from a checkpoint of 32 bits, bitsandbytes' 8-bit optimizer goes on in 32."""
    optimizer = theirs("Lion8bit")
    optimizer.load_state_dict(theirs("Lion", steps=2).state_dict())
    large, _, whole = parameters_of(optimizer)
    assert translate(optimizer)[1].state_dtypes == {large: "float32", whole: "float32"}


# --- torchao ---


@pytest.mark.parametrize("name", TORCHAO)
def test_torchao(name: str) -> None:
    """Options, codes and numbers; and the next step is torchao's."""
    optimizer = torchaos(name, steps=3)
    cls, translated = translate(optimizer)
    assert cls.__name__ == name.removesuffix("8bit").removesuffix("4bit").removesuffix("Fp8")
    storage = {"state_dtype": "int8" if name.endswith("8bit") else "float32"}
    assert translated.defaults == {**ADAM, "amsgrad": False, **storage}
    (group,) = translated.groups
    assert group["lr"] is optimizer.param_groups[0]["lr"] and group["state_dtype"] == storage["state_dtype"]
    quantized = 0
    for param, entries in translated.states.items():
        assert entries["step"] == 3
        for state in ("exp_avg", "exp_avg_sq"):
            kind, original = cls.states[state], optimizer.state[param][state]
            if type(original) is Tensor:
                assert entries[state] is original
                continue
            quantized += 1
            if name.endswith("8bit"):
                assert entries[state] is original.codes and entries[state + "_scale"] is original.scale
                torch.testing.assert_close(
                    read(entries, state, kind), original.dequantize(), rtol=5 * 2.0**-23, atol=0
                )
            else:
                assert_same_bits(entries[state], original.dequantize())
    assert quantized == 2
    # In float32, since of a tensor of 16.25 blocks torchao keeps the state so.
    ours = made_of(optimizer, state_dtype="float32")
    train(ours, [3])
    train(optimizer, [3])
    # torchao's lr is a tensor of float32, and so is its bias correction: half an epsilon more of each.
    assert_parameters_near(ours, optimizer, steps=5)


def test_torchao_of_another_block_size() -> None:
    """Is read as float32: every step quantizes anew anyway. And its stochastic rounding is ours."""
    optimizer = torchaos("AdamW8bit", steps=2, block_size=128, bf16_stochastic_round=True)
    _, translated = translate(optimizer)
    assert translated.groups[0]["rounding"] == "stochastic" == translated.defaults["rounding"]
    whole = parameters_of(optimizer)[2]
    for name in ("exp_avg", "exp_avg_sq"):
        assert_same_bits(translated.states[whole][name], optimizer.state[whole][name].dequantize())


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Two processes, of which this is the second and the other is pretended."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield torch.distributed.init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamWFp8"])
def test_torchao_of_a_distributed_parameter(name: str, mesh: Any) -> None:
    """Each shard keeps its own codes; of 33 rows this one has 16, and room for the scales of 17."""
    from torch.distributed.tensor import Shard, distribute_tensor

    param = Parameter(distribute_tensor(torch.ones(33, 256), mesh, [Shard(0)]))
    optimizer = getattr(ao, name)([param])
    param.grad = distribute_tensor(torch.randn(33, 256), mesh, [Shard(0)])
    optimizer.step()
    cls, translated = translate(optimizer)
    entries = translated.states[param]
    for state in ("exp_avg", "exp_avg_sq"):
        original = optimizer.state[param][state].to_local()
        assert entries[state].shape == (33, 256) and entries[state].placements == param.placements
        if name == "AdamW8bit":
            assert_same_bits(entries[state].to_local(), original.codes)
            assert_same_bits(entries[state + "_scale"].to_local().view(-1)[:16], original.scale)
        else:
            assert_same_bits(entries[state].to_local(), original.dequantize())


# --- what is not taken ---


class UsersAdamW(bnb.optim.AdamW):
    pass


def test_other_classes_are_not_known() -> None:
    params = parameters()
    unknown = [
        *(getattr(bnb.optim, name)(params, lr=0.1) for name in ("LAMB", "LAMB8bit", "LAMB32bit")),
        *(getattr(bnb.optim, name)(params, lr=0.1, momentum=0.9) for name in ("LARS", "LARS8bit", "LARS32bit")),
        bnb.optim.PytorchLARS(params, momentum=0.9),
        ao._AdamW(params),
        UsersAdamW(params),
        torch.optim.AdamW(params),
        fusedopt.AdamW(params),
    ]
    assert [_foreign.counterpart(optimizer) for optimizer in unknown] == [None] * len(unknown)


def override(option: str, value: Any) -> Any:
    def spoil(optimizer: Any) -> None:
        manager = bnb.optim.GlobalOptimManager.get_instance()
        manager.override_config(parameters_of(optimizer)[2], option, value)

    return spoil


def argument(option: str, value: Any) -> Any:
    return lambda optimizer: setattr(optimizer.args, option, value)


def entry(name: str, change: Any, index: int = 2) -> Any:
    """Replace an entry of the state by what `change` makes of it."""

    def spoil(optimizer: Any) -> None:
        state = optimizer.state[parameters_of(optimizer)[index]]
        state[name] = change(state.get(name))

    return spoil


def without(name: str) -> Any:
    return lambda optimizer: optimizer.state[parameters_of(optimizer)[2]].pop(name)


def misplaced_as_on_cuda(optimizer: Any) -> None:
    """The slow average's scales one place early in the stack, as for 16.25 blocks."""
    state = optimizer.state[parameters_of(optimizer)[0]]
    flat = state["absmax1"].view(-1)
    flat[16:-1] = flat[17:].clone()
    flat[-1] = 0


def five_units_more(table: Tensor, code: int) -> Tensor:
    moved = _foreign._table(SIGNED).clone()
    moved.view(torch.int32)[code] += 5
    return moved


def coarser(table: Tensor) -> Tensor:
    return torch.linspace(-1, 1, 256)


REFUSED: dict[str, tuple[str, Any, str]] = {
    "max_unorm": ("AdamW8bit", argument("max_unorm", 1.0), "parameter 0: bitsandbytes' max_unorm=1.0 .* to 0.0"),
    "skip_zeros": ("Lion", argument("skip_zeros", True), "parameter 0: bitsandbytes' skip_zeros=True .* to False"),
    "percentile_clipping": (
        "Lion",
        override("percentile_clipping", 5),
        "parameter 2: bitsandbytes' percentile_clipping=5 .* to 100",
    ),
    "whole tensors": ("SGD8bit", override("block_wise", False), "parameter 2: bitsandbytes' block_wise=False"),
    "an lr of its own": (
        "AdamW",
        override("lr", 0.5),
        "parameter 2: GlobalOptimManager gives it lr=0.5, its group has 0.05; put it in a parameter group of its own",
    ),
    "codes of another shape": (
        "AdamW8bit",
        entry("state2", lambda codes: codes.flatten()),
        r"'state2' of parameter 2 is torch.uint8 of shape \(4096,\); it must be .* of shape \(16, 256\)",
    ),
    "one average of two": (
        "AdEMAMix",
        entry("state1", lambda both: both[0]),
        r"'state1' of parameter 2 .* must be .* of shape \(2, 16, 256\)",
    ),
    "blocks of 2048": (
        "AdamW8bit",
        entry("absmax1", lambda scale: scale[:2]),
        r"'absmax1', one for each block of 256, of parameter 2 .* of shape \(2,\); it must be .* of shape \(16,\)",
    ),
    "scales in bfloat16": ("SGD8bit", entry("absmax1", Tensor.bfloat16), "'absmax1'.* of parameter 2 is .*bfloat16"),
    "no scales": ("SGD8bit", without("absmax1"), "'absmax1'.* of parameter 2 is None"),
    "another map": ("AdamW8bit", entry("qmap2", coarser), "'qmap2' of parameter 2 is not the dynamic map"),
    "the other map": (
        "AdamW8bit",
        entry("qmap1", lambda _: bnb.functional.create_dynamic_map(signed=False)),
        "'qmap1' of parameter 2 is not the dynamic map",
    ),
    "another map by 5 units": (
        "RMSprop8bit",
        entry("qmap1", lambda table: five_units_more(table, code=200)),
        "'qmap1' of parameter 2 is not the dynamic map .*code 200",
    ),
    "a map of 4 bits": ("SGD8bit", entry("qmap1", lambda table: table[:16]), r"'qmap1' of parameter 2 .* \(256,\)"),
    "one scale": ("SGD8bit", entry("max1", lambda _: torch.ones(1)), "parameter 2 has 'max1', .*block_wise"),
    "norms of gradients": (
        "Lion",
        entry("gnorm_vec", lambda _: torch.ones(100)),
        "parameter 2 has 'gnorm_vec', of bitsandbytes' percentile_clipping",
    ),
    "a state too few": ("AdamW", without("state2"), r"parameter 2 .*\['state1'\].* another optimizer than AdamW"),
    "a state too many": ("Lion", entry("state2", lambda _: 1), "parameter 2 .* another optimizer than Lion"),
    "not contiguous": (
        "Lion",
        entry("state1", lambda state: state.t().contiguous().t()),
        r"'state1' of parameter 2 has strides \(1, 16\): .* make the parameter contiguous before the first step",
    ),
    "misplaced scales": ("AdEMAMix8bit", misplaced_as_on_cuda, "'absmax1' of parameter 0: .* misplaced, .* here 4160,"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_the_parameter_and_nothing_changed(case: str) -> None:
    name, spoil, message = REFUSED[case]
    optimizer = theirs(name, steps=2)
    translate(optimizer)
    spoil(optimizer)
    before = snapshot(optimizer)
    with pytest.raises((TypeError, ValueError), match=message):
        translate(optimizer)
    assert_untouched(optimizer, before)
    with pytest.raises((TypeError, ValueError), match=re.sub(r"(parameter \d)", r"\1 of group 0", message)):
        fusedopt.swap(optimizer)
    assert_untouched(optimizer, before)


def test_torchao_refusals() -> None:
    optimizer = torchaos("AdamW8bit", steps=1)
    state = optimizer.state[parameters_of(optimizer)[2]]["exp_avg"]
    table = state.qmap
    state.qmap = coarser(table)
    with pytest.raises(ValueError, match="the map of the state 'exp_avg' of parameter 2 is not the dynamic map"):
        translate(optimizer)
    state.qmap = table
    state.scale = state.scale[:15]
    with pytest.raises(ValueError, match=r"'exp_avg' of parameter 2 has shape \(16, 256\) and 15 scales of 256"):
        translate(optimizer)
    other = Parameter(torch.ones(8, 512))
    with pytest.raises(ValueError, match=r"'exp_avg_sq' of w has shape \(16, 256\) .* parameter shape \(8, 512\)"):
        _foreign.translate_state(
            fusedopt.AdamW, {"exp_avg_sq": optimizer.state[parameters_of(optimizer)[2]]["exp_avg_sq"]}, other, "w"
        )
    with pytest.raises(ValueError, match="'exp_avg_sq' of w is torchao's; SGD has no such state"):
        _foreign.translate_state(
            fusedopt.SGD, {"exp_avg_sq": optimizer.state[parameters_of(optimizer)[2]]["exp_avg_sq"]}, other, "w"
        )


# --- checkpoints ---


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_is_as_the_running_optimizer(name: str) -> None:
    """As bitsandbytes saves it now, its tensors wrapped in an entry of their own, and as before."""
    optimizer = theirs(name, steps=2)
    cls, translated = translate(optimizer)
    wrapped = optimizer.state_dict()
    plain = torch.optim.Optimizer.state_dict(optimizer)
    assert wrapped["state"][0].keys() != plain["state"][0].keys()
    for saved in (wrapped, plain):
        group = _foreign.translate_group(cls, saved["param_groups"][0])
        assert {option: group[option] for option in OPTIONS[NAMES[name]][1]} == OPTIONS[NAMES[name]][1]
        assert group["params"] == [0, 1, 2] and group.keys() <= translated.groups[0].keys()
        for index, param in enumerate(parameters_of(optimizer)):
            state = _foreign.translate_state(cls, saved["state"][index], param, "it")
            assert list(state) == list(translated.states[param])
            for entry in state:
                assert_same_bits(torch.as_tensor(state[entry]), torch.as_tensor(translated.states[param][entry]))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_checkpoint_of_ours_or_of_torch_is_left_alone(name: str) -> None:
    cls = OPTIMIZERS[name]
    for make in filter(None, (cls, cls.torch_class)):
        optimizer = make(parameters())
        train(optimizer, range(2))
        saved = optimizer.state_dict()
        assert _foreign.translate_group(cls, saved["param_groups"][0]) == saved["param_groups"][0]
        assert all(
            _foreign.translate_state(cls, state, param, "it") is state
            for state, param in zip(saved["state"].values(), parameters())
        )


# --- through the front door ---


def assert_same_entries(ours: Any, made: Any) -> None:
    for mine, other in zip(parameters_of(ours), parameters_of(made), strict=True):
        assert_same_bits(mine, other)
        assert set(ours.state[mine]) == set(made.state[other])
        for name, value in ours.state[mine].items():
            assert_same_bits(value, made.state[other][name], name)


ALL = [(theirs, name) for name in NAMES] + [(torchaos, name) for name in TORCHAO]


@pytest.mark.parametrize(("make", "name"), ALL, ids=lambda value: getattr(value, "__name__", value))
def test_swapping_amid_training(make: Any, name: str) -> None:
    """The same object with the same parameters goes on as one made of the translation."""
    optimizer = make(name, steps=3)
    made = made_of(optimizer)
    groups, params = optimizer.param_groups, parameters_of(optimizer)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    assert fusedopt.swap(optimizer) is optimizer
    assert type(optimizer) is type(made) and optimizer.param_groups is groups
    assert all(a is b for a, b in zip(parameters_of(optimizer), params, strict=True))
    assert optimizer.defaults.keys() == made.defaults.keys()
    assert groups[0].keys() == made.param_groups[0].keys() | {"initial_lr"}
    assert_same_entries(optimizer, made)
    train(optimizer, range(3, 5))
    train(made, range(3, 5))
    assert_same_entries(optimizer, made)
    lr = float(groups[0]["lr"])
    scheduler.step()
    assert float(groups[0]["lr"]) == lr / 2
    copy.deepcopy(optimizer).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("state_dtype", ["int8", "float32", "bfloat16"])
@pytest.mark.parametrize(("make", "name"), [(theirs, "AdamW8bit"), (theirs, "RMSprop8bit"), (torchaos, "Adam4bit")])
def test_swapping_to_another_format(make: Any, name: str, state_dtype: Any) -> None:
    optimizer = make(name, steps=3)
    made = made_of(optimizer, state_dtype=state_dtype)
    fusedopt.swap(optimizer, state_dtype=state_dtype)
    assert_same_entries(optimizer, made)
    train(optimizer, [3])
    train(made, [3])
    assert_same_entries(optimizer, made)


@pytest.mark.parametrize(("make", "name"), ALL, ids=lambda value: getattr(value, "__name__", value))
def test_swapping_before_the_first_step(make: Any, name: str) -> None:
    optimizer, made = make(name), made_of(make(name))
    fusedopt.swap(optimizer)
    train(optimizer, range(2))
    train(made, range(2))
    assert_same_entries(optimizer, made)


def test_swapping_with_overrides() -> None:
    """What bitsandbytes' GlobalOptimManager keeps in 32 bits stays so."""
    optimizer = theirs("AdamW8bit")
    manager = bnb.optim.GlobalOptimManager.get_instance()
    manager.override_config(parameters_of(optimizer)[0], "optim_bits", 32)
    train(optimizer, range(2))
    fusedopt.swap(optimizer)
    train(optimizer, range(2, 4))
    dtypes = [optimizer.state[param]["exp_avg"].dtype for param in parameters_of(optimizer)]
    assert dtypes == [torch.float32, torch.float32, torch.uint8]


@pytest.mark.parametrize(("make", "name"), ALL, ids=lambda value: getattr(value, "__name__", value))
def test_loading_a_checkpoint(make: Any, name: str) -> None:
    """With other options, it goes on as the swapped optimizer does."""
    optimizer = make(name, steps=3)
    cls, translated = translate(optimizer)
    ours = cls(copy.deepcopy(parameters_of(optimizer)), lr=0.5, state_dtype=translated.defaults["state_dtype"])
    ours.load_state_dict(optimizer.state_dict())
    made = made_of(optimizer)
    assert_same_entries(ours, made)
    train(ours, range(3, 5))
    train(made, range(3, 5))
    assert_same_entries(ours, made)


def test_a_checkpoint_is_refused_by_the_parameter_and_nothing_changed() -> None:
    saved = theirs("AdamW8bit", steps=2).state_dict()
    saved["state"][2][_foreign._WRAPPED]["absmax1"] = torch.ones(2)
    ours = fusedopt.AdamW(zip("abc", parameters()), state_dtype="int8")
    train(ours, range(2))
    before = snapshot(ours)
    with pytest.raises(ValueError, match="'absmax1', one for each block of 256, of parameter 'c'"):
        ours.load_state_dict(saved)
    assert_untouched(ours, before)
