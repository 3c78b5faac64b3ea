"""The command line: ``python -m bench`` lists, ``python -m bench NAME`` runs."""

from __future__ import annotations

import importlib
import json
import pkgutil
from pathlib import Path

import click

import bench
from bench.harness import Benchmark, Report


def _benchmarks() -> dict[str, Benchmark]:
    """The benchmarks of this package by name: each file's ``BENCHMARKS``, where it has some."""
    names = [
        module.name for module in pkgutil.iter_modules(bench.__path__) if module.name != "__main__" and not module.ispkg
    ]
    modules = [importlib.import_module(f"bench.{name}") for name in names]
    return {benchmark.name: benchmark for module in modules for benchmark in getattr(module, "BENCHMARKS", ())}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("name", required=False)
@click.option("--json", "file", type=click.Path(dir_okay=False, path_type=Path), help="Write the result to FILE too.")
@click.option("--quick", is_flag=True, help="Run for seconds, to see that it works; the figures mean nothing.")
def main(name: str | None, file: Path | None, quick: bool) -> None:
    """Run the benchmark NAME and print its tables; without NAME, list what there is."""
    benchmarks = _benchmarks()
    if name is None:
        width = max(map(len, benchmarks))
        for benchmark in benchmarks.values():
            click.echo(f"{benchmark.name:{width}}  {benchmark.summary}")
        return
    if name not in benchmarks:
        raise click.BadParameter(f"no benchmark {name!r}; there are {', '.join(benchmarks)}", param_hint="NAME")
    report = Report(name, quick=quick)
    benchmarks[name].run(report)
    report.finish()
    if file is not None:
        file.write_text(json.dumps(report.as_json(), indent=2) + "\n")


if __name__ == "__main__":
    main(prog_name="python -m bench")
