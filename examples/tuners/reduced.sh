#!/bin/sh
# The tuner study on a few processor cores: 64 px, a third of the nevi, five epochs, three seeds.
#   examples/tuners/reduced.sh [tune|study|starts] [further words for consilium study]
set -eu
here=$(dirname "$0")
[ -f "$here/made/in-domain-reduced/model.safetensors" ] || "$here/prepare.sh" reduced
what=${1:-study}
[ $# -gt 0 ] && shift
case $what in
    tune) set -- --set seeds='[100]' "$@" ;;
    study) set -- --set 'axes.start.in_domain.backbone.weights="made/in-domain-reduced/model.safetensors"' "$@" ;;
esac
consilium study "$here/$what.toml" --out "runs/$what-reduced" --set base=base-reduced.toml --set seeds='[0, 1, 2]' \
    --set 'notes=["reduced grid: 64 px, a third of the nevi, five epochs, bfloat16, on processor cores"]' "$@"
