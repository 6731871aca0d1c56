#!/usr/bin/env bash
# The one door: sets itself up on first use, then hands over to Python.
#   ./launch.sh [OVERRIDES]       train: two ranks, DDP, real text      (--help shows every key)
#   ./launch.sh test [ARGS]       the whole test suite; ARGS go to pytest
#   ./launch.sh generate run=DIR  text from a trained run
#   ./launch.sh score             predictions against published measurements
#   ./launch.sh calibrate to=FILE this machine as a cluster profile
#   ./launch.sh check             a few layouts on this machine, predicted and measured
#   ./launch.sh replay RUN cluster=NAME   a recorded run (trace=true), on another network
#   ./launch.sh simulate [OVERRIDES]      a run on a cluster that you don't have
#   ./launch.sh search [OVERRIDES]        the best of all plans for so many GPUs
#   ./launch.sh debug [NAME]      runs that are broken on purpose, and what finds out (--diagnose)
#   ./launch.sh lab nodes=4 rate=1gbit    many nodes on this machine, over links that slow (Linux)
#   ./launch.sh export run=DIR out=FILE   its weights as one .safetensors file
#   ./launch.sh compare RUN RUN...        runs side by side: what differs, and what that changed
#   ./launch.sh report RUN...             the same as one HTML file, with timelines
#   ./launch.sh ask [QUESTION]    questions of system design, answered with measured numbers
#   ./launch.sh playground        a local page with sliders: memory, time, timeline
#   ./launch.sh python ARGS       the Python that has the packages
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python3}"
extra="" # what of pyproject.toml's optional dependencies this command needs
modules="torch numpy hydra omegaconf rich wandb tokenizers safetensors psutil matplotlib"
need() { extra="$extra,$1" modules="$modules $2"; }
if [ "${1:-}" = test ] || [ "${1:-}" = python ]; then
    need dev "pytest hypothesis ruff mypy simpy accelerate plotly jinja2 tensorboard playwright nicegui torchao submitit"
else
    if [ "${1:-}" = report ]; then need report "plotly jinja2"; fi
    if [ "${1:-}" = playground ]; then need playground nicegui; fi
    if [[ " $*" == *" logging="*tensorboard* ]]; then need tensorboard tensorboard; fi
    if [[ " $*" == *" hydra/launcher=submitit"* ]]; then need submitit submitit; fi
    if [[ " $*" == *" strategy="*accelerate* || " $*" == *" impl="*accelerate* ]]; then
        need accelerate accelerate
    fi
fi
extra="${extra:+[${extra#,}]}"

die() { echo "launch.sh: $*" >&2; exit 2; }

# Does this Python have everything, and a torch that is new enough?
has_packages() {
    "$1" - $modules 2>/dev/null <<'PY'
import sys, importlib.util as find, importlib.metadata as meta
sys.exit(not all(map(find.find_spec, sys.argv[1:]))
         or tuple(map(int, meta.version("torch").split(".")[:2])) < (2, 11))
PY
}

# Make .venv once; a stamp says for which pins, so that new pins install again. [dev] has all.
make_venv() {
    local stamp="$root/.venv/ready$extra" pins
    pins="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"
    if ! grep -qsxF "$pins" "$stamp" "$root/.venv/ready[dev]"; then
        "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
            die "$python is $("$python" -V 2>&1); Python 3.10 or newer is needed (PYTHON=... names another)"
        echo "worldsize: setting up .venv, once (one to three minutes)" >&2
        "$python" -m venv "$root/.venv" ||
            die "$python cannot make a virtual environment (Debian: apt install python3-venv)"
        "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check \
            -c "$root/constraints.txt" -e "$root$extra" >&2 ||
            die "the packages could not be installed; see above"
        echo "$pins" >"$stamp"
    fi
    python="$root/.venv/bin/python"
}

command -v "$python" >/dev/null || die "$python is not on PATH; Python 3.10 or newer is needed"
has_packages "$python" || make_venv
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1
case "${1:-}" in
test) shift && cd "$root" && exec "$python" -m pytest "$@" ;;
python) shift && exec "$python" "$@" ;;
*) exec "$python" -m experiments "$@" ;;
esac
