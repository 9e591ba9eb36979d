# Sourced by every script here: a temporary folder that is removed at the end, an environment in it, and two commands.
#
#   install PACKAGE==VERSION …   puts packages from PyPI into that environment
#   run                          runs the Python program on standard input in that folder
#
# The program calls `finding.report`, which prints what was expected and what is seen, and fails when the behaviour has
# changed. The interpreter is python3, or the one that the variable PYTHON names.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/env"
export PATH="$work/env/bin:$PATH" PYTHONPATH="$work" PYTHONNOUSERSITE=1 HF_HOME="$work/hf" HF_HUB_OFFLINE=1
cd "$work"

install() {
    pip install --quiet --quiet --disable-pip-version-check "$@"
}

run() {
    python -W ignore -
}

cat > "$work/finding.py" <<'PY'
"""What the programs of the findings share."""

import importlib.metadata
import sys


def report(packages: str, *, expected: object, seen: object, stated: object) -> None:
    """Print versions, expectation and observation; exit with 1 unless `seen` equals `stated`."""
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages.split()))
    print(f"  expected: {expected}")
    print(f"  seen:     {seen}")
    if seen != stated:
        print(f"  CHANGED; until now it was: {stated}")
        sys.exit(1)
PY
