#!/bin/sh
# What the tuner study needs: tables without and with the lesions set aside, and a start tuned on the latter.
#   examples/tuners/prepare.sh [reduced]
set -eu
here=$(dirname "$0")
data=${DATA:-$here/../../../shared/data/ham10000}
python "$here/tables.py" "$data/metadata.csv" "$here/made"
if [ "${1:-}" = reduced ]; then
    set -- --set "sites.table=\"made/set-aside-reduced.csv\"" --set backbone.image_size=64
    name=in-domain-reduced
else
    name=in-domain
fi
consilium run "$here/in-domain.toml" --out "runs/$name" --resume "$@"
rm -rf "$here/made/$name"
consilium export "runs/$name" --format timm --out "$here/made/$name" --site "$(ls "runs/$name/sites")"
