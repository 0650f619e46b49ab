# Caches, threads and memory shares of every run; source it, or let the launch scripts do so.
# What is already set stays. LAUNCH_GPU_SHARE=0.45 leaves room for a second GPU library (vLLM,
# torch) on the same device; LAUNCH_PYTHON names the interpreter.
LAUNCH_ROOT=${LAUNCH_ROOT:-$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)}
if [ -z "${LAUNCH_PYTHON:-}" ]; then
    LAUNCH_PYTHON=$LAUNCH_ROOT/.venv/bin/python
    [ -x "$LAUNCH_PYTHON" ] || LAUNCH_PYTHON=$(command -v python3)
fi
export LAUNCH_ROOT LAUNCH_PYTHON
case ":${PYTHONPATH:-}:" in
    *":$LAUNCH_ROOT:"*) ;;
    *) export PYTHONPATH=$LAUNCH_ROOT${PYTHONPATH:+:$PYTHONPATH} ;;
esac
# Compiled programs are shared by all ranks and by the next run.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$LAUNCH_ROOT/.cache/jax}
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-${LAUNCH_GPU_SHARE:-0.90}}
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
# The host library's threads: the CPUs of the task, else all of them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-$(nproc)}}
