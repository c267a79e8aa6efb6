#!/bin/sh
# A federation of three hospitals on this machine, by the verbs that engineers type. vienna_dias joins after two rounds;
# vidir_modern's processes are killed in a round and started again. About six minutes on four cores.
#   DATA=../shared/data examples/deployment/run.sh
# Needs `pip install '.[flower]'`, and in $DATA the folders ham10000 and vit_tiny_patch16_224_augreg (docs/results).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
data=$(cd "${DATA:-$here/../../../shared/data}" && pwd)
out=${OUT:-runs/deployment}
port=${PORT:-9092}
export OMP_NUM_THREADS=1 # a thread each: four processes share this machine

mkdir -p "$out"
out=$(cd "$out" && pwd)
sed "s|/data/|$data/|; s|127.0.0.1:9092|127.0.0.1:$port|" "$here/federation.toml" >"$out/federation.toml"
sed "s|/data/|$data/|" "$here/site.toml" >"$out/site.toml"
consilium deploy init "$out/federation.toml" --out "$out/folders" --site-file "$out/site.toml"
cd "$out/folders"

started=""
trap 'kill $started 2>/dev/null || true; wait' EXIT
trap 'exit 1' INT TERM
say() { echo "$(date -u +%H:%M:%S) $*" | tee -a "$out/story.txt"; }
begin() { # name, words of the verb
    name=$1 && shift
    consilium "$@" >>"$out/$name.out" 2>&1 &
    last=$! && started="$started $last" && eval "process_$name=$last"
}
until_said() { # file, text, how often
    until [ "$(grep -c "$2" "$1" 2>/dev/null || true)" -ge "${3:-1}" ]; do
        kill -0 "$last" || { echo "a program ended; see $out/*.out" && exit 1; }
        grep -qs '"state": "failed"' coordinator/status.json && { consilium coordinator status coordinator; exit 1; }
        sleep 1
    done
}
join() { # site, how often it was ready by then
    begin "$1" site join "$1"
    until_said "$out/$1.out" "^ready" "${2:-1}"
    say "$1 is ready"
}

say "the SuperLink starts"
begin coordinator coordinator start coordinator
until_said "$out/coordinator.out" "^ready"
join rosendahl
join vidir_modern
consilium site check rosendahl | tee "$out/check.txt"
say "the run is submitted; vienna_dias is not there yet"
consilium coordinator submit coordinator
until_said coordinator/status.json '"closed": 2'
say "round 2 is closed; vienna_dias joins"
join vienna_dias
until_said "$out/vidir_modern.out" "asked kind=round round=4"
say "vidir_modern is killed in round 4"
kill -9 "$process_vidir_modern"
sleep 1
join vidir_modern 2

consilium coordinator status coordinator --follow
say "the run has ended"
consilium report coordinator/run
for site in rosendahl vidir_modern vienna_dias; do
    consilium site audit-log "$site" | tail -n 1
done
