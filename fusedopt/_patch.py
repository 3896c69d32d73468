"""`patch`: RMSNorm and gated-MLP modules of a model compute with fused kernels, in place and reversibly."""

from __future__ import annotations

import re
import textwrap
import uuid
from collections import Counter
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

from torch import nn

from ._expression import Unknown
from ._forms import Fused, recognized

# What is worth a line in the report when it is left. What is patched is never decided by a name.
_NAMES = re.compile("norm|mlp|glu|feedforward|experts|gatedact", re.IGNORECASE)


class Patched(NamedTuple):
    """A module that computes with a fused kernel."""

    name: str
    cls: str
    kind: str
    options: dict[str, Any]

    def __str__(self) -> str:
        values = [f"{value:g}" if isinstance(value, float) else value for value in self.options.values()]
        return ", ".join([self.kind, *(f"{name} {value}" for name, value in zip(self.options, values))])


class Left(NamedTuple):
    """A norm or MLP that is as it was, and why."""

    name: str
    cls: str
    reason: str

    def __str__(self) -> str:
        return textwrap.shorten(self.reason, 120, placeholder=" ...")


class Report(NamedTuple):
    """What `patch` did: printed, a table in which the layers of a model are one line."""

    patched: list[Patched]
    left: list[Left]

    def __str__(self) -> str:
        return "\n".join([*_table("patched", self.patched), *_table("left", self.left)])


def _table(title: str, entries: list[Any]) -> Iterator[str]:
    rows = Counter((re.sub(r"\b\d+\b", "*", entry.name), entry.cls, str(entry)) for entry in entries)
    yield f"{title}: {len(entries)}"
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    for (name, cls, text), count in rows.items():
        yield f"  {count:4} x {name:{widths[0]}}  {cls:{widths[1]}}  {text}"


class Handle:
    """What `patch` returns: its `report`, and the way back. As a context manager it goes back at the end.

    Attributes:
        report: lists of what was `patched` and what was `left`; print it.
    """

    def __init__(self, model: nn.Module, report: Report, fused: list[Fused], token: str) -> None:
        self.report = report
        self._model, self._fused, self._token = model, fused, token

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.unpatch()

    def __repr__(self) -> str:
        return f"<fusedopt.patch of {type(self._model).__name__}>\n{self.report}"

    def unpatch(self) -> None:
        """Give every module its own forward back, in copies too that the model has got since. Again, it does nothing.

        Raises:
            RuntimeError: something else has replaced a forward since; nothing is changed.
        """
        modules = {*self._model.modules(), *(fused.module for fused in self._fused)}
        ours = [
            (module, name, fused)
            for module in modules
            for name, fused in vars(module).items()
            if isinstance(fused, Fused) and fused.token == self._token
        ]
        changed = [fused for fused in self._fused if vars(fused.module).get(fused.replaced, fused) is not fused]
        changed += [fused for _, name, fused in ours if name != fused.replaced]  # kept by what wraps it
        for fused in changed:
            raise RuntimeError(
                f"unpatch: {fused.replaced} of a {type(fused.module).__name__} has been replaced since, by "
                f"{vars(fused.module).get(fused.replaced)!r}; undo that first"
            )
        for module, name, _ in ours:
            delattr(module, name)
        self._fused = []


def patch(model: nn.Module) -> Handle:
    """Let the RMSNorm and gated-MLP modules of a model compute with `rms_norm`, `swiglu` and their kin, in place.

    A module is patched if its forward computes, operation for operation, what a known family's does (Llama, Mistral,
    Qwen, Gemma, Phi-3, OLMo-2, gpt-oss and all that are written alike, and torch.nn.RMSNorm). Roundings to 16 bits fall
    where they fall in that family, in the norms; a gated unit is rounded once where eager operations round twice. All
    else is left, and the report says why.

    Parameters, `state_dict`, hooks and the classes of modules stay as they are; only a `forward` (of experts,
    `_apply_gate`) is set on the instance. It reads the module's attributes when called, so that the model may be moved,
    cast, wrapped by PEFT, sharded, compiled, checkpointed, copied and pickled; copies stay patched. Only the shallow
    copies of torch.nn.DataParallel do not work. Projections are called as modules; an activation that is a module is
    not. In float64 norms compute in float64, where the families use float32.

    Args:
        model: any module; patched ones in it stay as they are.

    Returns:
        A handle with a `report` and `unpatch()`; also a context manager.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch takes a torch.nn.Module, not {type(model).__name__}")
    report, made, token = Report([], []), [], uuid.uuid4().hex
    for name, module in model.named_modules():
        cls = type(module).__name__
        try:
            fused = recognized(module, token)
        except (Unknown, AttributeError) as reason:  # an attribute that is there only later
            if _NAMES.search(cls):
                report.left.append(Left(name, cls, str(reason)))
            continue
        report.patched.append(Patched(name, cls, fused.kind, fused.options()))
        made.append(fused)
    for fused in made:
        setattr(fused.module, fused.replaced, fused)
    return Handle(model, report, made, token)
