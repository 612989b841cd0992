"""A verifier of one Python function that runs nothing: it parses, compiles, and a small linter finds no fault."""

import ast
import builtins
import functools
import importlib
import inspect
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from trainers.verifiers import Verdict

BUILTINS = frozenset(dir(builtins)) - {"copyright", "credits", "exit", "license", "quit"}
MODULES = frozenset(sys.stdlib_module_names)
INSPECTED = {  # importing these does nothing else: their attributes are checked
    "array", "ast", "base64", "bisect", "codecs", "collections", "copy", "datetime", "errno", "fnmatch",
    "functools", "hashlib", "heapq", "inspect", "io", "itertools", "json", "keyword", "locale", "logging",
    "marshal", "math", "operator", "os", "pickle", "random", "re", "shutil", "socket", "stat", "string", "struct",
    "subprocess", "sys", "tempfile", "textwrap", "threading", "time", "token", "tokenize", "traceback", "types",
    "unicodedata", "urllib", "warnings", "weakref", "zlib"
}  # fmt: skip
EFFECTS = (ast.Call, ast.Await, ast.Yield, ast.YieldFrom)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
PLAIN = (ast.Pass, ast.Break, ast.Continue, ast.Global, ast.Nonlocal)

Names = set[str]


def verify(response: str, reference: str) -> Verdict:
    """1 if the reference, a function's first lines, and the response are one function without a fault; names the first.

    The response must add a statement that is not `pass` or the like.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(reference + response)
            compile(tree, "<response>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return Verdict(0.0, f"syntax: {getattr(error, 'msg', error)}")
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        return Verdict(0.0, "not one function")
    first = reference.count("\n") + 2 if reference else 2
    if not any(n.lineno >= first and not _idle(n) for n in ast.walk(tree.body[0]) if isinstance(n, ast.stmt)):
        return Verdict(0.0, "nothing added")
    try:
        _Linter().function(tree.body[0])
    except _Fault as fault:
        return Verdict(0.0, str(fault))
    return Verdict(1.0)


def parameters(arguments: ast.arguments) -> list[str]:
    """Names of all parameters."""
    a = arguments
    return [p.arg for p in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg) if p is not None]


def must_be_used(name: str) -> bool:
    """All names but `self`, `cls` and those with a leading underscore."""
    return name not in ("self", "cls") and not name.startswith("_")


class _Fault(Exception):
    pass


def _idle(node: ast.stmt) -> bool:
    return isinstance(node, PLAIN) or (isinstance(node, ast.Return) and isinstance(node.value, ast.Constant | None))


def _same(a: ast.AST, b: ast.AST) -> bool:
    return ast.dump(a).replace("Store()", "Load()") == ast.dump(b).replace("Store()", "Load()")


def _broken_out_of(body: Sequence[ast.AST]) -> bool:
    loops = (ast.For, ast.While, ast.FunctionDef)
    return any(
        isinstance(n, ast.Break) or _broken_out_of(n.orelse if isinstance(n, loops[:2]) else [])
        or (not isinstance(n, loops) and _broken_out_of(list(ast.iter_child_nodes(n))))
        for n in body
    )  # fmt: skip


@functools.cache
def _signature(name: str) -> inspect.Signature | None:
    try:
        return inspect.signature(getattr(builtins, name))
    except (TypeError, ValueError):
        return None


class _Linter:
    """Walks in order of execution with the names that are bound for certain; None stands for never reached."""

    def __init__(self) -> None:
        self.used: Names = set()
        self.outer: Names = set()

    def function(self, node: ast.FunctionDef, closure: Names = frozenset()) -> None:  # type: ignore[assignment]
        own = _own(node)
        loose = _loose(own)
        self.outer |= {name for n in own if isinstance(n, ast.Global | ast.Nonlocal) for name in n.names}
        named = parameters(node.args)
        end = self.block(node.body, set(closure) | set(named))
        stored = [n.id for n in own if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and id(n) not in loose]
        stored += [n.name for n in own if isinstance(n, ast.ExceptHandler) and n.name]
        stored += [(n.asname or n.name).split(".")[0] for n in own if isinstance(n, ast.alias)]
        for kind, names in (("parameter", named), ("variable", stored)):
            for name in names:
                if name not in self.used | self.outer and must_be_used(name):
                    raise _Fault(f"unused {kind}: {name}")
        valued = {n.value is not None for n in own if isinstance(n, ast.Return)}
        yields = any(isinstance(n, ast.Yield | ast.YieldFrom) for n in own)
        if not yields and True in valued and (False in valued or end is not None):
            raise _Fault("returns a value on some paths only")

    def block(self, body: Sequence[ast.stmt], bound: Names) -> Names | None:
        after: Names | None = set(bound)
        for previous, statement in zip([None, *body], body, strict=False):
            if after is None:
                raise _Fault("unreachable statement")
            if previous is not None and _same(previous, statement):
                raise _Fault("repeated statement")
            after = self.statement(statement, after)
        return after

    def statement(self, node: ast.stmt, bound: Names) -> Names | None:
        match node:
            case ast.Expr():
                if not isinstance(node.value, EFFECTS):
                    raise _Fault("statement without effect")
                self.read(node.value, bound)
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if node.value is not None:
                    self.read(node.value, bound)
                for target in targets:
                    if isinstance(node, ast.AugAssign) and isinstance(target, ast.Name):
                        self.name(target.id, bound, use=False)
                    if _same(target, node.value or node):
                        raise _Fault("assigned to itself")
                    self.bind(target, bound)
            case ast.If() | ast.While():
                always = isinstance(node.test, ast.Constant)
                if always and (isinstance(node, ast.If) or not node.test.value):  # type: ignore[attr-defined]
                    raise _Fault("constant condition")
                self.read(node.test, bound)
                inside = self.block(node.body, bound)
                if isinstance(node, ast.If):
                    return _both(inside, self.block(node.orelse, bound))
                if not always:
                    return _both(bound if _broken_out_of(node.body) else None, self.block(node.orelse, bound))
                if not any(isinstance(n, ast.Break | ast.Return | ast.Raise | ast.Yield) for n in ast.walk(node)):
                    raise _Fault("endless loop")
                return bound if _broken_out_of(node.body) else None
            case ast.For():
                self.read(node.iter, bound)
                inner = set(bound)
                self.bind(node.target, inner)
                self.block(node.body, inner)
                return _both(bound if _broken_out_of(node.body) else None, self.block(node.orelse, bound))
            case ast.Try():
                end = self.block(node.body, bound)
                if end is not None:
                    end = self.block(node.orelse, end)
                elif node.orelse:
                    raise _Fault("unreachable statement")
                for handler in node.handlers:
                    if handler.type is not None:
                        self.read(handler.type, bound)
                    named = {handler.name} if handler.name else set()
                    after = self.block(handler.body, bound | named)
                    end = _both(end, None if after is None else after - named)
                last = self.block(node.finalbody, bound)
                return None if end is None or last is None else end | last
            case ast.With():
                for item in node.items:
                    self.read(item.context_expr, bound)
                    if item.optional_vars is not None:
                        self.bind(item.optional_vars, bound)
                return self.block(node.body, bound)
            case ast.FunctionDef():
                for default in (*node.args.defaults, *node.args.kw_defaults, *node.decorator_list):
                    if default is not None:
                        self.read(default, bound)
                bound.add(node.name)
                self.function(node, bound)
            case ast.Import() | ast.ImportFrom():
                roots = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or "."]
                for root in roots:
                    if root.split(".")[0] not in MODULES:
                        raise _Fault(f"undefined module: {root}")
                bound |= {(a.asname or a.name).split(".")[0] for a in node.names}
            case ast.Delete():
                for target in node.targets:
                    self.read(target, bound)
                    bound -= {target.id} if isinstance(target, ast.Name) else set()
            case ast.Return() | ast.Raise() | ast.Assert():
                for child in ast.iter_child_nodes(node):
                    self.read(child, bound)
                return bound if isinstance(node, ast.Assert) else None
            case ast.Break() | ast.Continue():
                return None
            case ast.Pass() | ast.Global() | ast.Nonlocal():
                pass
            case _:
                raise _Fault(f"not accepted: {type(node).__name__}")
        return bound

    def bind(self, target: ast.expr, bound: Names) -> None:
        if isinstance(target, ast.Name):
            bound.add(target.id)
        elif isinstance(target, ast.Tuple | ast.List | ast.Starred):
            for element in getattr(target, "elts", None) or [target.value]:  # type: ignore[union-attr]
                self.bind(element, bound)
        else:
            self.read(target, bound)

    def name(self, name: str, bound: Names, use: bool = True) -> None:
        if name not in bound and name not in BUILTINS and name not in MODULES and name not in self.outer:
            raise _Fault(f"undefined name: {name}")
        if use:
            self.used.add(name)

    def read(self, node: ast.AST, bound: Names) -> None:
        match node:
            case ast.Name():
                return self.name(node.id, bound)
            case ast.NamedExpr():
                self.read(node.value, bound)
                return self.bind(node.target, bound)
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                bound = set(bound)
                for part in node.generators:
                    self.read(part.iter, bound)
                    self.bind(part.target, bound)
                    for condition in part.ifs:
                        self.read(condition, bound)
                for value in [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]:
                    self.read(value, bound)
                return None
            case ast.Lambda():
                bound = bound | set(parameters(node.args))
            case ast.Compare():
                if any(_same(a, b) for a, b in zip([node.left, *node.comparators], node.comparators, strict=False)):
                    raise _Fault("compared with itself")
            case ast.Call(func=ast.Name()):
                self.call(node, node.func.id, bound)  # type: ignore[attr-defined]
            case ast.Attribute():
                self.attribute(node, bound)
        for child in ast.iter_child_nodes(node):
            self.read(child, bound)
        return None

    def call(self, node: ast.Call, name: str, bound: Names) -> None:
        starred = any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords)
        signature = None if starred or name in bound or name not in BUILTINS else _signature(name)
        if signature is not None:
            try:
                signature.bind(*node.args, **{str(k.arg): k for k in node.keywords})
            except TypeError as error:
                raise _Fault(f"{name}(): {error}") from None

    def attribute(self, node: ast.Attribute, bound: Names) -> None:
        """Attributes of inspected modules, of their submodules such as os.path, and of strings must exist."""
        chain: list[str] = [node.attr]
        value: Any = node.value
        while isinstance(value, ast.Attribute):
            chain.append(value.attr)
            value = value.value
        if isinstance(value, ast.Name) and value.id in INSPECTED and value.id not in bound:
            found: Any = importlib.import_module(value.id)
        elif isinstance(value, ast.Constant) and isinstance(value.value, str | bytes):
            found = value.value
        else:
            return
        for attribute in reversed(chain):
            if not hasattr(found, attribute):
                raise _Fault(f"no such attribute: {attribute}")
            found = getattr(found, attribute)
            if not inspect.ismodule(found):
                return


def _both(a: Names | None, b: Names | None) -> Names | None:
    return b if a is None else a if b is None else a & b


def _own(function: ast.FunctionDef) -> list[ast.AST]:
    """Nodes of a function's body that are not in a nested function, lambda or comprehension."""
    found, stack = [], list[ast.AST](function.body)
    while stack:
        node = stack.pop()
        found.append(node)
        if not isinstance(node, (ast.FunctionDef, ast.Lambda, *COMPREHENSIONS)):
            stack += ast.iter_child_nodes(node)
    return found


def _loose(own: Sequence[ast.AST]) -> set[int]:
    """Targets that may stay unused: of loops, and in tuples."""
    loose: set[int] = set()
    for node in own:
        if isinstance(node, ast.For):
            loose |= {id(n) for n in ast.walk(node.target)}
        elif isinstance(node, ast.Tuple | ast.List):
            loose |= {id(n) for n in node.elts}
    return loose
