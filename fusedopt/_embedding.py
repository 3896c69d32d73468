"""The embedding that trains well with 8-bit state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class StableEmbedding(nn.Embedding):
    """`torch.nn.Embedding` as of Dettmers et al., arXiv:2110.02861, section 2.3.

    Its weight is initialized uniformly (Glorot and Bengio, 2010), a layer norm, `norm`, follows the lookup, and its
    state stays float32 in optimizers with state_dtype="int8": most rows of an embedding have no gradient in a step, and
    their small second moments would be lost beside those of other rows.

    Takes the arguments of `torch.nn.Embedding`. The output is of the weight's dtype; it is normalized in the dtype of
    `norm`, float32 unless that is cast.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, *args: Any, **options: Any):
        super().__init__(num_embeddings, embedding_dim, *args, **options)
        self.norm = nn.LayerNorm(embedding_dim, device=self.weight.device, dtype=torch.float32)
        self._mark()

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()

    def forward(self, input: Tensor) -> Tensor:
        found = super().forward(input)
        norm: Any = self.norm
        dtype = found.dtype if norm.weight is None else norm.weight.dtype
        return norm(found.to(dtype)).to(self.weight.dtype)

    def _mark(self) -> None:
        # An attribute, which the optimizer reads when it creates state; copies of a parameter do not have it.
        self.weight.optimizer_state_dtype = "float32"  # type: ignore[attr-defined]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()

    def _apply(self, *args: Any, **options: Any) -> StableEmbedding:
        super()._apply(*args, **options)
        self._mark()
        return self
