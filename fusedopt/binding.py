"""What a rule may contain, and what is made of it: the torch reference, `csrc/rules.h` and a Triton function.

`python -m fusedopt.binding csrc/rules.h` writes the header (`make rules`).
"""

from __future__ import annotations

import ast
import builtins
import copy
import functools
import hashlib
import inspect
import linecache
import sys
import textwrap
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import rules

# The functions a rule may call, and how many arguments each takes. csrc/functions.h holds their C++ form.
FUNCTIONS = {"abs": 1, "sign": 1, "sqrt": 1, "minimum": 2, "maximum": 2, "where": 3}

RESERVED = {"T", "state", "scalar", "divide", "negative", "number"}

OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div)
COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)


class RuleError(SyntaxError):
    """A rule contains something a rule may not contain. Names the file, the line and the reason."""


@dataclass(frozen=True, eq=False)
class Rule:
    """A checked rule: `function(p, g, *states, *scalars) -> (p, *states)`."""

    name: str
    function: types.FunctionType
    states: tuple[str, ...]
    scalars: tuple[str, ...]
    body: tuple[ast.Assign, ...] = field(repr=False)

    def __call__(self, group: Any) -> Rule:
        """Itself, so that a class with one rule for every group may declare it as its `rule`."""
        return self

    @functools.cached_property
    def reference(self) -> Callable[..., tuple[Tensor, ...]]:
        """The rule over torch tensors of one floating dtype; scalars are floats or zero-dimensional tensors."""
        bound = types.FunctionType(self.function.__code__, {**_TORCH_FUNCTIONS, "__builtins__": builtins}, self.name)
        if self.states:
            return bound
        return lambda *args: (bound(*args),)

    @functools.cached_property
    def triton(self) -> Any:
        """The rule as a jitted Triton function that returns a tuple; all arguments have one floating dtype.

        Raises:
            ImportError: Triton is not installed.
        """
        return _jitted(self.name, triton_source(self))


def rule_of(function: Callable[..., Any]) -> Rule:
    """Check `function` and return it as a Rule; the same function gives the same object.

    Args:
        function: `(p, g, *states, *scalars) -> (p, *states)`, of one element: the parameter, its gradient, the states
            it returns and the scalars that `Optimizer.scalars` gives. Its statements are `name = expression` of
            `+ - * /`, `abs sign sqrt minimum maximum`, and `where` of a comparison.

    Raises:
        RuleError: the function contains a construct a rule may not use; the message has the line and the reason.
        OSError: its source cannot be read.
    """
    return _rule_of(function)


@functools.cache
def _rule_of(function: types.FunctionType) -> Rule:
    try:
        lines, first_line = inspect.getsourcelines(function)
    except OSError as error:
        raise OSError(
            f"the source of rule {function.__name__!r} cannot be read ({error}): define it in a file or a notebook, "
            "not in exec, `python -c` or standard input"
        ) from error
    source = textwrap.dedent("".join(lines))
    tree = ast.increment_lineno(ast.parse(source), first_line - 1)
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        raise TypeError(f"a rule must be a function defined with `def`, got {function!r}")
    return _Checker(definition, inspect.getsourcefile(function) or "<unknown>", lines, first_line).check(function)


