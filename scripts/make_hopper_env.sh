#!/usr/bin/env bash
# Builds, in DIR, the environment that compiles for Hopper GPUs on a machine without one:
#
#     scripts/make_hopper_env.sh DIR
#
# It is the project with its extra `gpu`, and pytest: 5 GB, of which most are CUDA's
# compiler and libraries, in 1 to 5 minutes. A second call in the same DIR does nothing
# unless this file or pyproject.toml has changed.
set -euo pipefail

needed_gb=10

fail() {
    echo "make_hopper_env: $1" >&2
    exit 1
}

[[ $# == 1 && $1 != -* ]] || fail "usage: scripts/make_hopper_env.sh DIR"
mkdir -p "$1"
directory=$(cd "$1" && pwd)
repository=$(cd "$(dirname "$0")/.." && pwd)
environment_python=$directory/bin/python

stamp=$directory/made_from
made_from=$(cat "$0" "$repository/pyproject.toml" <(echo "$repository") | sha256sum)
if [[ -f $stamp && $(<"$stamp") == "$made_from" ]]; then
    echo "make_hopper_env: $directory is up to date."
    exit 0
fi

[[ -f $directory/pyvenv.cfg || -z $(ls -A "$directory") ]] ||
    fail "$directory holds something else; name a directory to make."
[[ $(uname -s) == Linux ]] || fail "CUDA's compiler is for Linux; this is $(uname -s)."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
    2>/dev/null || fail "$python is not Python 3.11 to 3.13; name one by PYTHON=..."
free_kb=$(df --output=avail -k "$directory" | tail -n 1)
((free_kb >= needed_gb * 1024 * 1024)) ||
    fail "$directory has $((free_kb / 1024 / 1024)) GB left; $needed_gb are needed."

install() {
    "$python" -m pip --python "$environment_python" install --quiet --quiet "$@" ||
        fail "pip could not install: $*"
}

"$python" -m venv --clear --without-pip "$directory"
install --upgrade pip # an old one can take very long to find versions that agree
python=$environment_python
install pytest pytest-xdist hypothesis -e "$repository[gpu,serve-jax]"

JAX_PLATFORMS=cpu "$python" - <<'PYTHON' || fail "$directory can't compile for GPUs."
from jmoe.plan import aot, device

aot.absent_devices(device.H20, 16)
PYTHON
echo "$made_from" >"$stamp"
echo "make_hopper_env: made $directory."
