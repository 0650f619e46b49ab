#!/usr/bin/env bash
# An interactive shell on a node, with the environment of env.sh; ends with the shell.
#   launch/interactive.sh [SRUN OPTIONS]        launch/interactive.sh --dry_run [SRUN OPTIONS]
#   launch/interactive.sh --gres=gpu:2 --time=02:00:00 --partition=debug
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
dry=
if [ "${1:-}" = --dry_run ]; then dry=1; shift; fi
# The user's options come last, so they win over the defaults.
command=(srun --nodes=1 --ntasks=1 --time=01:00:00 --job-name=interactive "$@"
    --pty bash --rcfile "$LAUNCH_ROOT/launch/env.sh" -i)
if [ -n "$dry" ]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
command -v srun >/dev/null || { echo "error: srun not found; this needs a SLURM client" >&2; exit 2; }
exec "${command[@]}"
