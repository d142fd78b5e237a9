"""The generated parts of the reference: tables made from the menus, the settings, the error tree and the command line.

A page holds a marker such as `<!-- generate: settings -->`; this hook of mkdocs puts the table in its place, so the
reference can not be older than the code. `python docs/generate.py` prints every part.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# mkdocs loads this file by its path, wherever it was started.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MARKER = re.compile(r"<!-- generate: (?P<part>[a-z]+)(?: (?P<argument>[\w-]+))? -->")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The hook: every marker of a page replaced by its part."""
    return fill(markdown)


def fill(markdown: str) -> str:
    """Raises KeyError for a marker that names no part."""
    return MARKER.sub(lambda match: PARTS[match["part"]](match["argument"] or ""), markdown)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; `|` and line ends in cells are escaped."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(cell.replace("|", r"\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def code(value: Any) -> str:
    """A value as code, JSON's way: what a request would hold."""
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def settings_part(_: str) -> str:
    from app.settings import Settings

    prefix = Settings.model_config.get("env_prefix", "")
    rows = []
    for name, field in Settings.model_fields.items():
        default = "" if field.default in ("", ()) else _plain_default(field.default)
        rows.append([code(f"{prefix}{name.upper()}"), _type_name(field.annotation), default, field.description or ""])
    return table(["variable", "type", "default", "meaning"], rows)


def _plain_default(value: Any) -> str:
    if isinstance(value, bool):
        return code("on" if value else "off")
    return code(str(value) if isinstance(value, Path) else value)


def _type_name(annotation: Any) -> str:
    """A setting's type in words."""
    text = str(annotation)
    if "Literal[" in text:
        return " or ".join(f"`{value}`" for value in re.findall(r"'([^']*)'", text))
    if "tuple[" in text:
        return "list of networks" if "Network" in text else "list of paths"
    name = getattr(annotation, "__name__", text)
    return {"str": "text", "bool": "on or off", "int": "whole number", "float": "number", "Path": "path"}.get(
        name, name
    )


def errors_part(_: str) -> str:
    from app.problems import error_classes

    rows = []
    for error_code, cls in sorted(error_classes().items(), key=lambda item: (item[1].status, item[0])):
        if cls.__module__ in {"artifacts.errors", "app.problems"}:
            rows.append([f'<span id="{error_code}"></span>`{error_code}`', str(cls.status), cls.title, _meaning(cls)])
    return table(["code", "status", "title", "when"], rows)


def _meaning(cls: type) -> str:
    """What the drawn tree says beside the class, else the first line of the class's own docstring."""
    tree = inspect.getdoc(inspect.getmodule(cls)) or ""
    drawn = re.search(rf"\b{cls.__name__}\s+\d{{3}} \w+ +(?P<meaning>\S.*)", tree)
    if drawn:
        return drawn["meaning"].strip()
    own = cls.__dict__.get("__doc__") or ""
    return str(own).strip().splitlines()[0] if own.strip() else ""


def menu_part(_: str) -> str:
    from merge.catalog import METHODS

    rows = [
        [
            f"[`{row.name}`]({row.page})",
            row.title,
            row.summary,
            f"[{row.arxiv}](https://arxiv.org/abs/{row.arxiv})" if row.arxiv else "",
            "yes" if row.capabilities.negative_weights else "no",
            "yes" if row.capabilities.exact_sum else "no",
        ]
        for row in METHODS.values()
    ]
    return table(["method", "title", "what it does", "arXiv", "negative weights", "exact sum"], rows)


def search_part(_: str) -> str:
    """What a search of merges takes."""
    from merge.catalog import SEARCH

    return _parameters(SEARCH.options)


def method_part(name: str) -> str:
    from merge.catalog import METHODS

    row = METHODS[name]
    schema = row.options.model_json_schema(by_alias=False)
    required = set(schema.get("required", []))
    rows = [
        [
            code(parameter),
            values_of(field, schema.get("$defs", {})),
            "required" if parameter in required else code(field.get("default")),
            field.get("description", ""),
        ]
        for parameter, field in schema["properties"].items()
    ]
    reference = f"arXiv:[{row.arxiv}](https://arxiv.org/abs/{row.arxiv})" if row.arxiv else f"<{row.reference_url}>"
    head = f"{row.summary}\n\nReference: {reference}.\n\n"
    return head + table(["parameter", "values", "default", "meaning"], rows)


