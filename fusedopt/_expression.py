"""What a function computes, read from its source as one expression, to be compared with others."""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import textwrap
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class Unknown(Exception):
    """Why a forward cannot be read as one expression."""


# --- a function as one expression ---

# Positional arguments of these methods become keywords, and functions of torch become methods, so that spellings agree.
_PARAMETERS = {
    "chunk": ("chunks", "dim"),
    "clamp": ("min", "max"),
    "mean": ("dim", "keepdim"),
    "pow": ("exponent",),
    "rsqrt": (),
    "sigmoid": (),
    "sqrt": (),
    "to": ("dtype",),
}
# A name that is used twice doubles what it stands for, and a method may call itself.
_MAX_NODES, _MAX_DEPTH = 1000, 8


def expression(function: Any, module: nn.Module | None = None) -> ast.expr:
    """What `function(self, x)` returns, with assignments substituted and methods of `module` inlined.

    The inputs are named `x`, `x1`, ... What a global name stands for is kept as the node's `means`, and an `if` on an
    attribute that is a bool is decided by `module`.

    Raises:
        Unknown: it is no straight line of assignments, or its source cannot be had.
    """
    definition = _definition(function)
    parameters = [parameter.arg for parameter in definition.args.args]
    inputs: list[ast.expr] = [ast.Name("x" + str(index or "")) for index in range(len(parameters) - 1)]
    return _Inliner(function, module).result(definition, [ast.Name("self"), *inputs])


def _definition(function: Any) -> ast.FunctionDef:
    if not isinstance(function, types.FunctionType):
        raise Unknown(f"its forward is a {type(function).__name__}, no Python function")
    if hasattr(function, "__wrapped__"):
        raise Unknown("its forward is decorated")
    try:
        definition = ast.parse(_source(function)).body[0]
    except (OSError, SyntaxError) as error:
        raise Unknown("the source of its forward cannot be had") from error
    if not isinstance(definition, ast.FunctionDef):
        raise Unknown("its forward is no plain function")
    arguments = definition.args
    if arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.defaults:
        raise Unknown("its forward takes optional inputs")
    return definition


@functools.cache
def _source(function: types.FunctionType) -> str:
    return textwrap.dedent(inspect.getsource(function))


class _Inliner(ast.NodeTransformer):
    """Rewrites expressions. Nodes that a name stands for are shared, so they are never changed once made."""

    def __init__(self, function: types.FunctionType, module: nn.Module | None, depth: int = 0):
        if depth == _MAX_DEPTH:
            raise Unknown("its forward calls methods too deeply")
        self.function, self.module, self.depth = function, module, depth
        self.names: dict[str, ast.expr] = {}

    def result(self, definition: ast.FunctionDef, inputs: list[ast.expr]) -> ast.expr:
        parameters = [parameter.arg for parameter in definition.args.args]
        if len(parameters) != len(inputs):
            raise Unknown(f"its forward calls {definition.name} with other than {len(parameters)} arguments")
        self.names = dict(zip(parameters, inputs))
        value = self.run(definition.body)
        if value is None:
            raise Unknown("its forward may return nothing")
        return value

    def run(self, body: list[ast.stmt]) -> ast.expr | None:
        """The value returned, or None where the statements end without a return."""
        for statement in body:
            if sum(_size(value) for value in self.names.values()) > _MAX_NODES:
                raise Unknown("its forward is long")
            match statement:
                case ast.Expr(value=ast.Constant()):  # a docstring
                    continue
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self.names[name] = self.visit(value)
                case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                    self.assign(targets, [self.visit(value) for value in values])
                case ast.Assign(targets=[ast.Tuple(elts=targets)], value=value):
                    whole = self.visit(value)
                    self.assign(targets, [ast.Subscript(whole, ast.Constant(index)) for index in range(len(targets))])
                case ast.Return(value=ast.expr() as value):
                    return self.visit(value)
                case ast.If(test=test, body=then, orelse=otherwise):
                    returned = self.run(then if self.decide(test) else otherwise)
                    if returned is not None:
                        return returned
                case _:
                    raise Unknown(f"its forward has a statement that is not read: {written(statement)}")
        return None

    def assign(self, targets: list[ast.expr], values: list[ast.expr]) -> None:
        for target, value in zip(targets, values, strict=True):
            if not isinstance(target, ast.Name):
                raise Unknown(f"its forward assigns to {written(target)}")
            self.names[target.id] = value

    def decide(self, test: ast.expr) -> bool:
        name = own(self.visit(test))
        value = getattr(self.module, name, None) if name and name != "training" else None
        if isinstance(value, bool):
            return value
        raise Unknown(f"its forward depends on {written(test)}")

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id in self.names:
            return self.names[node.id]
        for scope in (self.function.__globals__, vars(builtins)):
            if node.id in scope:
                return _meaning(node.id, scope[node.id])
        raise Unknown(f"its forward uses {node.id}, whose value is not known")

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        value = self.visit(node.value)
        if isinstance(owner := getattr(value, "means", None), types.ModuleType):
            return _meaning(f"{written(value)}.{node.attr}", getattr(owner, node.attr, None))
        return ast.Attribute(value, node.attr)

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        value, index = self.visit(node.value), self.visit(node.slice)
        table, key = getattr(value, "means", None), own(index)
        if isinstance(table, Mapping) and key is not None and getattr(self.module, key, None) in table:
            return _meaning(written(node), table[getattr(self.module, key)])
        return ast.Subscript(value, index)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        function = self.visit(node.func)
        arguments: list[ast.expr] = [self.visit(argument) for argument in node.args]
        keywords = {keyword.arg or "**": self.visit(keyword.value) for keyword in node.keywords}
        if (name := own(function)) and self.module is not None and name not in vars(self.module):
            method = getattr(type(self.module), name, None)
            if isinstance(method, types.FunctionType) and not keywords:
                inner = _Inliner(method, self.module, self.depth + 1)
                return inner.result(_definition(method), [ast.Name("self"), *arguments])
        means = getattr(function, "means", None)
        for name in _PARAMETERS:
            if means is not None and means is getattr(torch, name, None) and arguments:
                function, arguments = ast.Attribute(arguments[0], name), arguments[1:]
        if isinstance(function, ast.Attribute):
            tensor = function.value
            match function.attr, arguments:
                case "float", []:
                    function, arguments = ast.Attribute(tensor, "to"), [_meaning("torch.float32", torch.float32)]
                case "type_as", [other]:
                    function, arguments = ast.Attribute(tensor, "to"), [ast.Attribute(other, "dtype")]
                case "square", []:
                    function, arguments = ast.Attribute(tensor, "pow"), [ast.Constant(2)]
            parameters = _PARAMETERS.get(function.attr, ())
            keywords |= dict(zip(parameters, arguments))
            arguments = arguments[len(parameters) :]
        given = [ast.keyword(name, keywords[name]) for name in sorted(keywords) if not _is_none(keywords[name])]
        return ast.Call(function, arguments, given)


