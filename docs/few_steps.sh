#!/bin/sh
# Prints the tables of results.md "Draw in few steps": sh docs/few_steps.sh     An hour or so on one core.
# All runs of a data set cost as much training: the steps of each follow from what one costs. COST is a percentage of
# these steps, JOBS runs as many at once, and RUNS is the folder of the runs, which are kept and not trained again.
set -eu
cd "$(dirname "$0")/.."
export PYTHON="${PYTHON:-python}" RUNS="${RUNS:-ckpts/few_steps}" COST="${COST:-100}"
export WANDB_MODE=disabled OMP_NUM_THREADS=1

run() {  # preset, objective, steps
    name="$1-$2" steps=$(($3 * COST / 100)) sampler=flow_map
    [ -e "$RUNS/$name/evaluation/card.json" ] && return
    [ "$2" = None ] && sampler=heun
    "$PYTHON" main.py "$1" --objective "$2" --sampler $sampler --sde_sampler None --time_sampler uniform \
        --run_name "$name" --ckpt_dir "$RUNS" --device cpu --num_training_steps $steps --sampling_steps 2 \
        --sample_every 0 --save_every 0 --evaluate_every 0 > "$RUNS/$name.log"
    "$PYTHON" evaluate.py --ckpt "$RUNS/$name/last.pt" --out "$RUNS/$name/evaluation" --device cpu --seeds 1 \
        --likelihood_num 0 --loss_num 0 --neighbours_num 0 --curve 1 2 4 8 >> "$RUNS/$name.log"
}

if [ $# = 3 ]; then run "$@"; exit; fi
mkdir -p "$RUNS"
xargs -P "${JOBS:-1}" -L 1 sh docs/few_steps.sh <<'EOF'
digits progressive 1600
digits None 2600
digits lagrangian 650
digits mean_flow 1100
digits eulerian 1050
moons progressive 4500
moons None 7200
moons lagrangian 1800
moons mean_flow 2900
moons eulerian 2900
EOF
"$PYTHON" - "$RUNS" <<'PY'
import json, sys

for preset, metric in (("digits", "recognised"), ("digits", "classifier_fd1k"), ("moons", "wasserstein"),
                       ("moons", "sliced_wasserstein")):
    print(f"\n| {preset}, {metric} | steps | sampler | 1 step | 2 steps | 4 steps | 8 steps |\n" + "| --- " * 7 + "|")
    for objective in ("None", "progressive", "lagrangian", "eulerian", "mean_flow"):
        with open(f"{sys.argv[1]}/{preset}-{objective}/evaluation/card.json") as file:
            card = json.load(file)
        for sampler in ("euler", "heun", "dpmpp_2m") if objective == "None" else ("flow_map",):
            values = {point["sampling_steps"]: point[metric] for point in card["curve"]["points"]
                      if point["sampler"] == sampler}
            cells = " | ".join(f"{values[n]:.3g}" for n in (1, 2, 4, 8))
            print(f"| {objective.lower()} | {card['step']:,} | {sampler} | {cells} |")
PY
