"""Who may import whom (DESIGN, section 2), and that every module stands on its own."""

from __future__ import annotations

import ast
import importlib
import importlib.machinery
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import wsfast

ROOT = Path(wsfast.__file__).parent

# What each module may import of the package when it runs; what it imports for the type checker alone is its own affair.
# A new module needs a row here: that is where its place in the layers is decided.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "connection": {"errors"},
    "schema": set(),
    "metadata": {"errors", "_metadata"},
    "_core": {"errors", "connection"},
    "_fanout": {"errors", "_core"},
    "_health": {"connection", "_core"},
    "_metadata": {"errors", "connection", "_core"},
    "reference": {"errors", "connection"},
    "events": {"errors"},
    "adapters": set(),
    "reconnect": {"errors"},
    "session": {"errors"},
    "client": {"errors", "reconnect", "session"},
    "delivery": {"errors", "adapters", "events", "_fanout"},
    "health": {"errors", "_health"},
    "heartbeat": {"_health", "adapters", "events"},
    "manager": {
        "errors",
        "connection",
        "_core",
        "_health",
        "_metadata",
        "reference",
        "adapters",
        "delivery",
        "events",
        "health",
        "heartbeat",
        "metadata",
        "reconnect",
        "session",
    },
    "adapters.websockets": {"errors", "adapters", "session"},
    "hub": {
        "errors",
        "events",
        "adapters",
        "adapters.websockets",
        "delivery",
        "health",
        "manager",
        "reconnect",
        "session",
    },
    "demo": {"errors", "hub"},
    "cli": {"", "errors"},
    "__init__": {
        "errors",
        "connection",
        "_core",
        "events",
        "delivery",
        "manager",
        "health",
        "metadata",
        "reconnect",
        "session",
    },
    "__main__": {"cli"},
}

# Where waiting is: below these, nothing knows of an event loop.
ASYNCIO = {"events", "delivery", "heartbeat", "manager", "adapters.websockets", "client", "hub", "demo", "cli"}

# Leaves import one library each; the command line needs click, and the ready-made server stands on one library.
THIRD_PARTY: dict[str, set[str]] = {
    "adapters.websockets": {"websockets"},
    "client": {"websockets"},
    "hub": {"websockets"},
    "demo": {"websockets", "rich"},
    "cli": {"click"},
    "schema": {"msgspec"},
}

NATIVE = {"_core", "_fanout", "_health", "_metadata"}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
NAMES = sorted(f"wsfast.{name}" if name != "__init__" else "wsfast" for name in MODULES if name != "__main__")


