"""Fail when a module or a function has grown past the limits of the house. Size is where bugs hide."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# (folders, lines of a module, lines of a function)
LIMITS = (
    (("app", "artifacts", "integrations", "merge", "storage", "transfer", "workers", "scripts"), 400, 80),
    (("benchmarks", "docs", "examples", "tests"), 500, 100),
)
FORBIDDEN_NAMES = ("utils.py", "helpers.py", "misc.py")


def findings(path: Path, module_limit: int, function_limit: int) -> list[str]:
    """What is too large in one file, or named after nothing, as `path:line: message`."""
    source = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT)
    found = []
    if path.name in FORBIDDEN_NAMES:
        found.append(f"{name}:1: a module is a noun; name it after what it holds")
    lines = source.count("\n")
    if lines > module_limit:
        found.append(f"{name}:1: {lines} lines, at most {module_limit}")
    for node in ast.walk(ast.parse(source, filename=str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > function_limit:
                found.append(f"{name}:{node.lineno}: {node.name}() has {length} lines, at most {function_limit}")
    return found


def main() -> int:
    found = [
        message
        for folders, module_limit, function_limit in LIMITS
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
        for message in findings(path, module_limit, function_limit)
    ]
    for message in found:
        sys.stderr.write(message + "\n")
    sys.stdout.write(f"sizes: {len(found)} finding(s)\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
