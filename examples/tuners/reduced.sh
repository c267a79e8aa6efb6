#!/bin/sh
# The tuner study on a few processor cores: 64 px, a third of the nevi, four epochs, three seeds, fewer combinations.
#   examples/tuners/reduced.sh tune|study|starts [further words for consilium study]
set -eu
here=$(dirname "$0")
[ -f "$here/made/in-domain-reduced/model.safetensors" ] || "$here/prepare.sh" reduced
what=${1:-study}
[ $# -gt 0 ] && shift
note="reduced grid: 64 px, a third of the nevi, bfloat16, on processor cores"
case $what in
    tune) set -- --set seeds='[100]' --set "notes=[\"$note, five epochs, one seed\"]" "$@" ;;
    *) set -- --set seeds='[0, 1, 2]' --set train.rounds=16 --set "notes=[\"$note, four epochs, three seeds\"]" "$@" ;;
esac
case $what in
    study) set -- --set 'axes.start.in_domain.backbone.weights="made/in-domain-reduced/model.safetensors"' \
        --set 'exclude=[{start="in_domain", partition=["iid", "dirichlet"]}, {tuner=["dora", "low_rank_basis"]}]' "$@" ;;
    starts) set -- --set 'exclude=[{tuner=["bitfit", "prompts_deep"]}, {start="pretrained"}]' "$@" ;;
esac
consilium study "$here/$what.toml" --out "runs/$what-reduced" --set base=base-reduced.toml "$@"