class Imports(ast.NodeVisitor):
    """The modules that are imported when a module runs, at its top or in a function."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for statement in node.orelse:
                self.visit(statement)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found.update(alias.name for alias in node.names)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, "imports are absolute here"
        assert node.module is not None
        for alias in node.names:
            name = f"{node.module}.{alias.name}"
            self.found.add(name if _is_module(name) else node.module)


def _is_module(name: str) -> bool:
    below = name.removeprefix("wsfast.")
    return name.startswith("wsfast.") and (below in MODULES or below in NATIVE)


def imports_of(name: str) -> set[str]:
    visitor = Imports()
    visitor.visit(ast.parse(MODULES[name].read_text(encoding="utf-8")))
    return visitor.found


def test_every_module_has_its_place() -> None:
    assert set(MODULES) == set(ALLOWED) - NATIVE


@pytest.mark.parametrize("name", MODULES)
def test_imports_within_the_package_go_down_the_layers(name: str) -> None:
    own = {
        found.removeprefix("wsfast").removeprefix(".") for found in imports_of(name) if found.split(".")[0] == "wsfast"
    }
    assert own <= ALLOWED[name]


@pytest.mark.parametrize("name", MODULES)
def test_waiting_and_libraries_are_where_they_belong(name: str) -> None:
    top = {found.split(".")[0] for found in imports_of(name)}
    assert ("asyncio" in top) <= (name in ASYNCIO)
    assert top - set(sys.stdlib_module_names) - {"wsfast"} <= THIRD_PARTY.get(name, set())


@pytest.mark.parametrize("name", NATIVE)
def test_the_stubs_of_the_core_import_what_the_core_may(name: str) -> None:
    visitor = Imports()
    visitor.visit(ast.parse((ROOT / f"{name}.pyi").read_text(encoding="utf-8")))
    own = {found.removeprefix("wsfast.") for found in visitor.found if found.split(".")[0] == "wsfast"}
    assert own <= ALLOWED[name]
    assert "asyncio" not in visitor.found


@pytest.mark.parametrize("name", [*NAMES, *(f"wsfast.{name}" for name in sorted(NATIVE))])
def test_each_module_can_be_imported_first(name: str) -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", f"import {name}"], check=True, cwd=ROOT.parent, timeout=60)


def test_the_package_brings_no_third_party_module() -> None:
    code = (
        "import sys; before = set(sys.modules); import wsfast; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT.parent, capture_output=True, text=True, timeout=60
    )
    # Cython makes modules of its own for what all its extensions share.
    brought = {name for name in result.stdout.split() if not name.startswith(("_cython", "cython_runtime"))}
    assert brought - set(sys.stdlib_module_names) == {"wsfast"}


@pytest.mark.parametrize("name", NAMES)
def test_all_names_what_is_there_once_and_in_order(name: str) -> None:
    module = importlib.import_module(name)
    names = module.__all__
    assert list(names) == sorted(set(names), key=_as_ruff_sorts)
    assert all(hasattr(module, each) for each in names)


def _as_ruff_sorts(name: str) -> tuple[int, str]:
    """Constants, then classes, then the rest, as ruff keeps ``__all__``."""
    if name.isupper():
        return 0, name
    return (1 if name[0].isupper() else 2), name


def test_the_public_names_are_these() -> None:
    errors = importlib.import_module("wsfast.errors").__all__
    assert set(wsfast.__all__) == {
        "Backpressure",
        "BroadcastResult",
        "CloseReport",
        "ConnectionCleared",
        "ConnectionClosed",
        "ConnectionInterrupted",
        "ConnectionManager",
        "ConnectionMeta",
        "ConnectionOpened",
        "ConnectionResumed",
        "ConnectionStatus",
        "ConnectionSuspect",
        "ConnectionTooSlow",
        "DrainPolicy",
        "Event",
        "Explanation",
        "Grade",
        "GradeChanged",
        "HealthPolicy",
        "HerdPolicy",
        "LoopLate",
        "MessageConflated",
        "MISSING",
        "MessagesDropped",
        "MetadataChanged",
        "MetadataLimits",
        "Quality",
        "Registry",
        "SendFailed",
        "SessionPolicy",
        "__version__",
        "events",
        "fnv1_32",
        "fnv1a_32",
        *errors,
    }


def test_the_registry_of_the_package_is_the_native_one() -> None:
    core = importlib.import_module("wsfast._core")
    assert wsfast.Registry is core.Registry
    assert wsfast.ConnectionMeta is core.ConnectionMeta
    assert core.__file__.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))


def test_a_missing_core_is_an_import_error_and_not_a_slow_server(tmp_path: Path) -> None:
    package = tmp_path / "wsfast"
    package.mkdir()
    for module in pkgutil.iter_modules([str(ROOT)]):
        source = ROOT / f"{module.name}.py"
        if source.exists():
            (package / source.name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    (package / "__init__.py").write_text((ROOT / "__init__.py").read_text(encoding="utf-8"), encoding="utf-8")
    result = subprocess.run(
        # Without site-packages, where an installation in place would lead to the core after all.
        [sys.executable, "-S", "-c", "import sys; sys.path.insert(0, '.'); import wsfast"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1].startswith(("ImportError", "ModuleNotFoundError"))
