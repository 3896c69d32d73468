"""`patch`: it computes the same, leaves no trace, and what works on a model goes on working."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_same_bits, values
from patched import DTYPES, Block, assert_agrees, assert_same, blocks, results
from torch import Tensor, nn

import fusedopt


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees(dtype: torch.dtype) -> None:
    assert_agrees(blocks().to(dtype), values((3, 5, 24), 1, dtype=dtype))


# --- the way back ---


def test_unpatch() -> None:
    model, x = blocks(), values((3, 24), 1)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    classes = [type(module) for module in model.modules()]
    params, keys, expected = list(model.parameters()), list(model.state_dict()), results(model, x)
    handle = fusedopt.patch(model)
    assert list(model.state_dict()) == keys and [type(module) for module in model.modules()] == classes
    assert all(a is b for a, b in zip(model.parameters(), params, strict=True))
    handle.unpatch()
    handle.unpatch()
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
        assert all(vars(module)[key] is value for key, value in before[name].items())
    assert_same(results(model, x), expected)


def test_context_manager() -> None:
    model = blocks()
    with pytest.raises(KeyError), fusedopt.patch(model) as handle:
        assert len(handle.report.patched) == 5 and "forward" in vars(model[0].norm)
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())


def test_twice() -> None:
    """The second handle has nothing of the first's to undo."""
    model = blocks()
    inner = fusedopt.patch(model[0])
    outer = fusedopt.patch(model)
    assert [entry.name for entry in outer.report.patched] == ["1.norm", "1.mlp", "2"]
    assert Counter(entry.reason for entry in outer.report.left) == {"already patched": 2}
    outer.unpatch()
    assert "forward" in vars(model[0].norm) and "forward" not in vars(model[1].norm)
    inner.unpatch()
    assert "forward" not in vars(model[0].norm)


def test_unpatch_after_changes() -> None:
    """A module taken out is restored, and so is a copy put in, as PEFT's modules_to_save does."""
    model = blocks()
    handle = fusedopt.patch(model)
    removed, copied = model[2], copy.deepcopy(model[1].norm)
    del model[2]
    model.append(copied)
    handle.unpatch()
    assert not any("forward" in vars(module) for module in [removed, *model.modules()])


def test_unpatch_refuses() -> None:
    model = blocks()
    handle = fusedopt.patch(model)
    ours = model[1].norm.forward
    model[1].norm.forward = functools.partial(ours)
    with pytest.raises(RuntimeError, match="forward of a Norm has been replaced since, by functools.partial"):
        handle.unpatch()
    assert "forward" in vars(model[0].norm)
    model[1].norm.forward = ours
    copied = copy.deepcopy(model[0].norm)
    copied.old_forward, copied.forward = copied.forward, functools.partial(copied.forward)
    model.append(copied)
    with pytest.raises(RuntimeError, match="undo that first"):
        handle.unpatch()
    copied.forward = copied.old_forward
    del copied.old_forward
    handle.unpatch()
    assert not any("forward" in vars(module) for module in model.modules())


# --- what goes on working ---


def test_hooks() -> None:
    model, x, calls = blocks(), values((3, 24), 1), Counter[str]()
    for name in ("0.norm", "0.mlp", "0.mlp.w1", "0.mlp.w2"):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda module, inputs, name=name: calls.update([name + " before"]))
        module.register_forward_hook(lambda module, inputs, output, name=name: calls.update([name + " after"]))
        module.register_full_backward_hook(lambda module, grads, inputs, name=name: calls.update([name + " back"]))
    results(model, x)
    expected = calls.copy()
    fusedopt.patch(model)
    results(model, x)
    assert len(expected) == 12 and calls == Counter({name: 2 * count for name, count in expected.items()})


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved])
def test_copies(copied: Callable[[nn.Module], Any]) -> None:
    """A copy is patched, with parameters of its own, and unpatching the model leaves it so."""
    model, x = blocks(), values((3, 24), 1)
    handle = fusedopt.patch(model)
    expected = results(model, x)
    twin = copied(model)
    handle.unpatch()
    assert {entry.reason for entry in fusedopt.patch(twin).report.left} == {"already patched"}
    assert_same(results(twin, x), expected)
    with torch.no_grad():
        twin[0].norm.weight.mul_(2)
        model[0].norm.weight.zero_()
    assert not torch.equal(results(twin, x)["output"], expected["output"])
    assert_same(results(copied(twin), x), results(twin, x))


