# shellcheck shell=sh
# Sourced by the scripts beside it. `environment LEVEL` makes .venv in the checkout ready, or returns at once if
# it is. LEVEL is what has to be in it: 1 to run, 2 to test and lint as well, 3 to drive a browser as well.
#
# .venv/cosearch.stamp says what was installed from which pyproject.toml and constraints.txt, and is written
# last: without it, an environment that these scripts made is made again. One that somebody else made is
# installed into and never removed.

root=$(dirname -- "$(dirname -- "$(readlink -f -- "$0")")")
venv=$root/.venv

say() {
    printf 'cosearch: %s\n' "$*" >&2
}

fail() {
    say "$@"
    exit 2
}

environment() {
    level=$1
    wanted="$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum) $root"
    if ready; then return; fi
    find_python
    mkdir -p "$venv"
    # The lock belongs to this shell's open file, so that it outlives the python that takes it and ends with
    # the last process of the set-up, however that ends.
    exec 9>"$venv/cosearch.lock"
    if ! lock LOCK_NB; then
        say "another set-up of .venv is running; waiting for it"
        lock LOCK_EX
    fi
    if ! ready; then install; fi
    exec 9>&-
}

ready() {
    [ -x "$venv/bin/python" ] && [ -f "$venv/cosearch.stamp" ] || return 1
    read -r installed from <"$venv/cosearch.stamp" || return 1
    [ "$from" = "$wanted" ] && [ "$installed" -ge "$level" ]
}

find_python() {
    if [ -n "${PYTHON:-}" ] && ! new_enough "$PYTHON"; then
        say "PYTHON=$PYTHON is no Python of at least 3.11; looking for another"
    fi
    for python in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
        if new_enough "$python"; then return; fi
    done
    fail "no Python of at least 3.11 found. Install one, or name it: PYTHON=/path/to/python $0"
}

new_enough() {
    [ -n "$1" ] && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

lock() {
    "$python" -c "import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.$1)" 2>/dev/null
}

install() {
    if [ -f "$venv/cosearch.stamp" ]; then
        read -r installed _ <"$venv/cosearch.stamp" || installed=1
        if [ "$installed" -gt "$level" ]; then level=$installed; fi
    fi
    if [ -f "$venv/cosearch.made" ] && { [ ! -f "$venv/cosearch.stamp" ] || ! "$venv/bin/python" -c ''; }; then
        say "removing the .venv of a set-up that did not finish"
        find "$venv" -mindepth 1 -maxdepth 1 ! -name cosearch.lock ! -name cosearch.made -exec rm -rf {} +
    fi
    rm -f "$venv/cosearch.stamp"
    if [ ! -x "$venv/bin/python" ]; then
        "$python" -c 'import ensurepip, venv' 2>/dev/null ||
            fail "$python has no venv or no pip. On Debian and Ubuntu: apt install python3-venv"
        : >"$venv/cosearch.made"
        "$python" -m venv "$venv" >&2 || fail "$python could not make $venv"
    fi
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 ||
        fail "$venv has no pip. Run $venv/bin/python -m ensurepip, or remove the folder"
    case $level in
    1) extras= ;;
    2) extras='[dev]' ;;
    *) extras='[dev,browser]' ;;
    esac
    say "installing cosearch$extras into $venv; the first time takes minutes"
    if ! (cd "$root" && .venv/bin/python -m pip install -qq -c constraints.txt -e ".$extras") >&2; then
        # pip put back what was there before, so nothing has to be removed.
        stamp failed
        fail "the set-up of $venv failed; pip says why above"
    fi
    stamp "$wanted"
}

stamp() {
    printf '%s %s\n' "$level" "$1" >"$venv/cosearch.stamp.new"
    mv "$venv/cosearch.stamp.new" "$venv/cosearch.stamp"
}
