"""Check the Dockerfile where no engine runs: the rules of a linter that matter here, and that every COPY has a source.

What it finds: an image without a pinned version, a final stage that runs as root or has no HEALTHCHECK, ADD,
`apt-get` or `sudo` in a RUN line, a package installed with no lock, a shell-form CMD, a COPY of something
that the checkout or the .dockerignore does not let into the build.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction with its continuation lines joined; `line` is where it starts."""

    line: int
    name: str
    value: str


def parse(text: str) -> list[Instruction]:
    """The instructions of a Dockerfile in order; comments and blank lines left out."""
    instructions = []
    start, parts = 0, []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        start = start if parts else number
        parts.append(line.removesuffix("\\").strip())
        if not line.endswith("\\"):
            name, _, value = " ".join(parts).partition(" ")
            instructions.append(Instruction(start, name.upper(), value.strip()))
            parts = []
    return instructions


def stages(instructions: list[Instruction]) -> list[list[Instruction]]:
    """Instructions grouped by build stage; what stands before the first FROM is left out."""
    grouped: list[list[Instruction]] = []
    for instruction in instructions:
        if instruction.name == "FROM":
            grouped.append([])
        if grouped:
            grouped[-1].append(instruction)
    return grouped


def let_in(name: str, ignore: list[str]) -> bool:
    """Whether .dockerignore leaves a top-level path in the build context: the last matching rule decides."""
    admitted = True
    for rule in ignore:
        pattern = rule.removeprefix("!").removeprefix("/")
        if fnmatch(name, pattern) or fnmatch(name.split("/")[0], pattern):
            admitted = rule.startswith("!")
    return admitted


def _check_images(instructions: list[Instruction]) -> list[str]:
    defaults = dict(
        instruction.value.split("=", 1)
        for instruction in instructions
        if instruction.name == "ARG" and "=" in instruction.value
    )
    found = []
    for instruction in instructions:
        if instruction.name != "FROM":
            continue
        image = re.sub(r"\$\{(\w+)\}", lambda match: defaults.get(match[1], ""), instruction.value.split()[0])
        tag = image.rpartition(":")[2] if ":" in image else ""
        if not re.match(r"\d+\.\d+\.\d+", tag):
            found.append(f"{instruction.line}: the image {image!r} has no pinned version")
    return found


def _check_instruction(instruction: Instruction, ignore: list[str]) -> list[str]:
    found = []
    value = instruction.value
    if instruction.name == "ADD":
        found.append("use COPY; ADD unpacks and downloads")
    if instruction.name in {"CMD", "ENTRYPOINT"} and not value.startswith("["):
        found.append(f"{instruction.name} in shell form: signals would go to the shell")
    if instruction.name == "RUN":
        if re.search(r"\b(apt-get|sudo|curl|wget)\b", value):
            found.append("RUN may only use what the base image has")
        commands = re.findall(r"pip install[^&|;]*", value)
        locked = [command for command in commands if "-c requirements.lock" in command or "--no-deps" in command]
        if len(locked) < len(commands):
            found.append("pip install without the lock")
    if instruction.name == "COPY" and "--from=" not in value:
        for source in value.split()[:-1]:
            if source != "." and not (ROOT / source).exists():
                found.append(f"COPY of {source}, which the checkout does not have")
            elif source != "." and not let_in(source, ignore):
                found.append(f"COPY of {source}, which .dockerignore keeps out")
    return [f"{instruction.line}: {message}" for message in found]


def _check_final_stage(stage: list[Instruction]) -> list[str]:
    found = []
    users = [instruction for instruction in stage if instruction.name == "USER"]
    if not users or users[-1].value.split(":")[0] in {"root", "0"}:
        found.append(f"{stage[0].line}: the final stage runs as root")
    elif not users[-1].value.split(":")[0].isdigit():
        found.append(f"{users[-1].line}: a numeric USER lets a cluster see that it is not root")
    found += [
        f"{stage[0].line}: the final stage has no {name}"
        for name in ("HEALTHCHECK", "ENTRYPOINT", "EXPOSE")
        if not any(instruction.name == name for instruction in stage)
    ]
    return found


def findings(text: str, ignore: list[str]) -> list[str]:
    """All findings as `line: message`, in the order of the checks."""
    instructions = parse(text)
    found = _check_images(instructions)
    for instruction in instructions:
        found += _check_instruction(instruction, ignore)
    return found + _check_final_stage(stages(instructions)[-1])


def main() -> int:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    ignore = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    found = findings((ROOT / "Dockerfile").read_text(encoding="utf-8"), ignore)
    for message in found:
        sys.stderr.write(f"Dockerfile:{message}\n")
    sys.stdout.write(f"Dockerfile: {len(found)} finding(s)\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
