#!/usr/bin/env bash
# The tests that touch transformers or JAX, under both ends of the supported versions.
#   tests/compat/run.sh [transformers4] [jax11]          (default: both)
# Environments lie in .cache/compat. PYTHON312 names a Python 3.12 (default: the first one found);
# without one the second part says so and is skipped. Further arguments of pytest: PYTEST_ARGS.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=.cache/compat
uv=.venv/bin/uv
[ -x "$uv" ] || uv=uv
links=(${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"})
[ $# -gt 0 ] || set -- transformers4 jax11

environment() {  # NAME INTERPRETER REQUIREMENTS [PACKAGE ...]
    local where=$root/$1 stamp
    stamp=$where/.installed-$(cat "$3" requirements-test.txt | sha256sum | cut -c1-12)
    if [ ! -e "$stamp" ]; then
        echo "compat: making $where"
        rm -rf "$where"
        "$uv" venv --quiet --python "$2" "$where"
        "$uv" pip install --quiet --python "$where/bin/python" "${links[@]}" -r "$3" "${@:4}"
        touch "$stamp"
    fi
}

transformers4() {
    # The CPU build of the set's torch where it can be had, else the one of the CPU set: the plain
    # name would bring gigabytes of CUDA.
    local torch=torch==2.10.0+cpu
    "$uv" pip install --quiet --dry-run --python .venv/bin/python "${links[@]}" "$torch" \
        >/dev/null 2>&1 || torch=$(grep '^torch==' requirements-cpu.txt)
    environment transformers4 .venv/bin/python tests/compat/requirements-transformers4.txt "$torch"
    check transformers4
}

jax11() {
    local python=${PYTHON312:-}
    if [ -z "$python" ]; then
        for python in "$(command -v python3.12 || true)" "$HOME"/.pyenv/versions/3.12.*/bin/python; do
            [ -n "$python" ] && "$python" -c '' 2>/dev/null && break
            python=
        done
    fi
    if [ -z "$python" ]; then
        echo "compat: no Python 3.12 found (PYTHON312 names one): JAX 0.11 was not tried"
        return 0
    fi
    environment jax11 "$python" tests/compat/requirements-jax11.txt
    check jax11
}

check() {
    local python=$root/$1/bin/python
    "$python" - <<'PY'
import importlib.metadata as m, platform
names = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "torch")
found = {n: m.version(n) for n in names if any(d.name == n for d in m.distributions())}
print("compat: python", platform.python_version(), *(f"{n} {v}" for n, v in found.items()))
PY
    # A cache of its own: compiled programs of another JAX are of no use.
    JAX_COMPILATION_CACHE_DIR=$PWD/$root/$1-compiled \
        "$python" -m pytest -q -n 0 -m "not slow" -p no:cacheprovider \
        $(cat tests/compat/tests.txt) ${PYTEST_ARGS:-}
}

status=0
for part in "$@"; do
    "$part" || status=1
done
exit $status
