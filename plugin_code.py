"""What the code of a part from outside is: its files with what they import, or the cells of a notebook.

It counts in the identity of runs and is kept in their folders; see `plugins.used`.
"""

from __future__ import annotations

import ast
import hashlib
import linecache
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Code:
    """The code of parts from outside that a run uses.

    Attributes:
        spec: what loads it in another process; None for parts of a script or a notebook.
        parts: kind and name of each.
        sha256: of the code.
        sources: name of each file -> its content, to be kept.
    """

    spec: str | None
    parts: list[tuple[str, str]]
    sha256: str
    sources: dict[str, bytes]


def digest(contents: Iterable[tuple[str, bytes]]) -> str:
    """SHA-256 (hex) of names and contents."""
    found = hashlib.sha256()
    for name, content in contents:
        found.update(name.encode() + b"\0" + content + b"\0")
    return found.hexdigest()


def own_files(entries: Iterable[Path], root: Path) -> list[Path]:
    """Python files, and those below `root` that they import, directly or by way of others."""
    found: dict[Path, None] = {}
    stack = [path.resolve() for path in entries]
    while stack:
        path = stack.pop()
        if path in found or "site-packages" in path.relative_to(root).parts:
            continue
        found[path] = None
        for node in ast.walk(ast.parse(path.read_bytes())):
            stack += [file.resolve() for file in _imported_files(node, path, root)]
    return list(found)


def _imported_files(node: ast.AST, path: Path, root: Path) -> Iterator[Path]:
    """The files below `root` that an import statement of the file `path` names."""
    if isinstance(node, ast.Import):
        bases = [(root, alias.name.split(".")) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        start = root if not node.level else path.parents[node.level - 1]
        parts = (node.module or "").split(".") if node.module else []
        bases = [(start, parts), *((start, [*parts, alias.name]) for alias in node.names)]
    else:
        return
    for start, parts in bases:
        for i in range(1, len(parts) + 1):
            place = start.joinpath(*parts[:i])
            for file in (place.with_suffix(".py"), place / "__init__.py"):
                if file.is_file() and file.resolve().is_relative_to(root.resolve()):
                    yield file


def code_of_script(module: str, parts: Sequence[tuple[str, str, Any]]) -> Code:
    """Parts that no plugin brought: those of a script, or of a notebook, whose cells are no files."""
    kinds = [(kind, name) for kind, name, _ in parts]
    file = getattr(sys.modules.get(module), "__file__", None)
    if file is not None and Path(file).suffix == ".py":
        path = Path(file).resolve()
        files = sorted(own_files([path], path.parent))
        sources = {f.relative_to(path.parent).as_posix(): f.read_bytes() for f in files}
        spec = None if module == "__main__" else module
        return Code(spec, kinds, digest(sources.items()), sources)
    content: dict[str, bytes] = {}
    cells: dict[str, None] = {}
    for _, _, value in parts:
        _collect(value, module, content, cells)
    sources = {f"cell{i}.py": "".join(linecache.getlines(cell)).encode() for i, cell in enumerate(cells)}
    return Code(None, kinds, digest(sorted(content.items())), sources)


def _collect(value: Any, module: str, content: dict[str, bytes], cells: dict[str, None]) -> None:
    """What a class or function does, and all that it uses from its own module, by name; and where that stands."""
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        value = value.fget
    if getattr(value, "__module__", None) != module or getattr(value, "__qualname__", None) in content:
        return
    if isinstance(value, type):
        plain = {name: repr(v) for name, v in vars(value).items() if isinstance(v, _CONSTANTS) and name[:2] != "__"}
        content[value.__qualname__] = repr(sorted(plain.items())).encode()
        for inner in (*value.__bases__, *vars(value).values()):
            _collect(inner, module, content, cells)
    elif isinstance(value, types.FunctionType):
        cells[value.__code__.co_filename] = None
        content[value.__qualname__] = _fixed(value.__code__) + repr((value.__defaults__, value.__kwdefaults__)).encode()
        for name in _names(value.__code__) & value.__globals__.keys():
            used_there = value.__globals__[name]
            if isinstance(used_there, _CONSTANTS):
                content[name] = repr(used_there).encode()
            else:
                _collect(used_there, module, content, cells)


_CONSTANTS = (bool, int, float, str, bytes, tuple, list, dict, set, frozenset, type(None))


def _names(code: types.CodeType) -> set[str]:
    inner = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*(_names(c) for c in inner))


def _fixed(code: types.CodeType) -> bytes:
    """A function's code without line numbers and the name of its cell."""
    constants = [_fixed(c) if isinstance(c, types.CodeType) else repr(c).encode() for c in code.co_consts]
    return b"\0".join([code.co_code, *constants, *(n.encode() for n in (*code.co_names, *code.co_varnames))])
