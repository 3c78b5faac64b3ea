"""What all benchmarks share: how time is taken, how a result is reported, what the machine is.

It hides how noise is fought. Alternatives are timed in turn within each repetition, so that a slow second of the
machine hits all of them; ratios are formed within a repetition, and the median of the repetitions is reported. The
garbage collector is off while a clock runs. Measurements of memory and of the collector get a fresh process each.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import sysconfig
import time
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, TypeVar, cast

try:
    from rich.box import MARKDOWN
    from rich.console import Console
    from rich.table import Table
except ImportError:
    Console = None  # type: ignore[assignment, misc]

_F = TypeVar("_F", bound=Callable[..., Any])
_T = TypeVar("_T")

_ROOT = Path(__file__).resolve().parent.parent
# Several times the last-level cache of current servers' cores (32 MiB on the machine of the published tables).
_EVICTION_BYTES = 128 << 20
_LIBRARIES = ("Cython", "click", "picows", "pytest-benchmark", "rich", "uvloop", "websockets")


# Windows counts processor time in steps of 15 ms.
_HAS_THREAD_TIME = time.get_clock_info("thread_time").resolution <= 1e-6
_clock_ns = time.thread_time_ns if _HAS_THREAD_TIME else time.perf_counter_ns


@dataclass(frozen=True)
class Benchmark:
    """One entry of ``python -m bench``."""

    name: str
    summary: str
    run: Callable[[Report], None]


# ---- time ------------------------------------------------------------------------------------------------------------


def seconds(function: Callable[..., object], *args: object) -> float:
    """How long this thread works on one call, with the garbage collector off.

    Processor time, not wall-clock time: it leaves out what other processes do on the same core meanwhile, and what is
    timed with it does not wait. It is read by a system call, so a figure has up to a microsecond too much.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        begin = _clock_ns()
        function(*args)
        return (_clock_ns() - begin) / 1e9
    finally:
        if was_enabled:
            gc.enable()


def own_code(function: _F) -> _F:
    """A copy of a Python function with bytecode of its own.

    The interpreter specialises bytecode for the types it meets there. A loop that is shared by all alternatives would
    be specialised for the first of them.
    """
    code = function.__code__.replace()
    return cast(_F, types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__))


@cache
def _eviction_buffer() -> bytearray:
    return bytearray(b"\1") * _EVICTION_BYTES


def evict_caches() -> None:
    """Fill the processor's caches with something else, so that nobody finds there what another one has loaded."""
    _eviction_buffer().find(b"\0")


class Samples:
    """Figures of several alternatives from the same repetitions."""

    def __init__(self) -> None:
        self._of: dict[str, list[float]] = {}

    def add(self, name: str, figure: float) -> None:
        self._of.setdefault(name, []).append(figure)

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def median(self, name: str) -> float:
        return median(self._of[name])

    def ratio(self, name: str, base: str) -> float:
        """The median of *name* / *base*, divided within each repetition."""
        return median(a / b for a, b in zip(self._of[name], self._of[base], strict=True))

    def ratio_to(self, other: Samples, name: str) -> float:
        """The median of *name* divided by what *other* has of it, within each repetition."""
        return median(a / b for a, b in zip(self._of[name], other._of[name], strict=True))


def interleave(cases: Mapping[str, Callable[[_T], float]], repetitions: int, draw: Callable[[int], _T]) -> Samples:
    """Take a figure of each case in each repetition.

    Args:
        cases: by name; each gets what was drawn for the repetition and returns its figure.
        repetitions: how many; each begins with another case.
        draw: makes what the cases of a repetition share, from its number.
    """
    samples = Samples()
    names = list(cases)
    for repetition in range(repetitions):
        material = draw(repetition)
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            samples.add(name, cases[name](material))
    return samples


def in_fresh_process(module: str, *args: object) -> Any:
    """Run ``python -m module args...`` and return the JSON that it prints."""
    command = [sys.executable, "-m", module, *map(str, args)]
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, stdout=subprocess.PIPE, check=True, env={**os.environ, "PYTHONPATH": path}, cwd=_ROOT
    )
    return json.loads(done.stdout)


