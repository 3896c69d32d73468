"""Which parameters of a module Muon orthogonalizes: the matrices between its embeddings and its output."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Embedding, EmbeddingBag, Linear, Module

from ._state import Group

OUTPUTS = ("lm_head", "head", "output", "classifier", "score", "embed_out", "unembed")
"""What output layers are called, in transformers, timm, torchtune and nanoGPT."""


def route(module: Module) -> tuple[list[Group], dict[Tensor, str]]:
    """Groups of named parameters for Muon and for AdamW, and why each is where it is. The rules, the first that fits:

    - a parameter of less than two dimensions: AdamW;
    - of an embedding, or tied to one, or with "embed" in its name: AdamW;
    - of a layer called as one of `OUTPUTS`, or of a linear layer with an output for each row of an embedding: AdamW;
    - any other: Muon.
    """
    embeddings = [each for each in module.modules() if isinstance(each, Embedding | EmbeddingBag)]
    embedded = {id(each.weight) for each in embeddings}
    vocabularies = {each.num_embeddings for each in embeddings}
    reasons: dict[Tensor, str] = {}
    matrices: list[tuple[str, Tensor]] = []
    kernels: list[tuple[str, Tensor]] = []
    others: list[tuple[str, Tensor]] = []
    for name, param in module.named_parameters():
        owner = module.get_submodule(name.rpartition(".")[0])
        layer = name.split(".")[-2] if "." in name else ""
        if param.ndim < 2:
            reason = f"it has {param.ndim} dimensions"
        elif id(param) in embedded:
            reason = "it is an embedding"
        elif "embed" in name.lower():
            reason = "its name has 'embed'"
        elif layer in OUTPUTS:
            reason = f"{layer!r} is an output layer"
        elif isinstance(owner, Linear) and owner.out_features in vocabularies:
            reason = "it has an output for each row of an embedding"
        else:
            reason = ""
        is_kernel = type(owner).__name__.startswith("Conv") and param.ndim > 2
        kind = "a kernel" if is_kernel else "a matrix" if param.ndim == 2 else "a stack of matrices"
        (others if reason else kernels if is_kernel else matrices).append((name, param))
        reasons[param] = reason or f"it is {kind}"
    groups: list[Group] = [
        {"params": matrices, "algorithm": "muon"},
        {"params": kernels, "algorithm": "muon", "flatten": True},
        {"params": others, "algorithm": "adamw"},
    ]
    return [group for group in groups if group["params"]], reasons