def own(node: Any) -> str | None:
    """The name of an attribute of the module itself."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return None


def _meaning(name: str, value: Any) -> ast.expr:
    node = ast.Name(name)
    node.means = value  # type: ignore[attr-defined]
    return node


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _size(node: Any) -> int:
    """Its nodes, those shared counted each time."""
    if not hasattr(node, "size"):
        node.size = 1 + sum(_size(child) for child in ast.iter_child_nodes(node))
    return node.size


def written(node: ast.AST) -> str:
    """Its first line of source."""
    return ast.unparse(ast.fix_missing_locations(node)).splitlines()[0]


# --- comparison ---


def unify(form: Any, node: Any, names: dict[str, Any]) -> dict[str, Any] | None:
    """What the attributes that `form` is written with are in `node`, added to `names`; None where the two differ.

    It is the name of an attribute, or a function that is none.
    """
    if name := own(form):
        bound = own(node) or getattr(node, "means", None)
        if isinstance(bound, str) or callable(bound):
            return {**names, name: bound} if names.get(name, bound) == bound else None
        return None
    if hasattr(form, "means") or hasattr(node, "means"):
        same = getattr(form, "means", None) is getattr(node, "means", None)
        return names if same and hasattr(form, "means") and hasattr(node, "means") else None
    if isinstance(form, list) and isinstance(node, list) and len(form) == len(node):
        return unify_all(form, node, names)
    if not isinstance(form, ast.AST):
        return names if form == node else None
    if type(form) is not type(node):
        return None
    if isinstance(form, ast.BinOp) and isinstance(node, ast.BinOp) and isinstance(form.op, (ast.Add, ast.Mult)):
        parts = [form.op, form.left, form.right]  # which may be in either order, for the same bits
        found = unify_all(parts, [node.op, node.left, node.right], names)
        return unify_all(parts, [node.op, node.right, node.left], names) if found is None else found
    fields = [field for field in form._fields if field not in ("ctx", "kind")]
    return unify_all([getattr(form, field) for field in fields], [getattr(node, field) for field in fields], names)


def unify_all(forms: list[Any], nodes: list[Any], names: dict[str, Any]) -> dict[str, Any] | None:
    found: dict[str, Any] | None = names
    for form, node in zip(forms, nodes, strict=True):
        found = None if found is None else unify(form, node, found)
    return found
