"""Builds the native core, ``wsfast._core``, ``wsfast._fanout``, ``wsfast._health`` and ``wsfast._metadata``, from
``csrc/``; all other configuration is in pyproject.toml.

Switches, for developers, in the environment: ``WSFAST_DEBUG=1`` compiles assertions and live-object counters in,
``WSFAST_SANITIZE=address,undefined`` (or ``thread``) the sanitizers of the C compiler, and ``WSFAST_STRICT=1`` makes
errors of the warnings of Cython and of the C compiler.
"""

import glob
import os
import sys

from Cython.Build import cythonize
from Cython.Compiler import Options
from setuptools import Extension, setup

DEBUG = os.environ.get("WSFAST_DEBUG") == "1"
SANITIZE = os.environ.get("WSFAST_SANITIZE", "")
STRICT = os.environ.get("WSFAST_STRICT") == "1"

Options.warning_errors = STRICT

if sys.platform == "win32":
    compile_args = ["/O2", "/std:c11"]
else:
    compile_args = ["-O3", "-std=c11", "-fvisibility=hidden", "-Wall", "-pthread"]
if STRICT and sys.platform != "win32":
    compile_args += ["-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers", "-Werror"]
link_args = []
if DEBUG:
    compile_args += ["-O1", "-g3", "-UNDEBUG"]
if SANITIZE:
    compile_args += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
    link_args += [f"-fsanitize={SANITIZE}"]


def extension(name: str, sources: list[str]) -> Extension:
    return Extension(
        f"wsfast.{name}",
        [f"csrc/{name}.pyx", *(f"csrc/{source}.c" for source in sources)],
        include_dirs=["csrc"],
        depends=[*glob.glob("csrc/*.h"), *glob.glob("csrc/*.pxd")],
        define_macros=[("WSF_DEBUG", "1")] if DEBUG else [],
        extra_compile_args=compile_args,
        extra_link_args=link_args,
    )


core = extension("_core", ["core", "index", "platform", "table"])
health = extension("_health", ["platform", "slab", "table", "tcpinfo", "vitals"])
fanout = extension("_fanout", ["backlog", "fanout", "frame", "outbox", "platform", "pool", "table"])
metadata = extension("_metadata", ["platform"])

setup(
    ext_modules=cythonize(
        [core, fanout, health, metadata],
        include_path=["csrc"],
        force=STRICT,
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "embedsignature": True,
            "show_performance_hints": STRICT,
        },
    )
)