class _Checker:
    """Walks a rule once, tracking which names hold only scalars."""

    def __init__(self, definition: ast.FunctionDef, filename: str, lines: Sequence[str], first_line: int):
        self.definition = definition
        self.filename = filename
        self.lines = lines
        self.first_line = first_line
        self.is_scalar: dict[str, bool] = {}

    def refuse(self, node: ast.AST, reason: str) -> RuleError:
        line = getattr(node, "lineno", self.first_line)
        column = getattr(node, "col_offset", 0) + 1
        text = self.lines[line - self.first_line]
        return RuleError(f"rule {self.definition.name!r}: {reason}", (self.filename, line, column, text))

    def check(self, function: types.FunctionType) -> Rule:
        definition = self.definition
        names = self.arguments()
        *body, last = [statement for statement in definition.body if not _is_docstring(statement)] or [definition]
        if not isinstance(last, ast.Return):
            raise self.refuse(last, "the last statement must be `return p, *states`")
        returned = last.value.elts if isinstance(last.value, ast.Tuple) else [last.value]
        result = [node.id for node in returned if isinstance(node, ast.Name)]
        states = names[2 : 1 + len(returned)]
        if result != [names[0], *states]:
            expected = ", ".join([names[0], *states])
            raise self.refuse(last, f"it must return the parameter and then its states in order, `return {expected}`")
        self.is_scalar = {name: index > len(states) + 1 for index, name in enumerate(names)}
        assignments = tuple(self.assignment(statement) for statement in body)
        return Rule(definition.name, function, tuple(states), tuple(names[2 + len(states) :]), assignments)

    def arguments(self) -> list[str]:
        args = self.definition.args
        if args.vararg or args.kwarg or args.kwonlyargs or args.posonlyargs or args.defaults:
            raise self.refuse(self.definition, "arguments must be plain names without defaults, `*` or `/`")
        names = [argument.arg for argument in args.args]
        if len(names) < 2:
            raise self.refuse(self.definition, "the first two arguments must be the parameter and its gradient")
        for argument in args.args:
            if argument.arg in FUNCTIONS:
                raise self.refuse(argument, f"{argument.arg!r} is the name of a function")
            if argument.arg in RESERVED:
                raise self.refuse(argument, f"{argument.arg!r} has a meaning in the C++ or Triton made of the rule")
        if self.definition.decorator_list:
            raise self.refuse(self.definition.decorator_list[0], "a decorator is not allowed")
        return names

    def assignment(self, statement: ast.stmt) -> ast.Assign:
        if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
            raise self.refuse(statement, f"only `name = expression` is allowed, not `{_head(statement)}`")
        target = statement.targets[0]
        if not isinstance(target, ast.Name):
            raise self.refuse(target, "only one plain name may be assigned")
        if self.is_scalar.get(target.id):
            raise self.refuse(target, f"the scalar {target.id!r} may not be assigned")
        if target.id in FUNCTIONS:
            raise self.refuse(target, f"{target.id!r} is the name of a function")
        if target.id in RESERVED:
            raise self.refuse(target, f"{target.id!r} has a meaning in the C++ or Triton made of the rule")
        if self.expression(statement.value):
            raise self.refuse(statement.value, "it has only scalars in it; compute it in the class's `scalars`")
        self.is_scalar[target.id] = False
        return statement

    def expression(self, node: ast.expr) -> bool:
        """Check `node`; True where it holds nothing but scalars and literals."""
        match node:
            case ast.Name(id=name):
                if name not in self.is_scalar:
                    raise self.refuse(node, f"the name {name!r} is not defined in the rule")
                return self.is_scalar[name]
            case ast.Constant(value=bool()):
                raise self.refuse(node, "a boolean is not allowed")
            case ast.Constant(value=int() | float() as value):
                if abs(value) > (2**53 if isinstance(value, int) else sys.float_info.max):
                    raise self.refuse(node, "the number is out of range: an integer goes to 2**53, a float to 1.7e308")
                return True
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self.expression(operand)
            case ast.BinOp(left=left, op=op, right=right) if isinstance(op, OPERATORS):
                scalars = self.expression(left), self.expression(right)
                if all(scalars):
                    raise self.refuse(node, "it combines two scalars; compute it in the class's `scalars`")
                if isinstance(op, ast.Div) and scalars[1]:
                    raise self.refuse(node, "it divides by a scalar; pass the reciprocal from the class's `scalars`")
                if isinstance(op, ast.Div) and scalars[0] and ast.unparse(left) != "1":
                    # torch computes it as the reciprocal times the number.
                    raise self.refuse(node, f"it divides a number by a tensor; write `{ast.unparse(left)} * (1 / ...)`")
                return False
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in FUNCTIONS:
                return self.call(node, name, args)
            case ast.Compare():
                raise self.refuse(node, "a comparison is allowed only as the first argument of `where`")
        raise self.refuse(node, f"`{ast.unparse(node)}` is not allowed: only + - * / and {', '.join(FUNCTIONS)}")

    def call(self, node: ast.Call, name: str, args: list[ast.expr]) -> bool:
        if len(args) != FUNCTIONS[name]:
            raise self.refuse(node, f"{name} takes {FUNCTIONS[name]} argument(s), got {len(args)}")
        if name == "where":
            self.condition(args[0])
            args = args[1:]
        if all([self.expression(argument) for argument in args]):
            raise self.refuse(node, f"{name} of scalars alone; compute it in the class's `scalars`")
        return False

    def condition(self, node: ast.expr) -> None:
        if not (isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], COMPARISONS)):
            raise self.refuse(node, "the first argument of `where` must be one comparison, like `a < b`")
        if all([self.expression(node.left), self.expression(node.comparators[0])]):
            raise self.refuse(node, "it compares two scalars; compute it in the class's `scalars`")


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _head(statement: ast.stmt) -> str:
    return ast.unparse(statement).splitlines()[0]


