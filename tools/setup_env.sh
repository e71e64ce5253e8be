#!/usr/bin/env bash
# Makes the virtual environment that `make demo`, `make test` and `make lint` use. It can be run
# again, also after an interrupt: it keeps the parts that work, and makes incomplete parts again.
#
#   STACK       onedl (default) or openmmlab: which OpenMMLab packages
#   VENV        folder of the environment; default: .venv, or .venv-openmmlab with STACK=openmmlab
#   PYTHON      interpreter to make it from: 3.10, 3.11 or 3.12
#   TORCH_SPEC  arguments for `pip install` that install torch, or `keep` for the torch that PYTHON
#               has; default: the torch that VENV already has, or torch==2.13.0 in a new VENV
#   MAX_JOBS    number of compilers that build mmcv at the same time; default: one per core
# pip's own settings (PIP_FIND_LINKS, PIP_INDEX_URL, ...) are honoured.
set -euo pipefail

say() { printf 'setup: %s\n' "$*"; }
fail() {
  printf 'setup: error: %s\n' "$*" >&2
  exit 1
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$(pwd -P)
stack=${STACK:-onedl}
case $stack in
  onedl) mmcv=onedl-mmcv venv=${VENV:-.venv} ;;
  openmmlab) mmcv=mmcv venv=${VENV:-.venv-openmmlab} ;;
  *) fail "unknown STACK '$stack': expected onedl or openmmlab" ;;
esac
py=$venv/bin/python
jobs=${MAX_JOBS:-$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)}
unset PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_USER=0

needed='Python 3.10 to 3.12 is needed'
supported() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

version_of() { "$1" --version 2>&1 | tail -n 1; }

find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    command -v "$PYTHON" >/dev/null || fail "PYTHON=$PYTHON is not there"
    supported "$PYTHON" || fail "$needed, and PYTHON=$PYTHON is: $(version_of "$PYTHON")"
    command -v "$PYTHON"
    return
  fi
  for candidate in python3 python3.12 python3.11 python3.10 python; do
    if supported "$candidate"; then
      command -v "$candidate"
      return
    fi
  done
  fail "$needed, and none is on the PATH (python3 is: $(version_of python3)). Set PYTHON"
}

make_venv() {
  local options=() base
  [ -z "${PYTHON:-}" ] || base=$(find_python)
  if "$py" -c 'import sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null; then
    supported "$py" || fail "$needed, and $venv is: $(version_of "$py"). Remove it, or set VENV"
    [ -z "${PYTHON:-}" ] || [ "$(version_of "$base")" = "$(version_of "$py")" ] ||
      fail "PYTHON is $(version_of "$base"), and $venv is $(version_of "$py"). Remove it, or set VENV"
    return
  fi
  base=$(find_python)
  if [ -e "$venv/pyvenv.cfg" ]; then
    options+=(--clear)
  elif [ -n "$(find "$venv" -type f 2>/dev/null | head -n 1)" ]; then
    fail "$venv is no virtual environment, and not empty. Set VENV"
  fi
  [ "${TORCH_SPEC:-}" != keep ] || options+=(--system-site-packages)
  say "making $venv with $base ($(version_of "$base"))"
  "$base" -m venv --without-pip ${options[@]+"${options[@]}"} "$venv" ||
    fail "$base can't make a virtual environment"
}

# A pip that is killed leaves packages without their list of files, or with files missing, and then
# regards them as installed. Removing their metadata makes pip install them again. The command `pip`,
# without which an activated environment would use another Python's, is not made by ensurepip.
repair() {
  "$py" - <<'PY'
import csv, shutil, sys, sysconfig
from pathlib import Path

site = Path(sysconfig.get_path('purelib'))
for remnant in site.glob('~*'):
    shutil.rmtree(remnant, ignore_errors=True)
for info in site.glob('*.dist-info'):
    record = info / 'RECORD'
    if record.exists():
        files = (row[0] for row in csv.reader(record.open(encoding='utf-8')) if row)
        if all((site / file).exists() for file in files if not file.endswith('.pyc')):
            continue
    print(f'setup: {info.name.removesuffix(".dist-info")} is incomplete: installing it again', flush=True)
    shutil.rmtree(info)
    Path(sys.prefix, '.setup-stamp').unlink(missing_ok=True)
pip = Path(sysconfig.get_path('scripts'), 'pip')
if not pip.exists():
    pip.write_text('#!/bin/sh\nexec "$(dirname "$0")/python" -m pip "$@"\n')
    pip.chmod(0o755)
PY
  "$py" -m pip --version >/dev/null 2>&1 || "$py" -m ensurepip --upgrade >/dev/null ||
    fail "$venv has no pip, and ensurepip failed (on Debian: install python3-venv)"
}

