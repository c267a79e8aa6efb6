#!/bin/sh
# Make a virtual environment with pip: sh scripts/environment.sh FOLDER
# Needs Python 3.11 to 3.13 and nothing else; $PYTHON names an interpreter, left out: the first that suits.
set -eu
folder=$1

suits() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() {
    for candidate in ${PYTHON:-python3 python3.12 python3.13 python3.11 python}; do
        if suits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
}

# Debian and Ubuntu keep pip apart from Python. Their own package of it is fetched and unpacked without root.
borrow_pip() {
    command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null || return 1
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    mkdir -p "$scratch/lists/partial" "$scratch/cache/archives/partial"
    options="-qq -o Dir::State::Lists=$scratch/lists -o Dir::Cache=$scratch/cache -o APT::Sandbox::User=root"
    (cd "$scratch" && apt-get $options update && apt-get $options download python3-pip-whl) || return 1
    dpkg-deb -x "$scratch"/python3-pip-whl_*.deb "$scratch/unpacked" || return 1
    wheel=$(echo "$scratch"/unpacked/usr/share/python-wheels/pip-*.whl)
    "$python" -m venv --clear --without-pip "$folder" || return 1
    "$folder/bin/python" "$wheel/pip" install --quiet --no-index "$wheel"
}

if "$folder/bin/python" -m pip --version >/dev/null 2>&1; then
    exit 0
fi
if [ -e "$folder" ] && [ ! -f "$folder/pyvenv.cfg" ]; then
    echo "$folder exists and is no virtual environment; name another: make demo VENV=/path/of/a/new/folder" >&2
    exit 1
fi
python=$(find_python)
if [ -z "$python" ]; then
    echo "Consilium needs Python 3.11, 3.12 or 3.13. Tried in vain: ${PYTHON:-python3, python3.12, python3.13, python3.11}." >&2
    echo "On Debian or Ubuntu: apt install python3 python3-venv. Elsewhere: make demo PYTHON=/path/to/python3.12" >&2
    exit 1
fi
echo "Making $folder with $("$python" --version)"
if "$python" -m venv --clear "$folder" >/dev/null 2>&1 || borrow_pip; then
    exit 0
fi
rm -rf "$folder"
echo "$python can make no environment with pip. On Debian or Ubuntu: apt install python3-venv" >&2
exit 1