# --- torch ---------------------------------------------------------------------------------------------------------


def _sqrt(x: Tensor) -> Tensor:
    # torch.sqrt is one ULP off for 0.7 % of float32 inputs on the CPU; rounding the double root is correct for all.
    return torch.sqrt(x.double()).to(x.dtype)


def _tensors(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, Any], Tensor]:
    """`function` of two tensors, taking a number for either."""

    def call(a: Any, b: Any) -> Tensor:
        like = a if isinstance(a, Tensor) else b
        return function(*(torch.as_tensor(x, dtype=like.dtype, device=like.device) for x in (a, b)))

    return call


_TORCH_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "abs": torch.abs,
    "sign": torch.sign,
    "sqrt": _sqrt,
    "minimum": _tensors(torch.minimum),
    "maximum": _tensors(torch.maximum),
    "where": torch.where,
}


# --- C++ -----------------------------------------------------------------------------------------------------------

_HEADER = """\
// Generated from fusedopt/rules.py by `make rules`. Do not edit: change the rule there.
#pragma once

#include "functions.h"

namespace fusedopt {
"""


def cpp(rule: Rule) -> str:
    """The rule as a C++ struct, generic in the arithmetic type."""
    p, g = inspect.getfullargspec(rule.function).args[:2]
    return _struct(rule.name, p, g, rule.states, rule.scalars, rule.body)


def numbered_cpp(rule: Rule) -> str:
    """The rule as a C++ struct `own_rule` with numbers for names, since Python's may be keywords or macros in C++."""
    assigned = [ast.unparse(statement.targets[0]) for statement in rule.body]
    names = dict.fromkeys([*inspect.getfullargspec(rule.function).args, *assigned])
    number = _Renaming({name: f"x{index}" for index, name in enumerate(names)})
    p, g, *others = number.names.values()
    states, scalars = others[: len(rule.states)], others[len(rule.states) :][: len(rule.scalars)]
    return _struct("own_rule", p, g, states, scalars, [number.visit(copy.deepcopy(each)) for each in rule.body])


class _Renaming(ast.NodeTransformer):
    def __init__(self, names: dict[str, str]):
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name(self.names.get(node.id, node.id))


def _struct(
    struct: str, p: str, g: str, states: Sequence[str], scalars: Sequence[str], statements: Sequence[ast.Assign]
) -> str:
    known = {p, g, *states}
    lines = [f"T {name} = state[{index}];" for index, name in enumerate(states)]
    lines += [f"const T {name} = scalar[{index}];" for index, name in enumerate(scalars)]
    for statement in statements:
        name = ast.unparse(statement.targets[0])
        lines.append(f"{'' if name in known else 'T '}{name} = {_cpp_expression(statement.value)};")
        known.add(name)
    lines += [f"state[{index}] = {name};" for index, name in enumerate(states)]
    body = "\n".join(f"    {line}" for line in lines)
    read = {node.id for statement in statements for node in ast.walk(statement) if isinstance(node, ast.Name)}
    arguments = f"T& {p}, T {g}" if {p, g} <= read else f"T& {p}, T" if p in read else f"T&, T {g}"
    # An array of length zero is not C++.
    return f"""\
struct {struct} {{
  static constexpr const char* name = "{struct}";
  static constexpr int states = {len(states)}, scalars = {len(scalars)};
  template <class T>
  FUSEDOPT_INLINE static void apply({arguments}, T* {"state" if states else ""}, const T* scalar) {{
{body}
  }}
}};
"""


