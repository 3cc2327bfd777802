#!/bin/sh
# Trains: sh run.sh [PRESET] [--setting value ...]
# Without a preset it trains CIFAR-10. `sh run.sh --help` lists presets and settings.
# On several nodes, call it on each, in a folder that all nodes share, with the same NODES and HEAD:
# NODES=2 HEAD=node1:29500 sh run.sh
# With Slurm: sbatch --nodes=2 --gpus-per-node=4 run.sh [PRESET] ...
# The run's name ends with the job's id, unless --run_name is given. Before the job's time is over, the run writes a
# checkpoint and the job is put into the queue again; when the job starts again, it resumes the run.
# What a job requests:
#SBATCH --job-name=diffusion
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
set -eu

# ---- Options, set in the environment, as in GPUS=2 sh run.sh digits
GPUS=${GPUS:-}          # ranks on this node, one for each GPU; default: all visible GPUs; 1 on a CPU
NODES=${NODES:-1}       # number of nodes
HEAD=${HEAD:-}          # NAME:PORT of the first node, to which all connect; needed for more than one node
THREADS=${THREADS:-}    # CPU threads of a rank; default: the cores divided by the ranks
RESTARTS=${RESTARTS:-0} # how often all ranks are started again after one has died
PYTHON=${PYTHON:-}      # the interpreter; default: python, or python3

fail() {
    echo "error: $1" >&2
    exit 2
}

# ---- A Slurm job: srun starts this file once on each node. What Slurm itself runs is a copy in another folder
if [ "${0##*/}" = slurm_script ]; then
    SELF=$(scontrol show job "$SLURM_JOB_ID" | sed -n '/^ *Command=/{s///;s/\/run\.sh.*/\/run.sh/p;}')
    [ -f "$SELF" ] || SELF=$SLURM_SUBMIT_DIR/run.sh
    PRESET=cifar10
    case ${1:-} in -* | "") ;; *) PRESET=$1 ;; esac
    case " $* " in
        *" --run_name"[\ =]* | *" --run-name"[\ =]*) ;;
        *) set -- "$@" --run_name "${PRESET}_$SLURM_JOB_ID" ;;
    esac
    export NODES="$SLURM_JOB_NUM_NODES"
    [ "$NODES" = 1 ] ||
        HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 10000))
    export HEAD
    # seconds for the last checkpoint, out of the 180 above
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-150}"
    # srun does not take it from sbatch
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
    echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}"
    # When the ranks of one node end with an error, srun ends those of all nodes.
    srun --ntasks="$NODES" --ntasks-per-node=1 --kill-on-bad-exit=1 sh "$SELF" "$@" &
    SRUN=$! WARNED=
    trap 'WARNED=yes; kill -USR1 $SRUN' USR1   # sent by Slurm when the job's time is nearly over
    trap : TERM                                # the ranks get it as well: wait for their checkpoint
    STATUS=0
    while kill -0 $SRUN 2>/dev/null; do
        STATUS=0
        wait $SRUN || STATUS=$?                # a signal ends the wait, not srun
    done
    # 75: stopped by a signal; above: killed, because it did not stop; an error is 1 or 2
    if [ -n "$WARNED" ] && [ "$STATUS" -ge 75 ]; then
        echo "job $SLURM_JOB_ID is put into the queue again"
        scontrol requeue "$SLURM_JOB_ID"
    fi
    exit "$STATUS"
fi

FOLDER=$(dirname "$0")
if [ -z "$PYTHON" ]; then
    PYTHON=python
    command -v python >/dev/null || PYTHON=python3
fi
command -v "$PYTHON" >/dev/null ||
    fail "no $PYTHON here: install Python, or set PYTHON to the interpreter, as PYTHON=/opt/bin/python3"
case " $* " in *" --device cpu "* | *" --device=cpu "*) GPUS=${GPUS:-1} ;; esac
if [ -z "$GPUS" ]; then
    if [ "${CUDA_VISIBLE_DEVICES+set}" ]; then
        GPUS=$(printf '%s' "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c '[0-9A-Za-z]' || true)
    else
        GPUS=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
    fi
    [ "$GPUS" -gt 0 ] || GPUS=1
fi
case $RESTARTS in
    "" | *[!0-9]*) fail "RESTARTS is '$RESTARTS': expected a whole number, 0 or more" ;;
esac
for OPTION in "GPUS=$GPUS" "NODES=$NODES" "THREADS=${THREADS:-1}"; do
    case ${OPTION#*=} in
        0* | *[!0-9]*) fail "${OPTION%%=*} is '${OPTION#*=}': expected a whole number, 1 or more" ;;
    esac
done
if [ -z "$THREADS" ]; then
    CORES=${SLURM_CPUS_ON_NODE:-$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)}
    THREADS=$((CORES / GPUS))
    [ "$THREADS" -gt 0 ] || THREADS=1
fi
if [ "$NODES" -gt 1 ] || [ -n "$HEAD" ]; then
    case $HEAD in
        *:*[!0-9]* | *: | :* | "")
            fail "NODES is $NODES and HEAD '$HEAD': set HEAD=NAME:PORT of the first node, the same on all nodes" ;;
        *:*) ;;
        *) fail "HEAD is '$HEAD': expected NAME:PORT of the first node, the same on all nodes" ;;
    esac
fi

export OMP_NUM_THREADS="$THREADS"
# Threads that wait sleep soon: no slower on an idle CPU, and several times faster on a busy one.
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-5000}"
# A single node takes any free port, so that several runs can share a machine.
exec "$PYTHON" "$FOLDER/launch.py" --nnodes="$NODES" --nproc-per-node="$GPUS" --max-restarts="$RESTARTS" \
    --rdzv-backend=c10d --rdzv-endpoint="${HEAD:-localhost:0}" "$FOLDER/main.py" "$@"
