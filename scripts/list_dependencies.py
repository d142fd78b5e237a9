"""Print the dependencies of a pyproject.toml, one a line: `list_dependencies.py pyproject.toml [extra,extra]`.

An image installs them before it copies the source, so that a change of code does not install them again.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def dependencies(document: Path, extras: list[str]) -> list[str]:
    """The requirement strings of the project and of the named extras.

    Raises:
        SystemExit: an extra that the project does not have.
    """
    project = tomllib.loads(document.read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    unknown = [extra for extra in extras if extra not in optional]
    if unknown:
        sys.exit(f"unknown extras {', '.join(unknown)}; there are {', '.join(sorted(optional))}")
    return [*project["dependencies"], *(line for extra in extras for line in optional[extra])]


if __name__ == "__main__":
    names = [name.strip() for name in (sys.argv[2] if len(sys.argv) > 2 else "").split(",") if name.strip()]
    sys.stdout.write("\n".join(dependencies(Path(sys.argv[1]), names)) + "\n")