def training_part(_: str) -> str:
    """The menu of training methods, and each with its parameters."""
    from train.catalog import METHODS

    rows = [
        [
            f"[`{row.name}`](#{row.name})",
            row.summary,
            f"[{row.arxiv}](https://arxiv.org/abs/{row.arxiv})" if row.arxiv else "",
            row.capabilities.exports,
            "yes" if row.capabilities.mergeable else "no",
        ]
        for row in METHODS.values()
    ]
    menu = table(["method", "what it does", "arXiv", "comes out as", "mergeable"], rows)
    sections = [
        f"## {row.title} {{ #{row.name} }}\n\n{inspect.getdoc(row.options)}\n\n* When: {row.when}\n* Cost: {row.cost}\n"
        f"* Comes out as: {row.output}\n* Goes on from: {_continues(row.capabilities.continues)}\n\n"
        f"{_parameters(row.options)}"
        for row in METHODS.values()
    ]
    return "\n\n".join([menu, *sections])


def _continues(kinds: tuple[str, ...]) -> str:
    """The types of adapters that a method goes on from."""
    return f"{' and '.join(kinds)} adapters (`continue_from`)." if kinds else "no stored adapter; it starts anew."


def composing_part(_: str) -> str:
    """The menu of composition methods, and each with its parameters."""
    from compose.catalog import METHODS

    rows = [
        [
            f"[`{row.name}`](#{row.name})",
            row.summary,
            f"[{row.arxiv}](https://arxiv.org/abs/{row.arxiv})" if row.arxiv else "",
            "an image" if row.capabilities.yields == "image" else "an adapter",
            "yes" if row.capabilities.masks else "no",
            "yes" if row.capabilities.styles else "no",
        ]
        for row in METHODS.values()
    ]
    menu = table(["method", "what it does", "arXiv", "gives", "masks", "styles"], rows)
    sections = [
        f"## {row.title} {{ #{row.name} }}\n\n{inspect.getdoc(row.options)}\n\n* When: {row.when}\n"
        f"* Cost: {row.cost}\n\n{_parameters(row.options)}"
        for row in METHODS.values()
    ]
    return "\n\n".join([menu, *sections])


def recipe_part(name: str) -> str:
    """The parameters that a training takes besides its method's."""
    from train import settings

    models = {
        "training": settings.TrainingSettings,
        "evaluation": settings.EvaluationSettings,
    }
    return _parameters(models[name])


def quantisation_part(_: str) -> str:
    """The parameters of a quantisation, and those of its grid."""
    from train.options.fisher import FisherSettings
    from train.options.quantisation import FormatGrid, QuantisationOptions

    parts = {"`grid` is an object of": FormatGrid, "`fisher` takes, beside `dataset`,": FisherSettings}
    tables = [f"{head}\n\n{_parameters(model)}" for head, model in parts.items()]
    return "\n\n".join([_parameters(QuantisationOptions), *tables])


def transfer_part(_: str) -> str:
    """The menu of transfer methods, and each with its parameters."""
    from transfer.catalog import METHODS

    def yes(value: bool) -> str:
        return "yes" if value else "no"

    rows = [
        [
            f"[`{row.name}`](#{row.name})",
            row.summary,
            f"[{row.arxiv}](https://arxiv.org/abs/{row.arxiv})" if row.arxiv else "",
            yes(row.capabilities.trains),
            yes(row.capabilities.any_source),
            yes(row.capabilities.across_widths),
            ", ".join(row.capabilities.needs),
        ]
        for row in METHODS.values()
    ]
    columns = ["method", "what it does", "arXiv", "trains", "any adapter", "across widths", "needs"]
    sections = [
        f"## {row.title} {{ #{row.name} }}\n\n{inspect.getdoc(row.options)}\n\n* When: {row.when}\n"
        f"* Cost: {row.cost}\n\n{_parameters(row.options)}"
        for row in METHODS.values()
    ]
    return "\n\n".join([table(columns, rows), *sections])


def gate_part(_: str) -> str:
    """The parameters of the gate of transfers."""
    from transfer.gate_settings import GateSettings

    return _parameters(GateSettings)


def tasks_part(_: str) -> str:
    """Every task with its parameters."""
    from train.settings import TASKS

    return "\n\n".join(
        f"#### `{name}` {{ #task-{name} }}\n\n{inspect.getdoc(model)}\n\n{_parameters(model)}"
        for name, model in TASKS.items()
    )


def _parameters(model: Any) -> str:
    schema = model.model_json_schema(by_alias=False)
    rows = [
        [
            code(parameter),
            values_of(field, schema.get("$defs", {})),
            code(field.get("default")),
            field.get("description", ""),
        ]
        for parameter, field in schema["properties"].items()
    ]
    return table(["parameter", "values", "default", "meaning"], rows)


