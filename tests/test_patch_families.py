"""`patch` on models of transformers: tiny, random, of every family."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from helpers import values
from patched import DTYPES, Mlp, assert_agrees, assert_same, options_of, results, rows
from torch import nn

import fusedopt

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
LLAMA, OLMO2, GEMMA = ("llama", 0.0), ("gemma", 0.0), ("gemma", 1.0)
# The configuration; norms a layer, as what; the kind and layout of what is gated.
FAMILIES: dict[str, tuple[str, dict[str, Any], int, tuple[str, float], tuple[str, str]]] = {
    "llama": ("LlamaConfig", {}, 2, LLAMA, ("swiglu", "separate")),
    "mistral": ("MistralConfig", {}, 2, LLAMA, ("swiglu", "separate")),
    "qwen2": ("Qwen2Config", {}, 2, LLAMA, ("swiglu", "separate")),
    "qwen3": ("Qwen3Config", {}, 4, LLAMA, ("swiglu", "separate")),
    "phi3": ("Phi3Config", {}, 2, LLAMA, ("swiglu", "halves")),
    "glm4": ("Glm4Config", {}, 4, LLAMA, ("swiglu", "halves")),
    "olmo2": ("Olmo2Config", {}, 4, OLMO2, ("swiglu", "separate")),
    "helium": ("HeliumConfig", {}, 2, OLMO2, ("swiglu", "separate")),
    "gemma2": ("Gemma2Config", {}, 4, GEMMA, ("geglu_tanh", "separate")),
    "gemma3": ("Gemma3TextConfig", {}, 6, GEMMA, ("geglu_tanh", "separate")),
    "gpt-oss": ("GptOssConfig", EXPERTS, 2, OLMO2, ("swiglu_oai", "interleaved")),
    "mixtral": ("MixtralConfig", EXPERTS, 2, LLAMA, ("swiglu", "halves")),
}


def tiny(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of random weights, of a size at which they matter, the norms' too."""
    transformers = pytest.importorskip("transformers")
    config, options, *_ = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(getattr(transformers, config)(**{**SIZES, **options}, use_cache=False))
    with torch.no_grad():
        for index, param in enumerate(model.parameters()):
            param.add_(values(param.shape, 11, index) / 8)
    return model.to(dtype)


TOKENS = torch.arange(14).reshape(2, 7) * 9 % 61 + 3


@pytest.mark.parametrize("family", FAMILIES)
def test_family_report(family: str) -> None:
    *_, norms, (casting, offset), (kind, layout) = FAMILIES[family]
    report = fusedopt.patch(tiny(family)).report
    found = Counter((entry.kind, *list(entry.options.values())[:2]) for entry in report.patched if "norm" in entry.name)
    assert found == {("rms_norm", casting, offset): norms + 1}
    gated = [(entry.kind, entry.options["layout"]) for entry in report.patched if "norm" not in entry.name]
    assert gated == [(kind, layout)]
    assert {entry.cls for entry in report.left} == ({"GptOssMLP"} if family == "gpt-oss" else set())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_casting(family: str, dtype: torch.dtype) -> None:
    """The same bits from every norm where the root is exact, so roundings fall where they fall in the family."""
    model = tiny(family, dtype)
    norms = {name: module for name, module in model.named_modules() if type(module).__name__.endswith("Norm")}
    assert len(norms) == FAMILIES[family][2] + 1
    for module in norms.values():
        setattr(module, "eps" if hasattr(module, "eps") else "variance_epsilon", 0.5)
    inputs = {name: rows(module.weight.numel(), 68, dtype) for name, module in norms.items()}
    expected = {name: module(inputs[name]) for name, module in norms.items()}
    fusedopt.patch(model)
    assert_same({name: module(inputs[name]) for name, module in norms.items()}, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_family_agrees(family: str, dtype: torch.dtype) -> None:
    assert_agrees(tiny(family, dtype), TOKENS)


@pytest.mark.parametrize("family", ["llama", "gpt-oss"])
def test_family_unpatch(family: str) -> None:
    model = tiny(family)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    expected = results(model, TOKENS)
    with fusedopt.patch(model):
        assert set(vars(model.norm)) == before["norm"] | {"forward"}
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert_same(results(model, TOKENS), expected)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", ["gpt-oss", "mixtral"])
def test_experts(family: str, implementation: str) -> None:
    """Experts are gated by a method of theirs, which Mixtral's eager ones do not call."""
    model = tiny(family)
    model.set_experts_implementation(implementation)
    assert_agrees(model, TOKENS)
    report = fusedopt.patch(model).report
    left = [entry.reason for entry in report.left if entry.cls == "MixtralExperts"]
    reason = "its eager experts do not call _apply_gate; the grouped_mm and batched_mm ones do"
    assert left == ([reason] if (family, implementation) == ("mixtral", "eager") else [])


def test_clamped_experts() -> None:
    """The limit is the module's; the slope is the kernel's, and another one is left."""
    model = tiny("gpt-oss")
    model.layers[0].mlp.experts.limit = 0.25
    assert_agrees(model, TOKENS)
    model.layers[0].mlp.experts.alpha = 1.5
    reasons = [entry.reason for entry in fusedopt.patch(model).report.left if entry.cls == "GptOssExperts"]
    assert reasons == ["its alpha is 1.5; the kernel has 1.702"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_norm(dtype: torch.dtype) -> None:
    """Qwen3-Next's, with the inputs by position and by name in either order."""
    pytest.importorskip("transformers")
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    norm = Qwen3NextRMSNormGated(24)
    x, gate = values((5, 24), 1, dtype=dtype), values((5, 24), 2, dtype=dtype)
    norm.weight = nn.Parameter(values((24,), 3, dtype=dtype))
    expected, other = norm(x, gate), norm(gate, x)
    found = options_of(norm)
    assert found == ("rms_norm", {"casting": "llama", "offset": 0.0, "eps": 1e-6, "gated": "swiglu"})
    unit = torch.finfo(dtype).eps / 2
    # In float32 what the order of 24 squares and 10 operations may make; in bfloat16 the last rounding, either way.
    bounds = {"rtol": 34 * unit if dtype is torch.float32 else 2 * unit, "atol": 0}
    torch.testing.assert_close(norm(x, gate), expected, **bounds)
    torch.testing.assert_close(norm(gate=gate, hidden_states=x), expected, **bounds)
    torch.testing.assert_close(norm(gate, gate=x), other, **bounds)


def test_family_checkpointing() -> None:
    model = tiny("llama").train()
    fusedopt.patch(model)
    expected = results(model, TOKENS)
    model.activation_checkpointing_enable()
    assert_same(results(model, TOKENS), expected)


def test_family_compile() -> None:
    model = tiny("llama")
    fusedopt.patch(model)
    expected = results(model, TOKENS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for name, value in results(compiled, TOKENS).items():
        torch.testing.assert_close(value, expected[name.removeprefix("_orig_mod.")])


def test_activation_written_out() -> None:
    """transformers' "gelu_new" is the tanh approximation in torch operations; "quick_gelu" is none that is fused."""
    transformers = pytest.importorskip("transformers")
    acts = transformers.activations.ACT2FN
    assert options_of(Mlp(8, acts["gelu_new"])) == ("geglu_tanh", {"layout": "separate"})
    assert options_of(Mlp(8, acts["gelu"])) == ("geglu", {"layout": "separate"})
    assert options_of(Mlp(8, acts["quick_gelu"])) == "its activation QuickGELUActivation has no fused kernel"
    assert_agrees(Mlp(8, acts["gelu_new"]), values((5, 8), 1))