class _Spelling(ast.NodeTransformer):
    """Spells in C++ what Python spells otherwise. A Name serves for any text that is whole in itself."""

    def visit_Constant(self, node: ast.Constant) -> ast.Name:
        # In the arithmetic type, so that C++ does not promote float32 to double.
        return ast.Name(f"T({node.value!r})")

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.Name:
        # `--x` would decrement x.
        operand = self.visit(node.operand)
        text = ast.unparse(operand)
        return ast.Name(f"(-{text})" if isinstance(operand, ast.Name) else f"(-({text}))")


def _cpp_expression(node: ast.expr) -> str:
    # Python's precedence and spelling of + - * / and comparisons are also C++'s.
    return ast.unparse(_Spelling().visit(ast.parse(ast.unparse(node), mode="eval").body))


def header(all_rules: Sequence[Rule]) -> str:
    """The text of csrc/rules.h."""
    names = " ".join(f"X({rule.name})" for rule in all_rules)
    macro = "\n".join(textwrap.wrap(names, 112, initial_indent="  ", subsequent_indent="  ")).replace("\n", " \\\n")
    titles = [(rule.function.__doc__ or rule.name).splitlines()[0] for rule in all_rules]
    structs = "".join(f"\n// {title}\n{cpp(rule)}" for title, rule in zip(titles, all_rules))
    return f"{_HEADER}{structs}\n}}  // namespace fusedopt\n\n#define FUSEDOPT_RULES(X) \\\n{macro}\n"


# --- Triton --------------------------------------------------------------------------------------------------------
# Printed, like the C++: rebinding the names of the code object cannot change its operators, and Triton's `/` is
# approximate, its `-x` may lose the sign of zero, and its literals may promote.


def triton_source(rule: Rule) -> str:
    """The rule as a function of Triton tensors, over what kernels/functions.py defines."""
    p, *others = inspect.getfullargspec(rule.function).args
    lines = [f"def rule({', '.join([p, *others])}):"]
    for statement in rule.body:
        value = _TritonSpelling(p).visit(ast.parse(ast.unparse(statement.value), mode="eval").body)
        lines.append(f"    {ast.unparse(statement.targets[0])} = {ast.unparse(value)}")
    lines.append(f"    return ({', '.join([p, *rule.states])},)")
    return "\n".join(lines) + "\n"


class _TritonSpelling(ast.NodeTransformer):
    def __init__(self, like: str):
        self.like = ast.Name(like)

    def visit_Constant(self, node: ast.Constant) -> ast.Call:
        return ast.Call(ast.Name("number"), [node, self.like], [])

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.Call:
        return ast.Call(ast.Name("negative"), [self.visit(node.operand)], [])

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        left, right = self.visit(node.left), self.visit(node.right)
        if isinstance(node.op, ast.Div):
            return ast.Call(ast.Name("divide"), [left, right], [])
        return ast.BinOp(left, node.op, right)


def _jitted(name: str, source: str) -> Any:
    # Triton reads a function's source, here from linecache, and tells functions apart by module and name.
    import triton

    from .kernels import functions

    module = f"fusedopt.rules.{name}_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    filename = f"<{module}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace = {**vars(functions), "__name__": module}
    exec(compile(source, filename, "exec"), namespace)
    return triton.jit(namespace["rule"])


RULES: dict[str, Rule] = {
    name: rule_of(function) for name, function in vars(rules).items() if isinstance(function, types.FunctionType)
}
"""Every rule of `fusedopt.rules` by name, in the file's order."""


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(header(list(RULES.values())))