def test_meta_device() -> None:
    """A model patched before it has memory computes as one patched after."""
    expected = blocks()
    fusedopt.patch(expected)
    with torch.device("meta"):
        model = nn.Sequential(Block(), Block(), nn.RMSNorm(24))
    report = fusedopt.patch(model).report
    assert len(report.patched) == 5 and model(torch.empty(3, 24, device="meta")).shape == (3, 24)
    model.to_empty(device="cpu").load_state_dict(expected.state_dict())
    assert_same(results(model, values((3, 24), 1)), results(expected, values((3, 24), 1)))


def test_moved() -> None:
    """Cast, after it was patched; and attributes are read when called."""
    model, x = blocks(), values((3, 24), 1)
    fusedopt.patch(model)
    expected = blocks().bfloat16()
    expected[0].norm.variance_epsilon = 0.5
    fusedopt.patch(expected)
    model.bfloat16()
    model[0].norm.variance_epsilon = 0.5
    assert_same(results(model, x.bfloat16()), results(expected, x.bfloat16()))
    with torch.no_grad():
        model[0].norm.weight = nn.Parameter(torch.zeros(24, dtype=torch.bfloat16))
    assert not model[0].norm(x.bfloat16()).any()


def test_autocast() -> None:
    model, x = blocks(), values((3, 24), 1)
    with torch.autocast("cpu", torch.bfloat16):
        dtypes = {name: value.dtype for name, value in results(model, x).items()}
        fusedopt.patch(model)
        assert {name: value.dtype for name, value in results(model, x).items()} == dtypes


def test_compile() -> None:
    """One graph, and one more after the way back."""
    model, x = blocks(), values((3, 24), 1)
    # Compiled as well: older releases of torch then compute nn.RMSNorm's gradients in another order.
    plain = results(torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager"), x)
    handle = fusedopt.patch(model)
    eager = results(model, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name, value in results(compiled, x).items():
        torch.testing.assert_close(value, eager[name.removeprefix("_orig_mod.")])
    handle.unpatch()
    assert_same(results(compiled, x), plain)


def test_checkpointing() -> None:
    model, x = blocks(), values((3, 24), 1)
    fusedopt.patch(model)
    expected = results(model, x)
    plain = model[1].forward
    model[1].forward = lambda x: torch.utils.checkpoint.checkpoint(plain, x, use_reentrant=False)
    assert_same(results(model, x), expected)


class LoRA(nn.Module):
    """An adapter around a projection, as PEFT's: other arguments pass through, the base is a module in it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_a, self.lora_b = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.base_layer(x, *args, **kwargs) + self.lora_b(self.lora_a(x))


@pytest.mark.parametrize("patch_first", [False, True])
def test_adapters(patch_first: bool) -> None:
    torch.manual_seed(0)
    model, x = blocks(), values((3, 24), 1)
    if patch_first:
        fusedopt.patch(model)
    model[0].mlp.w1 = LoRA(model[0].mlp.w1)
    model[0].mlp.w2 = LoRA(model[0].mlp.w2)
    if not patch_first:
        assert len(fusedopt.patch(model).report.patched) == 5
    expected = copy.deepcopy(model)
    for module in expected.modules():
        vars(module).pop("forward", None)
    found, plain = results(model, x), results(expected, x)
    assert found.keys() == plain.keys() and "0.mlp.w1.lora_a.weight" in found
    for name, value in found.items():
        torch.testing.assert_close(value, plain[name])


def test_keyword() -> None:
    model, x = blocks(), values((3, 24), 1)
    fusedopt.patch(model)
    assert_same_bits(model[0].norm(hidden_states=x), model[0].norm(x))
    assert_same_bits(model[0].mlp(x=x), model[0].mlp(x))


def test_mixed_dtypes() -> None:
    """A weight of float32, and a gate of another dtype than `up`, promote as in eager operations."""
    model, x = blocks(), values((3, 24), 1)
    model[0].mlp.w3.bfloat16()
    model[0].mlp.w3.register_forward_pre_hook(lambda module, inputs: (inputs[0].bfloat16(),))
    expected = model[0].norm(x.bfloat16()), model[0].mlp(x)
    fusedopt.patch(model)
    assert [value.dtype for value in expected] == [torch.float32] * 2
    torch.testing.assert_close((model[0].norm(x.bfloat16()), model[0].mlp(x)), expected)
