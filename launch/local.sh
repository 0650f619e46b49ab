#!/usr/bin/env bash
# Runs N processes of a module on this machine: one per GPU, or N on the CPU.
#   launch/local.sh N MODULE [FLAGS]            launch/local.sh --dry_run N MODULE [FLAGS]
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec "$LAUNCH_PYTHON" -m launch.local "$@"