installed() { # prints the version of a distribution, fails without one
  "$py" -c 'import sys, importlib.metadata as m; print(m.version(sys.argv[1]))' "$1" 2>/dev/null
}

refuse_other_stack() {
  local found other
  found=$("$py" saga_mm/stack.py) || exit 1
  case $stack in
    onedl) other=$(grep -E ': (.*, )?mm' <<<"$found" || true) ;;
    openmmlab) other=$(grep -E ': .*onedl-' <<<"$found" || true) ;;
  esac
  [ -z "$other" ] ||
    fail "$venv holds another stack than $stack (import name: package): ${other//$'\n'/, }. Set VENV"
}

install_torch() {
  local spec=${TORCH_SPEC:-torch==2.13.0}
  if [ "$spec" = keep ]; then
    installed torch >/dev/null ||
      fail "TORCH_SPEC=keep, and $venv sees no torch. Remove it, and set PYTHON to one that has torch"
  elif [ -n "${TORCH_SPEC:-}" ] || ! installed torch >/dev/null; then
    # The specification may include options, so it must be split into words.
    # shellcheck disable=SC2086
    "$py" -m pip install $spec || fail "pip could not install $spec"
  fi
}

# This also detects ops that were built for another torch, or without CUDA on a machine with a GPU.
ops_work() {
  "$py" -I - <<'PY'
import torch
from mmcv.ops import nms

device = 'cuda' if torch.cuda.is_available() else 'cpu'
boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 8.0]], device=device)
kept, _ = nms(boxes, torch.tensor([0.9, 0.8], device=device), iou_threshold=0.5)
assert len(kept) == 1, kept
PY
}

has_gpu() { "$py" -W ignore -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; }

check_compiler() {
  local compiler=${CXX:-c++} include
  include=$("$py" -c 'import sysconfig; print(sysconfig.get_path("include"))')
  command -v "$compiler" >/dev/null ||
    fail "mmcv must be compiled, and there is no C++ compiler '$compiler'. Install g++, or set CXX"
  "$compiler" -x c++ -fsyntax-only -I "$include" - <<<'#include <Python.h>' 2>/dev/null ||
    fail "mmcv must be compiled, and $include has no usable Python.h. Install Python's headers (python3-dev)"
  ! has_gpu || command -v nvcc >/dev/null || [ -x "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" ] ||
    fail "mmcv must be compiled for CUDA, without nvcc. Set CUDA_HOME, or CUDA_VISIBLE_DEVICES= for the CPU"
}

show_progress() { # of `pip wheel -v`, whose output goes to the log $1
  local line last=-30
  while IFS= read -r line; do
    printf '%s\n' "$line" >>"$1"
    [[ $line =~ \[([0-9]+)/([0-9]+)\] ]] || continue
    if [ -t 1 ]; then
      printf '\rsetup: %d of %d files compiled, %d s ' "${BASH_REMATCH[@]:1:2}" $SECONDS
    elif ((SECONDS - last >= 30)); then
      last=$SECONDS
      say "${BASH_REMATCH[1]} of ${BASH_REMATCH[2]} files compiled, $SECONDS s"
    fi
  done
  [ ! -t 1 ] || echo
}

