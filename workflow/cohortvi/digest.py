"""Digests of code, so that a rule reruns when what it runs has changed in meaning, and only then.

The digest of a script covers its syntax tree and those of all modules of the package that it imports, directly or
through others, without docstrings, comments and layout.
"""

import ast
import hashlib
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent


def code(script: str | Path) -> str:
    """Return 16 hexadecimal digits that change when the script, or package code that it reaches, changes."""
    script = Path(script)
    modules = sorted(_reach(script))
    parts = [_tree_digest(script), *(f"{path.relative_to(PACKAGE)} {_tree_digest(path)}" for path in modules)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _reach(script: Path) -> set[Path]:
    found: set[Path] = set()
    waiting = list(imported(script))
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting.extend(imported(path))
    return found


@cache
def imported(path: Path) -> tuple[Path, ...]:
    """Return the files of the package that the Python file `path` imports, at its top or inside functions."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    files = {_file(name) for name in names if name.split(".")[0] == PACKAGE.name}
    return tuple(sorted(file for file in files if file is not None))


def _file(name: str) -> Path | None:
    base = PACKAGE.joinpath(*name.split(".")[1:])
    return next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)


@cache
def _tree_digest(path: Path) -> str:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        is_block = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if is_block and ast.get_docstring(node, clean=False) is not None:
            node.body.pop(0)
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()
