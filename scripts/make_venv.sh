#!/bin/sh
# Makes the virtual environment that `make demo` and `make test` use:  scripts/make_venv.sh [DIRECTORY]
#
#   PYTHON=python3.12       the interpreter to build it on (3.11 or later)
#   TORCH_INDEX=URL         one more package index to look for PyTorch in: the one for its CPU builds, say
#
# A PyTorch with CUDA that the interpreter has already is used as it is.
set -eu
cd "$(dirname "$0")/.."
venv=${1:-.venv}
python=${PYTHON:-python3}
index=${TORCH_INDEX:+--extra-index-url $TORCH_INDEX}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "make_venv.sh: PYTHON=$python is older than Python 3.11, the oldest that is supported" >&2
  exit 1
}
packages=$(mktemp)
trap 'rm -f "$packages"' EXIT
cat requirements/sglang.txt bench/requirements.txt >"$packages"
"$python" - dev >>"$packages" <<'EOF'
"""The requirements of etap-py with an extra, without etap-py itself: the environment imports that from the source tree."""
import re, sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]


def requirements(extra):
    for line in project["optional-dependencies"][extra]:
        own = re.match(r"etap-py\[(.*)\]", line)
        yield from [line] if own is None else (part for name in own[1].split(",") for part in requirements(name))


print(*project["dependencies"], *requirements(sys.argv[1]), sep="\n")
EOF
if "$python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null; then
  "$python" -m venv --system-site-packages "$venv"
  sed -i '/^torch[=>]/d' "$packages"
else
  "$python" -m venv "$venv"
fi
# shellcheck disable=SC2086  # $index is two words or none
"$venv/bin/python" -m pip install -qq $index -r "$packages"
"$venv/bin/python" -m pip install -qq --no-deps -r requirements/sglang-nodeps.txt
"$venv/bin/python" -m pip install -qq --no-deps --no-build-isolation -e integrations/sglang -e bench
