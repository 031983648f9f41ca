"""Small faults for planting: each mutant is the source of a module with one thing changed, as by a slip of the hand."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

_COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
}
_FUNCTIONS = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One planted fault."""

    number: int
    line: int
    change: str
    _tree: ast.Module
    _position: int
    """Of the changed node in a walk of the tree."""
    _replacement: ast.AST

    @property
    def source(self) -> str:
        return ast.unparse(ast.fix_missing_locations(_replaced(self._tree, self._position, self._replacement)))


def mutants(source: str) -> Iterator[Mutant]:
    """All of a module's, in the order of its lines; each changes one expression or leaves out one statement of a function."""
    tree = ast.parse(source)
    found = sorted(_mutate(tree), key=lambda each: each[0])
    for number, (line, change, position, replacement) in enumerate(found):
        yield Mutant(number, line, change, tree, position, replacement)


def _mutate(tree: ast.Module) -> Iterator[tuple[int, str, int, ast.AST]]:
    positions = {node: position for position, node in enumerate(ast.walk(tree))}
    for node in positions:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for inner in _behaviour(node):
            for change, replacement in _changes(inner):
                yield inner.lineno, change, positions[inner], replacement


def _behaviour(function: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """What runs when the function does: not signature or documentation, nor functions inside it, which come by themselves."""
    stack = list(getattr(function, "body", ()))
    while stack:
        node = stack.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.expr | ast.stmt):
            yield node
        skipped = node.annotation if isinstance(node, ast.AnnAssign) else None
        stack += [child for child in ast.iter_child_nodes(node) if child is not skipped]


def _changes(node: ast.expr | ast.stmt) -> Iterator[tuple[str, ast.AST]]:
    match node:
        case ast.Compare(ops=[operator]):
            for other in _COMPARISONS.get(type(operator), ()):
                yield _told(node, changed := _with(node, ops=[other()])), changed
        case ast.BinOp() if type(node.op) in _ARITHMETIC:
            yield _told(node, changed := _with(node, op=_ARITHMETIC[type(node.op)]())), changed
        case ast.BoolOp():
            other_op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            yield _told(node, changed := _with(node, op=other_op)), changed
        case ast.UnaryOp(op=ast.Not()):
            yield _told(node, node.operand), node.operand
        case ast.UnaryOp(op=ast.USub()):
            yield _told(node, node.operand), node.operand
        case ast.Call(func=ast.Name(id=name)) if name in _FUNCTIONS:
            yield _told(node, changed := _with(node, func=ast.Name(_FUNCTIONS[name], ast.Load()))), changed
        case ast.Constant(value=bool(value)):
            yield f"{value} -> {not value}", ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield f"{value} -> {value + 1}", ast.Constant(value + 1)
        case ast.IfExp():
            yield _told(node, changed := _with(node, body=node.orelse, orelse=node.body)), changed
        case ast.AugAssign() if type(node.op) in _ARITHMETIC:
            yield _told(node, changed := _with(node, op=_ARITHMETIC[type(node.op)]())), changed
            yield _told(node, None), ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]) | ast.Expr() | ast.Delete() | ast.Raise():
            yield _told(node, None), ast.Pass()
        case ast.Return(value=ast.expr()):
            yield _told(node, None), ast.Return(None)
        case ast.Break():
            yield "break -> continue", ast.Continue()
        case ast.Continue():
            yield "continue -> break", ast.Break()
        case ast.If() | ast.While():
            negated = _with(node, test=ast.UnaryOp(ast.Not(), node.test))
            yield f"{_short(node.test)} -> not", negated


def _with(node: ast.AST, **changes: object) -> ast.AST:
    changed = copy.copy(node)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def _told(node: ast.AST, changed: ast.AST | None) -> str:
    return f"{_short(node)} -> {_short(changed) if changed else 'nothing'}"


def _short(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= 70 else f"{text[:69]}…"


def _replaced(tree: ast.Module, position: int, replacement: ast.AST) -> ast.Module:
    """A copy of the tree with the node at this position of a walk replaced."""
    fresh = copy.deepcopy(tree)
    old = next(node for number, node in enumerate(ast.walk(fresh)) if number == position)
    new = ast.copy_location(copy.deepcopy(replacement), old)
    for parent in ast.walk(fresh):
        for name, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, name, new)
                return fresh
            if isinstance(value, list) and any(one is old for one in value):
                value[next(i for i, one in enumerate(value) if one is old)] = new
                return fresh
    raise AssertionError("unreachable: every node but the tree itself has a parent")
