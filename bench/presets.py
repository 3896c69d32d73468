"""What is measured: lists of tensor shapes, rows of a hidden size, and storage formats of tensors and state."""

from __future__ import annotations

import dataclasses
import math

import torch

from fusedopt.codecs import BLOCK

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Preset:
    """The shapes of a model: `outer` once, `layer` repeated `layers` times."""

    name: str
    about: str
    layers: int
    layer: tuple[Shape, ...]
    outer: tuple[Shape, ...] = ()

    def shapes(self, layers: int | None = None) -> list[Shape]:
        """All shapes, with `layers` instead of all layers if given."""
        return [*self.outer, *self.layer * (self.layers if layers is None else layers)]

    def fit(self, max_elements: float) -> tuple[list[Shape], str]:
        """Shapes of at most `max_elements` elements, and what was left out to get there ("" when nothing was).

        Layers are dropped first, then `outer`; one layer always stays.
        """
        if elements(self.shapes()) <= max_elements:
            return self.shapes(), ""
        room = int(max_elements - elements(self.outer)) // elements(self.layer)
        if room >= 1:
            return self.shapes(room), f"{room} of {self.layers} layers"
        room = max(1, int(max_elements) // elements(self.layer))
        kept = f"{min(room, self.layers)} of {self.layers} layers"
        return list(self.layer * min(room, self.layers)), kept + (", no embedding" if self.outer else "")


def elements(shapes: list[Shape] | tuple[Shape, ...]) -> int:
    """The number of elements in all tensors of `shapes`."""
    return sum(math.prod(shape) for shape in shapes)


def _host(tensors: int) -> Preset:
    return Preset(f"host{tensors}", f"1M elements in {tensors} tensors", tensors, ((1_000_000 // tensors,),))


PRESETS = {
    preset.name: preset
    for preset in (
        Preset("mlp", "a 6-tensor MLP, 6k elements", 1, ((48, 64), (48,), (48, 48), (48,), (10, 48), (10,))),
        Preset("many", "2000 tensors of 1000 elements", 2000, ((1000,),)),
        Preset("many5k", "2000 tensors of 5000 elements, enough for 8-bit state", 2000, ((5000,),)),
        Preset("large", "16M elements in 16 tensors", 16, ((1024, 1024),)),
        _host(100),
        _host(1000),
        _host(10_000),
        Preset(
            "gpt2",
            "GPT-2 small: 124M elements in 148 tensors",
            12,
            (
                *((768,), (768,)),
                *((768, 2304), (2304,), (768, 768), (768,)),
                *((768,), (768,)),
                *((768, 3072), (3072,), (3072, 768), (768,)),
            ),
            outer=((50257, 768), (1024, 768), (768,), (768,)),
        ),
        Preset(
            "llama300",
            "a narrow Llama: 126M elements in 300 tensors",
            33,
            (
                *((512, 512), (128, 512), (128, 512), (512, 512)),
                *((1408, 512), (1408, 512), (512, 1408)),
                *((512,), (512,)),
            ),
            outer=((32_000, 512), (32_000, 512), (512,)),
        ),
        Preset(
            "llama1b",
            "Llama 3.2 1B: 1236M elements in 146 tensors, fewer layers where memory is short",
            16,
            (
                *((2048, 2048), (512, 2048), (512, 2048), (2048, 2048)),
                *((8192, 2048), (8192, 2048), (2048, 8192)),
                *((2048,), (2048,)),
            ),
            outer=((128256, 2048), (2048,)),
        ),
    )
}


def _matrices(about: str, layers: int, *layer: Shape) -> Preset:
    name = "x".join(map(str, layer[0] if layers == 1 else (layers, *layer[0])))
    return Preset(name, about, layers, layer)


MATRICES = {
    preset.name: preset
    for preset in (
        *(_matrices("a square matrix", 1, (size, size)) for size in (128, 256, 512, 768, 1024, 2048)),
        _matrices("a wide matrix", 1, (1024, 4096)),
        _matrices("a tall matrix", 1, (4096, 1024)),
        _matrices("the MLP of GPT-2 small", 1, (768, 3072)),
        _matrices("64 matrices of 128 by 128", 64, (128, 128)),
        _matrices("12 matrices of 768 by 768", 12, (768, 768)),
        Preset(
            "gpt2-matrices",
            "the 48 matrices of GPT-2 small's layers: 85M elements",
            12,
            ((2304, 768), (768, 768), (3072, 768), (768, 3072)),
        ),
    )
}

# The members hold the same elements in ever more tensors: their times differ by the host's cost per tensor.
HOST_SERIES = ("host100", "host1000", "host10000")

CELL_ELEMENTS = {"cpu": 8 << 20, "cuda": 64 << 20}  # of rows of any size: far more than a cache holds


@dataclasses.dataclass(frozen=True)
class Rows:
    """A tensor of rows of `hidden` elements; of as many as make `CELL_ELEMENTS` if `rows` is None."""

    name: str
    about: str
    hidden: int
    rows: int | None = None

    def fit(self, max_elements: float, device: str) -> tuple[list[Shape], str]:
        """The shape, of at most `max_elements` elements but one row at least, and what was left out ("" if nothing)."""
        rows = self.rows or max(1, CELL_ELEMENTS[device] // self.hidden)
        room = max(1, int(max_elements) // self.hidden)
        return [(min(room, rows), self.hidden)], "" if rows <= room else f"{room} of {rows} rows"


def _hidden(size: int) -> Rows:
    return Rows(f"hidden{size}", f"rows of {size} elements, 8M in all, on a GPU 64M", size)


ROWS = {
    rows.name: rows
    for rows in (
        Rows("small", "8 rows of 256", 256, 8),
        Rows("4096x2048", "4096 rows of 2048: 8M elements", 2048, 4096),
        # Also odd ones, and the MLPs' of Llama 2 and 3, 11008 and 14336.
        *map(_hidden, (63, 64, 256, 768, 1000, 1024, 2048, 4096, 4097, 8192, 11_008, 14_336, 16_384, 65_536)),
    )
}

SERIES = {
    "host": HOST_SERIES,
    "hidden": tuple(name for name in ROWS if name.startswith("hidden")),
    "square": tuple(name for name, preset in MATRICES.items() if preset.about == "a square matrix"),
}


@dataclasses.dataclass(frozen=True)
class Precision:
    """How parameters and gradients (`param`) and optimizer state (`state`, uint8 for block-wise codes) are stored."""

    name: str
    about: str
    param: torch.dtype
    state: torch.dtype

    @property
    def lossy(self) -> bool:
        """Whether its state has too few bits to be held to rounding error."""
        return self.state == torch.uint8

    @property
    def state_bytes(self) -> float:
        """Of one element of a state; of codes with its share of the block's float32 scale."""
        return self.state.itemsize + (4 / BLOCK if self.lossy else 0)


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32", "everything in float32", torch.float32, torch.float32),
        Precision("mixed", "bfloat16 parameters and gradients, float32 state", torch.bfloat16, torch.float32),
        Precision("bf16", "everything in bfloat16, torch's choice for such parameters", torch.bfloat16, torch.bfloat16),
        Precision("fp16", "everything in float16, torch's choice for such parameters", torch.float16, torch.float16),
        Precision("int8", "float32 parameters and gradients, block-wise 8-bit state", torch.float32, torch.uint8),
        Precision(
            "mixed-int8", "bfloat16 parameters and gradients, block-wise 8-bit state", torch.bfloat16, torch.uint8
        ),
    )
}
