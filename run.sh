#!/bin/sh
# Trains: sh run.sh [PRESET] [--setting value ...]     CIFAR-10 without a preset; `sh run.sh --help` lists presets and settings.
# On several nodes, call it on each, in one folder that all share, with the same NODES and HEAD: NODES=2 HEAD=node1:29500 sh run.sh
set -eu

# ---- Options, each also taken from the environment: GPUS=2 sh run.sh digits
GPUS=${GPUS:-}          # processes on this node, one a GPU; default: all visible GPUs, one process on a machine without
NODES=${NODES:-1}       # number of nodes
HEAD=${HEAD:-}          # NAME:PORT of the first node, where all meet; needed for more than one node
THREADS=${THREADS:-}    # CPU threads of a process; default: the cores shared among the processes
PYTHON=${PYTHON:-}      # the interpreter; default: python, or python3

fail() {
    echo "error: $1" >&2
    exit 2
}

FOLDER=$(dirname "$0")
if [ -z "$PYTHON" ]; then
    PYTHON=python
    command -v python >/dev/null || PYTHON=python3
fi
command -v "$PYTHON" >/dev/null || fail "no $PYTHON here: install Python, or set PYTHON to the interpreter, as PYTHON=/opt/bin/python3"
if [ -z "$GPUS" ]; then
    if [ "${CUDA_VISIBLE_DEVICES+set}" ]; then
        GPUS=$(printf '%s' "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c '[0-9A-Za-z]' || true)
    else
        GPUS=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
    fi
    [ "$GPUS" -gt 0 ] || GPUS=1
fi
for OPTION in "GPUS=$GPUS" "NODES=$NODES" "THREADS=${THREADS:-1}"; do
    case ${OPTION#*=} in
        0* | *[!0-9]*) fail "${OPTION%%=*} is '${OPTION#*=}': expected a whole number, 1 or more" ;;
    esac
done
if [ -z "$THREADS" ]; then
    CORES=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
    THREADS=$((CORES / GPUS))
    [ "$THREADS" -gt 0 ] || THREADS=1
fi
if [ "$NODES" -gt 1 ] || [ -n "$HEAD" ]; then
    case $HEAD in
        *:*[!0-9]* | *: | :* | "") fail "NODES is $NODES and HEAD '$HEAD': set HEAD=NAME:PORT of the first node, the same on all nodes" ;;
        *:*) ;;
        *) fail "HEAD is '$HEAD': expected NAME:PORT of the first node, the same on all nodes" ;;
    esac
fi

export OMP_NUM_THREADS="$THREADS"
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-5000}"  # a thread that waits sleeps soon: as fast alone, and several times faster on a busy CPU
# One node takes any free port, so that several runs share a machine.
exec "$PYTHON" "$FOLDER/launch.py" --nnodes="$NODES" --nproc-per-node="$GPUS" \
    --rdzv-backend=c10d --rdzv-endpoint="${HEAD:-localhost:0}" "$FOLDER/main.py" "$@"
