#!/usr/bin/env bash
# Installs MegaFlow and the exact versions of constraints.txt into .venv; `make` calls it before everything else.
#
# .venv/megaflow-installed is written last. It holds the directory, a digest of what the install was made from, and
# the names of everything installed. While these still hold, the script ends at once. Otherwise:
#   - a finished .venv that is whole, but older than setup.py or constraints.txt, is brought up to date where it stands;
#   - a .venv that somebody else made (no such file) and whose python and pip work is installed into as it is;
#   - any other (a killed install, a moved directory, missing packages, a removed python) is emptied and made anew.
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

readonly record=.venv/megaflow-installed
readonly inputs=(setup.py constraints.txt pyproject.toml tools/site_packages/{megaflow_lm_eval,torchvision_mend}.{pth,py})
readonly supported='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'

fail() {
    echo "$*" >&2
    exit 2
}

digest() {
    cat "${inputs[@]}" | sha256sum | cut -d ' ' -f 1
}

# Without *.dist-info: their names hold versions, and whoever tries another version of a package in .venv keeps it.
installed_names() {
    find .venv/bin .venv/lib/python3*/site-packages -mindepth 1 -maxdepth 1 ! -name '*.dist-info' -printf '%f\n' 2>/dev/null | LC_ALL=C sort -u
}

python_works() {
    .venv/bin/python -c "$supported" 2>/dev/null && [ -d "$(echo .venv/lib/python3*/site-packages/pip)" ]
}

# The state of .venv: current, outdated (install into it) or broken (make it anew).
state() {
    if ! python_works; then
        echo broken
    elif [ ! -e "$record" ]; then
        echo outdated
    elif [ "$(sed -n 1p "$record")" != "$PWD" ] || [ -n "$(LC_ALL=C comm -23 <(tail -n +3 "$record") <(installed_names))" ]; then
        echo broken
    elif [ "$(sed -n 2p "$record")" != "$(digest)" ]; then
        echo outdated
    else
        echo current
    fi
}

# Prints the interpreter that makes .venv: python3 if its version is supported, else the newest that is.
find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11; do
        if "$name" -c "$supported" 2>/dev/null; then  # run it: a version manager has names on PATH that do not start
            "$name" -c 'import venv, ensurepip' 2>/dev/null \
                || fail "$name ($(command -v "$name")) has no venv module: install it (Debian and Ubuntu: apt install $name-venv), then run make again."
            echo "$name"
            return
        fi
    done
    fail "MegaFlow needs Python 3.11, 3.12 or 3.13, and neither python3 ($(python3 -V 2>&1 || true)) nor python3.13, python3.12, python3.11 is one: install one of them, then run make again."
}

make_environment() {
    local python
    python=$(find_python)
    mkdir -p .venv
    find .venv/ -mindepth 1 -delete  # not rm -rf .venv: it may be a link to a larger disk
    echo unfinished > "$record"
    "$python" -m venv .venv
}

tell_progress() {
    while sleep 20 > /dev/null 2>&1; do
        printf '  %dm %02ds  %s in .venv\n' $((SECONDS / 60)) $((SECONDS % 60)) "$(du -sh .venv/ 2>/dev/null | cut -f 1)"
    done
}

# --use-pep517: the pip of Debian 12 would run deepspeed's setup.py inside .venv, where it looks for compilers.
# The variables pin what pip installs to build packages too (older pips read the first, newer ones the second).
install_packages() {
    echo unfinished > "$record"
    tell_progress 9<&- &
    trap "kill $! 2>/dev/null || true" EXIT
    PIP_USER=0 PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
        .venv/bin/python -m pip install --no-input --disable-pip-version-check --use-pep517 --upgrade-strategy only-if-needed \
        -c constraints.txt -e '.[quickstart,test,parquet]' > .venv/install.log 2>&1 < /dev/null \
        && .venv/bin/python -m pip check --disable-pip-version-check >> .venv/install.log 2>&1
}

export PYTHONNOUSERSITE=1
unset PYTHONPATH PYTHONHOME
PATH=${PATH//"$PWD/.venv/bin:"/}  # an activated .venv must not be the python that makes .venv anew
exec 9< setup.py
flock 9 # two makes at once: the second waits, then finds the work done

found=$(state)
[ "$found" != current ] || exit 0
SECONDS=0
if [ "$found" = broken ]; then
    make_environment
fi
echo "Installing MegaFlow and its packages into .venv: about two minutes and 2 GB (more if your package index brings torch with CUDA)."
if ! install_packages; then
    tail -n 20 .venv/install.log >&2
    fail "The install into .venv failed: the lines above are the end of .venv/install.log; run make again once the cause is gone."
fi
{ echo "$PWD"; digest; installed_names; } > "$record.new"
mv "$record.new" "$record"
echo "Installed in ${SECONDS} s. Commands are in .venv/bin; \`source .venv/bin/activate\` puts them on your PATH."