# ---- the machine -----------------------------------------------------------------------------------------------------


def gil_enabled() -> bool:
    """Whether this process runs under a GIL."""
    return bool(getattr(sys, "_is_gil_enabled", lambda: True)())


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What the figures depend on. No host name."""
    build = "free-threaded" if sysconfig.get_config_var("Py_GIL_DISABLED") else "default"
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()} ({build} build)",
        "gil": gil_enabled(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "libraries": {name: version for name in _LIBRARIES if (version := _version(name)) is not None},
    }


# ---- reports ---------------------------------------------------------------------------------------------------------


def figure(value: float | None, unit: str = "") -> str:
    """A number as a table shows it: three digits that count, and ``-`` for none."""
    if value is None:
        return "-"
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{text} {unit}".rstrip()


class Report:
    """What a benchmark has found: tables on the screen as they come, rows and targets for the JSON file.

    Args:
        name: of the benchmark.
        quick: the run only shows that the code works; targets are left out.
    """

    def __init__(self, name: str, *, quick: bool = False) -> None:
        self.name = name
        self.quick = quick
        self.machine = machine()
        self._rows: list[dict[str, Any]] = []
        self._targets: list[dict[str, Any]] = []
        self._print_machine()

    def row(self, **values: Any) -> None:
        """Add a row to the JSON file."""
        self._rows.append(values)

    def at_least(self, what: str, value: float, least: float, unit: str) -> None:
        """Note a target of the project, and whether *value* meets it."""
        self._target(what, f"at least {figure(least, unit)}", value, value >= least)

    def at_most(self, what: str, value: float, most: float, unit: str) -> None:
        """Note a target of the project, and whether *value* meets it."""
        self._target(what, f"at most {figure(most, unit)}", value, value <= most)

    def _target(self, what: str, target: str, value: float, met: bool) -> None:
        if not self.quick:
            self._targets.append({"what": what, "target": target, "value": float(f"{value:.4g}"), "met": met})

    def note(self, text: str) -> None:
        print(text, end="\n\n", flush=True)

    def table(self, title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table that is valid Markdown: the first column is text, the others are numbers."""
        print(f"{title}\n", flush=True)
        if Console is not None and sys.stdout.isatty():
            _print_rich(head, rows)
        else:
            _print_plain(head, rows)
        print(flush=True)

    def finish(self) -> None:
        """Print the targets."""
        if self._targets:
            rows = [
                [entry["what"], entry["target"], figure(entry["value"]), "yes" if entry["met"] else "NO"]
                for entry in self._targets
            ]
            self.table("Targets", ["what", "target", "value", "met"], rows)

    def as_json(self) -> dict[str, Any]:
        return {"bench": self.name, "machine": self.machine, "rows": self._rows, "targets": self._targets}

    def _print_machine(self) -> None:
        facts = self.machine
        libraries = ", ".join(f"{name} {version}" for name, version in facts["libraries"].items())
        self.note(
            f"{self.name}: {facts['cpu']}, {facts['cores']} cores, {facts['kernel']}, load {facts['load']}\n"
            f"{facts['python']}, GIL {'on' if facts['gil'] else 'off'}; {libraries}"
        )


def _print_plain(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * width if at == 0 else "-" * (width - 1) + ":" for at, width in enumerate(widths)]
    for cells in (head, rule, *rows):
        padded = [
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        print(f"| {' | '.join(padded)} |")


def _print_rich(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=MARKDOWN, header_style="bold")
    for at, name in enumerate(head):
        table.add_column(name, justify="left" if at == 0 else "right", no_wrap=True)
    for cells in rows:
        table.add_row(*cells, style="red" if cells[-1] == "NO" else None)
    width = sum(max(map(len, column)) + 3 for column in zip(head, *rows, strict=True)) + 1
    Console(width=width, highlight=False, markup=False).print(table)
