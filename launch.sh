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
self="${BASH_SOURCE[0]}"
while [ -L "$self" ]; do # by hand: macOS before 12.3 has no readlink -f
    link="$(readlink "$self")"
    case "$link" in /*) self="$link" ;; *) self="$(dirname "$self")/$link" ;; esac
done
root="$(CDPATH='' cd -- "$(dirname "$self")" && pwd -P)"
venv="$root/.venv"
python="${PYTHON:-python3}"
case "$python" in /*) ;; */*) python="$PWD/$python" ;; esac
extra="" # what of pyproject.toml's optional dependencies this command needs
modules="torch numpy hydra omegaconf rich wandb tokenizers safetensors psutil matplotlib"
need() { extra="$extra,$1" modules="$modules $2"; }
if [ "${1:-}" = test ] || [ "${1:-}" = python ]; then
    need dev "pytest hypothesis ruff mypy simpy accelerate plotly jinja2 tensorboard playwright nicegui torchao submitit pyarrow"
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

# Does this Python have everything, and a torch that is new enough? The current folder, where a
# random.py may lie, has no say in it.
has_packages() {
    "$1" - $modules 2>/dev/null <<'PY'
import sys
sys.path[:] = filter(None, sys.path)
from importlib.util import find_spec
if not all(map(find_spec, sys.argv[1:])):
    sys.exit(1)
from importlib.metadata import version
sys.exit(tuple(map(int, version("torch").split(".")[:2])) < (2, 11))
PY
}

# .venv was made for these pins: a stamp says so, and new pins install again. [dev] has all.
is_stamped() { grep -qsxF "$pins" "$venv/ready$extra" "$venv/ready[dev]"; }

# Wait until no other launch sets .venv up. This shell keeps the lock of the open file 9 when Python
# is gone, and loses it when it ends, however that is.
lock_venv() {
    exec 9>>"$root/pyproject.toml" # nothing is written to it
    "$python" -I - <<'PY'
import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("worldsize: another launch is setting up .venv; waiting for it", file=sys.stderr)
    fcntl.flock(9, fcntl.LOCK_EX)
except OSError:  # a file system without locks
    pass
PY
}

new_venv() {
    "$python" -I -m venv --clear "$venv" ||
        die "$python cannot make a virtual environment (Debian: apt install python3-venv)"
}

install_packages() {
    "$venv/bin/python" -I -m pip install --quiet --disable-pip-version-check \
        -c "$root/constraints.txt" -e "$root$extra" >&2 ||
        die "the packages could not be installed; see above"
}

make_venv() {
    "$python" -I -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "$python is $("$python" -V 2>&1); Python 3.10 or newer is needed (PYTHON=... names another)"
    lock_venv
    if ! { is_stamped && has_packages "$venv/bin/python"; }; then
        echo "worldsize: setting up .venv, once (one to three minutes)" >&2
        # stamped, yet not whole: its Python or a package was taken away, and pip may not see it
        if is_stamped || ! "$venv/bin/python" -I -c 'import pip' 2>/dev/null; then new_venv; fi
        install_packages
        has_packages "$venv/bin/python" || { new_venv && install_packages; }
        echo "$pins" >"$venv/ready$extra"
    fi
    exec 9>&-
}

command -v "$python" >/dev/null || die "$python is not on PATH; Python 3.10 or newer is needed"
if ! has_packages "$python"; then
    pins="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)"
    { is_stamped && has_packages "$venv/bin/python"; } || make_venv
    python="$venv/bin/python"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUTF8=1
case "${1:-}" in
test) shift && cd "$root" && exec "$python" -m pytest "$@" ;;
python) shift && exec "$python" "$@" ;;
*) exec "$python" "$root/experiments/start.py" experiments "$@" ;;
esac
