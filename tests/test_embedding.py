"""StableEmbedding, and the classes whose name says 8 bits."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.nn import functional

import fusedopt
from fusedopt.optim import OPTIMIZERS

NAMES = ["SGD", "Adagrad", "RMSprop", "Lion", "Adam", "AdamW", "AdEMAMix"]


def grown(embedding: fusedopt.StableEmbedding, state_dtype: str = "int8") -> dict[str, torch.Tensor]:
    """The weight's state after a step."""
    optimizer = fusedopt.AdamW(embedding.parameters(), state_dtype=state_dtype)
    embedding(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    return optimizer.state[embedding.weight]


def test_forward() -> None:
    """The lookup, and then a layer norm."""
    embedding = fusedopt.StableEmbedding(50, 16, padding_idx=3)
    torch.nn.init.normal_(embedding.norm.weight)
    index = torch.tensor([[4, 3], [7, 7]])
    expected = functional.layer_norm(embedding.weight[index], (16,), embedding.norm.weight, embedding.norm.bias)
    torch.testing.assert_close(embedding(index), expected, rtol=0, atol=0)
    assert set(embedding.state_dict()) == {"weight", "norm.weight", "norm.bias"}


def test_initial_values() -> None:
    """Uniform within sqrt(6 / (rows + columns)), the padding row zero."""
    embedding = fusedopt.StableEmbedding(4000, 96, padding_idx=3)
    weight, bound = embedding.weight.detach(), (6 / 4096) ** 0.5
    assert not weight[3].any()
    assert 0.99 * bound < weight.abs().max() <= bound
    # The standard deviation of a uniform distribution is bound / sqrt(3); of 384 000 values its error is about 0.1 %.
    assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.01)


def test_narrow_weights_are_normalized_in_float32() -> None:
    embedding = fusedopt.StableEmbedding(50, 16, dtype=torch.bfloat16)
    assert embedding.norm.weight.dtype == torch.float32
    index = torch.arange(50)
    expected = functional.layer_norm(embedding.weight.float(), (16,)).bfloat16()
    torch.testing.assert_close(embedding(index), expected, rtol=0, atol=0)


def remade(embedding: Any) -> Any:
    """On another device, and so with another parameter."""
    return embedding.to("meta").to_empty(device="cpu")


@pytest.mark.parametrize(
    "copied",
    [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x)), lambda x: x.double(), remade],
    ids=["itself", "deepcopy", "pickle", "double", "remade"],
)
def test_state_stays_float32(copied: Any) -> None:
    """Also where a copy of the module lost what was said of its parameter; other parameters are quantized."""
    embedding = copied(fusedopt.StableEmbedding(5000, 16))
    assert {name: state.dtype for name, state in grown(embedding).items()} == {
        "step": torch.float32,
        "exp_avg": torch.float32,
        "exp_avg_sq": torch.float32,
    }
    assert grown(torch.nn.Embedding(5000, 16))["exp_avg"].dtype == torch.uint8  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    """`X8bit` is X with state_dtype="int8" by default, in its groups and its checkpoints."""
    param = torch.nn.Parameter(torch.ones(5000))
    cls: Any = getattr(fusedopt, f"{name}8bit")
    base = OPTIMIZERS[name]
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = cls([param], **options)
    assert isinstance(optimizer, base)
    assert optimizer.defaults == {**base([param], **options).defaults, "state_dtype": "int8"}
    param.grad = torch.ones(5000)
    optimizer.step()
    quantized = {name for name, state in optimizer.state[param].items() if state.dtype == torch.uint8}
    assert quantized and quantized <= set(cls.states)
    assert cls([param], **options, state_dtype="float32").param_groups[0]["state_dtype"] == "float32"

    restored = pickle.loads(pickle.dumps(optimizer))
    assert type(restored) is cls and restored.param_groups[0]["state_dtype"] == "int8"


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="AdamW8bit got an unexpected argument 'min_8bit_size'; it takes .*min_quant"):
        fusedopt.AdamW8bit([torch.nn.Parameter(torch.ones(1))], min_8bit_size=16)  # type: ignore[call-arg]
