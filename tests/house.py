"""The structure of the package in figures, ``make house``: rooms, arrows, circles, sizes.

A room is a folder of the package with all that is in it, or a file beside the folders; an arrow is an import from one
room to another; the floors are the rooms on the longest way along arrows. A circle is a group of files that import each
other, at whatever depth of their code; an ``__init__`` that hands names on is no file of it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import median, quantiles

import pyro_amortized

PACKAGE = "pyro_amortized"
ROOT = Path(pyro_amortized.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))

Graph = Mapping[str, set[str]]


def module_of(path: Path) -> str:
    """Full name of a file's module; of a folder, for its ``__init__``."""
    parts = [PACKAGE, *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str) -> Iterator[str]:
    """Full names of all that a source imports, at any depth of the code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports within the package are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows_of_files(sources: Mapping[str, str]) -> Graph:
    """From each module to the modules of the package that it imports; faces, ``__init__``, stand for no file."""

    def target(name: str) -> str | None:
        while name not in sources and "." in name:
            name = name.rpartition(".")[0]
        return name if name in sources else None

    return {
        module: {t for name in imported(text) if (t := target(name))} - {module} for module, text in sources.items()
    }


def room_of(module: str) -> str:
    """The room of a module; the package's own ``__init__`` is one."""
    return ".".join(module.split(".")[:2])


def arrows_of_rooms(files: Graph) -> Graph:
    """From each room to the rooms that it imports from."""
    rooms: dict[str, set[str]] = {}
    for module, targets in files.items():
        room = room_of(module)
        rooms.setdefault(room, set()).update({room_of(target) for target in targets} - {room})
    return rooms


def circles(graph: Graph) -> list[set[str]]:
    """The groups of nodes that can be reached from each other."""

    def reached(start: str) -> set[str]:
        seen, left = set(), [start]
        while left:
            new = graph.get(left.pop(), set()) - seen
            seen |= new
            left += new
        return seen

    ways = {node: reached(node) for node in graph}
    found = {frozenset({b for b in ways[a] if a in ways.get(b, set())}) for a in graph if a in ways[a]}
    return [set(group) for group in found]


def floors(graph: Graph) -> int:
    """Length of the longest way, in nodes."""
    height: dict[str, int] = {}
    for node in TopologicalSorter(graph).static_order():
        height[node] = 1 + max((height[t] for t in graph.get(node, ())), default=0)
    return max(height.values())


def without_faces(files: Graph) -> Graph:
    """The arrows between files that are no ``__init__``."""
    faces = {module_of(path) for path in SOURCES if path.name == "__init__.py"}
    return {module: targets - faces for module, targets in files.items() if module not in faces}


@dataclass(frozen=True)
class Function:
    """A function: where it is, the lines of its body without the docstring, and the names of its arguments."""

    name: str
    size: int
    arguments: frozenset[str]


def functions(module: str, text: str) -> Iterator[Function]:
    """All functions of a source."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            has_text = ast.get_docstring(node) is not None
            body = node.body[1:] if has_text else node.body
            size = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]
            names = frozenset(a.arg for a in (*node.args.args, *node.args.kwonlyargs))
            yield Function(f"{module}.{node.name}", size, names)


def methods(module: str, text: str) -> Iterator[tuple[str, int]]:
    """All classes of a source with their numbers of methods."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            yield f"{module}.{node.name}", sum(isinstance(part, ast.FunctionDef) for part in node.body)


def private_uses(text: str) -> int:
    """How often a source uses a private attribute of something called a guide."""
    nodes = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute))
    return sum(node.attr.startswith("_") and ast.unparse(node.value).split(".")[-1] == "guide" for node in nodes)


def rooms_but_guides(sources: Mapping[str, str]) -> list[str]:
    """The sources that are not of the guides."""
    return [text for module, text in sources.items() if room_of(module) != f"{PACKAGE}.guides"]


def read_package() -> dict[str, str]:
    """The sources of the package by module."""
    return {module_of(path): path.read_text() for path in SOURCES}


def main() -> None:
    sources = read_package()
    files = arrows_of_files(sources)
    rooms = arrows_of_rooms(files)
    lines = {module: text.count("\n") for module, text in sources.items()}
    bodies = [function for module, text in sources.items() for function in functions(module, text)]
    classes = [found for module, text in sources.items() for found in methods(module, text)]
    sizes = sorted(function.size for function in bodies)
    upward = circles(rooms)
    print(f"rooms {len(rooms)}, floors {'none' if upward else floors(rooms)}, arrows {sum(map(len, rooms.values()))}")
    print(f"circles: of rooms {len(upward)}, of files {[sorted(group) for group in circles(without_faces(files))]}")
    print(f"files: {len(files)}, lines {sum(lines.values())}, median {median(lines.values()):.0f}")
    print(f"bodies: median {median(sizes):.0f}, 90 % below {quantiles(sizes, n=10)[-1]:.0f}, largest {sizes[-1]}")
    apart = [function.name for function in bodies if {"args", "kwargs", "structure"} <= function.arguments]
    print(f"functions with args, kwargs and a structure side by side: {', '.join(apart) or 'none'}")
    print(f"private names of a guide used outside of guides: {sum(map(private_uses, rooms_but_guides(sources)))}")
    for what, largest, limit in (
        ("lines of a file", lines.items(), 400),
        ("lines of a body", [(f.name, f.size) for f in bodies], 40),
        ("methods of a class", classes, 25),
    ):
        beyond = sorted((pair for pair in largest if pair[1] > limit), key=lambda pair: -pair[1])
        print(f"{what} above {limit}: {', '.join(f'{name} {size}' for name, size in beyond) or 'none'}")
    if "--rooms" in sys.argv:
        for room, targets in sorted(rooms.items()):
            print(f"  {room} -> {', '.join(sorted(targets))}")


if __name__ == "__main__":
    main()