# The source is unpacked into a folder in .cache, so that an interrupted build continues where it
# stopped.
build_mmcv() { # $1: specification, $2: folder for the wheel
  local source log
  source=.cache/build/$(basename "$2")
  log=$source.log
  check_compiler
  say "no wheel of $1 fits: building it, about 12 minutes on 2 cores, longer with CUDA; log: $log"
  mkdir -p "$2" .cache/build
  if [ ! -d "$source" ]; then
    "$py" -m pip download -q --no-deps --no-binary :all: --no-build-isolation -d "$scratch" "$1" ||
      fail "pip could not download the source of $1"
    mkdir "$scratch/source"
    tar -xzf "$scratch"/*.tar.gz -C "$scratch/source" --strip-components 1
    mv "$scratch/source" "$source"
  fi
  : >"$log"
  SECONDS=0
  # --no-build-isolation: pip's isolated build has no torch, without which mmcv silently omits its ops.
  # --use-pep517: otherwise pip deletes the object files after a failure.
  if ! MMCV_WITH_OPS=1 MAX_JOBS=$jobs "$py" -m pip wheel -v --no-deps --no-build-isolation \
    --use-pep517 -w "$scratch" "./$source" 2>&1 | show_progress "$log"; then
    grep -iE 'error|killed' "$log" | tail -n 10 >&2
    fail "building $1 failed; the lines above are from $log"
  fi
  mv "$scratch"/*.whl "$2"
  rm -rf "$source"
}

find_wheel() { # $1: specification, $2: folder for the wheel
  ! compgen -G "$2/*.whl" >/dev/null || return 0
  say "looking for a wheel of $1"
  "$py" -m pip download -q --no-deps --only-binary :all: -d "$scratch" "$1" 2>/dev/null || return 1
  mkdir -p "$2"
  mv "$scratch"/*.whl "$2"
}

install_mmcv() { # $1: specification, $2: folder for the wheel
  find_wheel "$1" "$2" || build_mmcv "$1" "$2"
  "$py" -m pip install --no-deps --force-reinstall "$2"/*.whl
}

install_packages() {
  local spec wheels device=cpu reason=$scratch/reason
  # torch's extension builder needs these. mmcv 2.1.0 needs pkg_resources, which setuptools 82 removed.
  "$py" -m pip install 'setuptools>=77,<81' wheel packaging ninja psutil ||
    fail 'pip could not install the build tools'

  spec=$(sed -n "s/^ *\"\($mmcv==[^\"]*\)\".*/\1/p" pyproject.toml)
  ! has_gpu || device=cuda
  wheels=$("$py" -c 'import sys; print(sys.implementation.cache_tag)')
  wheels=.cache/wheels/$spec-$wheels-torch$torch-$device
  [ "$(installed "$mmcv")" = "${spec#*==}" ] || install_mmcv "$spec" "$wheels"

  printf '%s\n' "torch==$torch" 'setuptools<81' >"$scratch/constraints.txt"
  "$py" -m pip install --no-build-isolation -c "$scratch/constraints.txt" -e ".[$stack,demo,export,docs,dev]" ||
    fail 'pip could not install the packages'

  # The mmcv that was installed may be built for another torch, and so may a wheel that was found.
  ops_work 2>/dev/null || install_mmcv "$spec" "$wheels"
  if ! ops_work 2>"$reason"; then
    say "that wheel's ops don't work with torch $torch: $(tail -n 1 "$reason")"
    rm -r "$wheels"
    build_mmcv "$spec" "$wheels"
    install_mmcv "$spec" "$wheels"
  fi
}

all_installed() { # whether the two packages of this folder and all of their requirements are installed
  "$py" -I - "$root" "$stack" demo export docs dev <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

root, *extras = sys.argv[1:]
for name in ('saga_mm', 'saga_kernels'):
    spec = find_spec(name)
    if spec is None or not Path(spec.origin).resolve().is_relative_to(root):
        sys.exit(f'{name} is not installed from {root}')
for wanted in map(Requirement, requires('saga_mm')):
    if wanted.marker and not any(wanted.marker.evaluate({'extra': extra}) for extra in extras):
        continue
    try:
        found = version(wanted.name)
    except PackageNotFoundError:
        found = None
    if found is None or not wanted.specifier.contains(found, prereleases=True):
        sys.exit(f'{wanted} is needed, and {found} is installed')
PY
}

mkdir -p .cache
if command -v flock >/dev/null; then
  exec 9>.cache/setup.lock
  flock -n 9 || { say 'waiting for another set-up in this folder' && flock 9; }
  rm -rf .cache/tmp.* # left by a set-up that was killed
fi
scratch=$(mktemp -d .cache/tmp.XXXXXX)
trap 'rm -rf "$scratch"' EXIT
trap 'say "interrupted; the next run goes on from here" && exit 130' INT TERM

make_venv
repair
refuse_other_stack
install_torch
torch=$(installed torch)

stamp=$venv/.setup-stamp
wanted="$stack torch-$torch $(cat pyproject.toml setup.py tools/setup_env.sh | cksum)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] ||
  ! all_installed 2>/dev/null || ! ops_work 2>/dev/null; then
  install_packages
  "$py" saga_mm/stack.py >/dev/null || exit 1
  all_installed || fail "$venv is incomplete"
  ops_work || fail "the compiled ops of $mmcv don't work"
  echo "$wanted" >"$stamp"
fi
say "ready: $venv, $(version_of "$py"), torch $torch, $mmcv $(installed "$mmcv") with its ops"
