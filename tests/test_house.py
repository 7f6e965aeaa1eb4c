"""The house: imports point down its list of folders, without cycles, and its rooms stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# what each folder may import, besides itself and the files at the root
MAY_IMPORT = {
    "kernels": set(),
    "mixers": {"kernels"},
    "models": {"kernels", "mixers"},
    "tasks": set(),
    "training": {"kernels", "mixers", "models", "tasks"},
    "contract": {"kernels", "mixers", "models", "tasks", "training"},
}
MOST_FILES = 15


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path, known: set[str]) -> Iterator[tuple[int, str]]:
    """Line and name of every module of ours that a file imports, inside functions too, but not for types alone."""
    package = path.relative_to(ROOT).parent.parts
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in for_types:
            continue
        if not node.level and (node.module or "").split(".")[0] != "mixerzoo":
            continue
        base = list(package[: len(package) - node.level + 1]) if node.level else []
        base += (node.module or "").removeprefix("mixerzoo").strip(".").split(".") if node.module else []
        base = [part for part in base if part]
        for alias in node.names:
            full = ".".join([*base, alias.name])
            yield node.lineno, full if full in known else ".".join(base)


def graph() -> dict[str, set[str]]:
    """Module -> the modules that it imports, over the folders of the package."""
    files = {module_name(p): p for folder in MAY_IMPORT for p in (ROOT / folder).rglob("*.py")}
    return {name: {m for _, m in imported(path, set(files)) if m in files} - {name} for name, path in files.items()}


def cycles(edges: dict[str, set[str]]) -> list[set[str]]:
    """Groups of modules each of which reaches the others."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        stack = [start]
        while stack:
            for other in edges.get(stack.pop(), ()):
                if other not in seen:
                    seen.add(other)
                    stack.append(other)
        return seen

    reach = {name: reached(name) for name in edges}
    return [{name, *(b for b in reach[name] if name in reach[b])} for name in edges if name in reach[name]]


def test_imports_point_down() -> None:
    root = {path.stem for path in ROOT.glob("*.py")} - {"train", "setup"} | {"__version__", ""}
    upward = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for folder, allowed in MAY_IMPORT.items()
        for path in (ROOT / folder).rglob("*.py")
        for line, module in imported(path, set())
        if module.split(".")[0] not in {*allowed, folder, *root}
    ]
    assert not upward, upward


def test_no_cycles() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [{"b", "c"}, {"b", "c"}]  # it finds what it looks for
    edges = graph()
    assert "kernels.common.dispatch" in edges["kernels.gla"]
    assert not cycles(edges)


def test_rooms_are_small() -> None:
    crowded = {
        str(room.relative_to(ROOT)): count
        for folder in (*MAY_IMPORT, "tools")
        for room in [ROOT / folder, *(p for p in (ROOT / folder).rglob("*") if p.is_dir())]
        if (count := len(list(room.glob("*.py")))) > MOST_FILES
    }
    assert not crowded, crowded
