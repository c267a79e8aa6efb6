#!/bin/sh
# The whole grid: {fedavg, fedper} x {lora, linear} x three seeds, into runs/ham10000. A run that was cut off is resumed;
# fedper uses the finished references of fedavg. Further words are passed on, for the reduced grid on a CPU:
#   examples/ham10000/grid.sh --set backbone.image_size=96
set -eu
here=$(dirname "$0")
out=${OUT:-runs/ham10000}
for seed in ${SEEDS:-0 1 2}; do
    for tuner in lora linear; do
        for strategy in fedavg fedper; do
            consilium run "$here/$strategy-$tuner.toml" --out "$out/$strategy-$tuner-$seed" --resume \
                --set seed="$seed" "$@"
        done
    done
done
consilium report "$out"/fedavg-lora-0 "$out"/fedper-lora-0 "$out"/fedavg-linear-0 "$out"/fedper-linear-0 \
    --out "$out/report.html"
