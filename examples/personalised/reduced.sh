#!/bin/sh
# The personalised study on a few processor cores: 64 px, a third of the nevi, four epochs in 16 short rounds, five seeds.
#   examples/personalised/reduced.sh tune|study|unseen|one-shot [further words for consilium study]
set -eu
here=$(dirname "$0")
[ -f "$here/../tuners/made/federation-reduced.csv" ] || "$here/prepare.sh"
what=${1:-study}
[ $# -gt 0 ] && shift
note="reduced grid: 64 px, a third of the nevi, four epochs, bfloat16, on processor cores"
chosen="use=\"$PWD/runs/personalised-tune/selected.toml\""
case $what in
    tune) set -- --set 'axes.strategy.feddpa_f.strategy.local_epochs=1.0' "$@" ;;
    study) set -- --set 'axes.strategy.feddpa_f.strategy.local_epochs=1.0' --set "$chosen" "$@" ;;
    unseen) set -- --set seeds='[0]' --set unseen.steps=25 --set unseen.draws=2 --set "$chosen" "$@" ;;
esac
consilium study "$here/$what.toml" --out "runs/personalised-$what" --set base=base-reduced.toml \
    --set "notes=[\"$note\"]" "$@"