def values_of(field: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """The values that a JSON-Schema field takes, in words."""
    if "$ref" in field:
        return values_of(definitions[str(field["$ref"]).rpartition("/")[2]], definitions)
    if "anyOf" in field:
        return ", or ".join(values_of(option, definitions) for option in field["anyOf"])
    if "enum" in field:
        return ", ".join(code(value) for value in field["enum"])
    if "const" in field:
        return code(field["const"])
    words = {"integer": "whole number", "number": "number", "boolean": "true or false", "null": "`null`"}
    name = words.get(str(field.get("type")), str(field.get("type", "anything")))
    bounds = (
        ("minimum", "≥"),
        ("exclusiveMinimum", ">"),
        ("maximum", "≤"),
        ("exclusiveMaximum", "<"),
    )
    limits = [f"{sign} {field[key]}" for key, sign in bounds if key in field]
    return f"{name} {', '.join(limits)}".strip()


def http_part(_: str) -> str:
    from app.main import create_app
    from app.settings import Settings

    with tempfile.TemporaryDirectory() as folder:
        paths = create_app(Settings(data_dir=Path(folder))).openapi()["paths"]
    rows = []
    for path, operations in paths.items():
        for verb, operation in operations.items():
            statuses = ", ".join(sorted(str(status) for status in operation["responses"]))
            text = operation.get("summary", "")
            rows.append([code(f"{verb.upper()} {path}"), text, statuses])
    return table(["call", "does", "answers"], rows)


def cli_part(_: str) -> str:
    from typer.main import get_command

    from app.cli.program import app

    return "\n\n".join(_command_sections(get_command(app), "rankwise"))


def _command_sections(command: Any, path: str) -> Iterator[str]:
    if not getattr(command, "commands", None) or path == "rankwise":
        yield _command_section(command, path)
    for name, child in sorted(getattr(command, "commands", {}).items()):
        yield from _command_sections(child, f"{path} {name}")


def _command_section(command: Any, path: str) -> str:
    arguments, rows = [], []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            shown = parameter.metavar or parameter.name.upper()
            arguments.append(shown)
            names = f"`{shown}`"
        else:
            names = ", ".join(f"`{option}`" for option in [*parameter.opts, *parameter.secondary_opts])
        rows.append([names, _option_default(parameter), getattr(parameter, "help", None) or ""])
    usage = " ".join([path, "[OPTIONS]", *arguments, *(["COMMAND"] if getattr(command, "commands", None) else [])])
    text = inspect.cleandoc(command.help or "")
    return f"## `{path}`\n\n{text}\n\n```text\n{usage}\n```\n\n" + table(["option", "default", "meaning"], rows)


def _option_default(parameter: Any) -> str:
    default = parameter.default
    if default is None or default is False or callable(default) or parameter.required or parameter.name == "help":
        return ""
    if default is True:
        return code(parameter.opts[0])
    return code(str(getattr(default, "value", default)))


def readers_part(_: str) -> str:
    from artifacts.formats.table import READERS

    rows = [["`peft`", "a PEFT directory, or one file with its configuration in the metadata"]]
    rows += [[f"`{reader.name}`", (type(reader).__doc__ or "").rstrip(".")] for reader in READERS]
    return table(["format", "names"], rows)


def architectures_part(_: str) -> str:
    from artifacts.formats.architectures import DENOISERS, TEXT_ENCODERS, architecture

    titles = [architecture(name).title for name in (*DENOISERS, *TEXT_ENCODERS)]
    return ", ".join(titles) + "."


def formats_part(_: str) -> str:
    from scripts.formats_report import report

    return report()[0]


def engines_part(_: str) -> str:
    from scripts.formats_figures import engines_table, kept_figures

    return engines_table(kept_figures())


def roundtrips_part(_: str) -> str:
    from scripts.formats_figures import kept_figures, round_trips_table

    return round_trips_table(kept_figures())


PARTS: Mapping[str, Callable[[str], str]] = {
    "settings": settings_part,
    "errors": errors_part,
    "menu": menu_part,
    "method": method_part,
    "search": search_part,
    "http": http_part,
    "cli": cli_part,
    "training": training_part,
    "composing": composing_part,
    "quantisation": quantisation_part,
    "recipe": recipe_part,
    "tasks": tasks_part,
    "transfer": transfer_part,
    "gate": gate_part,
    "readers": readers_part,
    "architectures": architectures_part,
    "formats": formats_part,
    "engines": engines_part,
    "roundtrips": roundtrips_part,
}


def _print_all() -> None:
    from merge.catalog import METHODS

    for name, part in PARTS.items():
        arguments = {"method": list(METHODS), "recipe": ["training", "evaluation"]}
        for argument in arguments.get(name, [""]):
            sys.stdout.write(f"<!-- {name} {argument} -->\n{part(argument)}\n\n")


if __name__ == "__main__":
    _print_all()
