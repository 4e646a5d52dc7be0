# Sourced by quickstart and test: a .venv with torch and this checkout in it, and $PY to run it; quick when it is there.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

good_torch() {
    "$1" -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' 2>/dev/null
}

PY="$PWD/.venv/bin/python"
stamp="$PWD/.venv/installed"
key="$(cksum <pyproject.toml)"
if [ ! -x "$PY" ] || [ "$(cat "$stamp" 2>/dev/null)" != "$key" ]; then
    base="${PYTHON:-python3}"
    if [ ! -x "$PY" ]; then
        if good_torch "$base"; then # a torch made for this machine's GPU, say
            "$base" -m venv --system-site-packages .venv || exit 1
        else
            "$base" -m venv .venv || exit 1
        fi
    fi
    install=("$PY" -m pip install -q --disable-pip-version-check)
    if ! good_torch "$PY"; then
        # First and by exact version: a range, or no version, takes a newer release with gigabytes of CUDA packages.
        "${install[@]}" --no-compile torch==2.13.0 || exit 1
        "$PY" -m compileall -q .venv/lib/python3*/site-packages/*/ >/dev/null & # beside the other packages
    fi
    "${install[@]}" -e '.[test]' || exit 1
    wait
    echo "$key" >"$stamp"
fi
