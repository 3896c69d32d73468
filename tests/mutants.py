"""Rules with one thing wrong, to see that a comparison sees every term."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from fusedopt.binding import Rule


def mutants(rule: Rule) -> Iterator[tuple[str, Rule]]:
    """The rule with one operation left out, turned into another, or its function not applied; each once."""
    source = ast.parse(textwrap.dedent(inspect.getsource(rule.function)))
    swapped = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
    count = sum(isinstance(node, ast.BinOp | ast.Call) for node in ast.walk(source))
    for at in range(count):
        for choice in range(3):
            tree = ast.parse(ast.unparse(source))
            node = [node for node in ast.walk(tree) if isinstance(node, ast.BinOp | ast.Call)][at]
            if isinstance(node, ast.BinOp):
                other = ast.BinOp(node.left, swapped[type(node.op)](), node.right)
                new: ast.expr = (node.left, node.right, other)[choice]
            elif choice < len(node.args) and not isinstance(node.args[choice], ast.Constant | ast.Compare):
                new = node.args[choice]
            else:
                continue
            what = f"{ast.unparse(node)} -> {ast.unparse(new)}"
            replace = _Replace(node, new)
            namespace: dict[str, Any] = {}
            exec(compile(ast.fix_missing_locations(replace.visit(tree)), rule.name, "exec"), namespace)
            yield what, dataclasses.replace(rule, function=namespace[rule.name])


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.expr, new: ast.expr):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self.new if node is self.old else self.generic_visit(node)
