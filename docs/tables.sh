#!/bin/sh
# Prints the table of results.md "Go from one data set to another": sh docs/tables.sh     Some two hours on one core.
# STEPS and SEEDS make it shorter, JOBS runs as many trainings at once, and RUNS is the folder of the runs, which are
# kept there, and not trained again.
set -eu
cd "$(dirname "$0")/.."
export PYTHON="${PYTHON:-python}" RUNS="${RUNS:-ckpts/tables}" STEPS="${STEPS:-5000}"
export WANDB_MODE=disabled OMP_NUM_THREADS=1

run() {  # source, data, coupling, seed; sigma 0.1 in the data's units is sqrt(2) gamma_scale standard deviations
    gamma=None scale=1
    if [ "$3" = sb ]; then gamma=brownian; [ "$2" = moons_wide ] && scale=0.05 || scale=0.0082; fi
    name="$1-$2-$3-$4"
    [ -e "$RUNS/$name/evaluation/card.json" ] && return
    "$PYTHON" main.py moons --source "$1" --dataset "$2" --coupling "$3" --seed "$4" --gamma $gamma \
        --gamma_scale $scale --run_name "$name" --ckpt_dir "$RUNS" --device cpu --num_training_steps "$STEPS" \
        --network plain_mlp --hidden_dim 64 --num_layers 3 --activation selu --base_lr 1e-3 --weight_decay 1e-5 \
        --lr_schedule constant --warmup_steps 0 --batch_size 512 --sampler euler --sampling_steps 100 \
        --sde_sampler None --sample_every 0 --evaluate_every 0 --log_every 1000 > "$RUNS/$name.log"
    "$PYTHON" evaluate.py --ckpt "$RUNS/$name/last.pt" --out "$RUNS/$name/evaluation" --device cpu --weights raw \
        --reference test --num 1000 --seeds 1 --likelihood_num 0 --loss_num 0 >> "$RUNS/$name.log"
}

if [ $# = 4 ]; then run "$@"; exit; fi
mkdir -p "$RUNS"
for seed in ${SEEDS:-42 43 44 45 46}; do
    for pair in "normal eight_gaussians_wide" "moons_far eight_gaussians_far" "normal moons_wide"; do
        for coupling in independent ot sb; do
            [ "$pair $coupling" = "normal eight_gaussians_wide sb" ] || echo "$pair $coupling $seed"
        done
    done
done | xargs -P "${JOBS:-1}" -L 1 sh docs/tables.sh
"$PYTHON" - "$RUNS" <<'PY'
import glob, json, re, statistics, sys

rows = {}
for path in sorted(glob.glob(f"{sys.argv[1]}/*/evaluation/card.json")):
    with open(path) as file:
        card = json.load(file)
    rows.setdefault(re.search(r"([^/]*)-\d+/evaluation", path)[1], []).append(
        (card["metrics"]["wasserstein_test"]["mean"], card["metrics"]["wasserstein_test"]["real"],
         card["paths"]["path_energy"], card["paths"]["least"], card["paths"]["normalised"],
         abs(card["paths"]["normalised"])))
print("| source, data, coupling | W2 | W2 of real points | path energy | least | normalised | its size |\n"
      + "| --- " * 7 + "|")
for name, values in rows.items():
    cells = [f"{statistics.mean(v):.3g} +- {statistics.stdev(v) if len(v) > 1 else 0:.2g}" for v in zip(*values)]
    print(f"| {name.replace('-', ', ')} |", " | ".join(cells), "|")
PY
