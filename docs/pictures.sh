#!/bin/sh
# Makes the pictures of this folder: sh docs/pictures.sh     Some ten minutes on two cores, without a GPU or a network.
# It trains digits and moons into a temporary folder, draws samples, and measures quality against network calls.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
RUNS=$(mktemp -d)
trap 'rm -r "$RUNS"' EXIT
export PYTHON GPUS=1 WANDB_MODE=disabled

sh run.sh digits --device cpu --ckpt_dir "$RUNS" --evaluate_every 130 --sample_every 0
sh run.sh moons --device cpu --ckpt_dir "$RUNS"
"$PYTHON" sample.py --device cpu --ckpt "$RUNS/moons/last.pt" --num 2000 --out "$RUNS/moons" --trajectory True \
    --sampling_steps 25  # so many frames, for a small file
"$PYTHON" evaluate.py --device cpu --ckpt "$RUNS/digits/last.pt" --out "$RUNS/card" --seeds 1 --likelihood_num 0 \
    --loss_num 0 --neighbours_num 0 --curve 5 10 20 40

cp "$RUNS/moons.gif" docs/moons.gif
cp "$RUNS"/digits/samples/ema_heun_*.png docs/digits.png
cp "$RUNS/card/quality_against_cost.png" docs/quality.png
# in 64 colours, since curves need no more, and the file is a third as large
"$PYTHON" -c "from sys import argv; from PIL import Image; Image.open(argv[1]).quantize(64).save(argv[2], optimize=True)" \
    "$RUNS/digits/curves.png" docs/curves.png
ls -l docs
