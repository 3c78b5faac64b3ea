# Shared by the scripts of this folder; they are sourced or run from the top of the tree.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Newer releases of Hypothesis bring a compiled part; take a release that has a wheel for the interpreter at hand.
export PIP_ONLY_BINARY=${PIP_ONLY_BINARY:-hypothesis}
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '\n== %s\n' "$*"; }

# environment PYTHON DIR EXTRA: an environment with the package installed in place, renewed when a source is newer.
environment() {
    local python=$1 dir=$2 extra=$3 stamp=$2/.wsfast-$3
    if [ ! -x "$dir/bin/python" ]; then
        "$python" -m venv "$dir" || { rm -rf "$dir"; echo "cannot make an environment with $python" >&2; return 1; }
    fi
    if [ ! -e "$stamp" ] || [ -n "$(find setup.py pyproject.toml csrc -newer "$stamp" ! -name "_*.c" ! -type d | head -n 1)" ]; then
        "$dir/bin/pip" install --quiet --editable ".[$extra]"
        touch "$stamp"
    fi
}

# The interpreters to test with, one path a line: CPython 3.11 to 3.14 on the PATH or kept by pyenv, each version once.
pythons() {
    local version found
    for version in 3.11 3.12 3.13 3.14; do
        for found in $(type -ap "python$version" || true) "$(pyenv root 2>/dev/null || echo "$HOME/.pyenv")"/versions/"$version".*/bin/python3; do
            if "$found" -c 'import ensurepip, venv' 2>/dev/null; then
                echo "$found"
                break
            fi
        done
    done
}

# A Chromium for tests/browser, from Debian's package if there is none and we may. Elsewhere, the tests say what is missing.
chromium_for_tests() {
    [ -z "$(type -p chromium chromium-browser google-chrome ${WSFAST_CHROMIUM:-})" ] || return 0
    [ "$(id -u)" = 0 ] && type -p apt-get > /dev/null || return 0
    mkdir -p .work
    (apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium) > .work/chromium.log 2>&1 \
        || { tail -n 30 .work/chromium.log >&2; return 1; }
}

# A CPython without the GIL: named by WSFAST_FREE_THREADED, on the PATH, or built by the tool beside the tree.
free_threaded_python() {
    local found
    for found in ${WSFAST_FREE_THREADED:-} $(type -ap python3.14t || true) $(type -ap python3.13t || true); do
        if "$found" -c 'import sys; assert not sys._is_gil_enabled()' 2>/dev/null; then
            echo "$found"
            return
        fi
    done
    if [ -x ../shared/tools/free-threaded-python ]; then
        ../shared/tools/free-threaded-python
        return
    fi
    echo "no free-threaded CPython is found: put python3.13t or newer on the PATH, or name one in WSFAST_FREE_THREADED" >&2
    return 1
}
