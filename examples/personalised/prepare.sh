#!/bin/sh
# What the reduced grid needs: the table with a third of the nevi, as in examples/tuners. The full grid needs nothing.
#   examples/personalised/prepare.sh
set -eu
here=$(dirname "$0")
data=${DATA:-$here/../../../shared/data/ham10000}
python "$here/../tuners/tables.py" "$data/metadata.csv" "$here/../tuners/made"
