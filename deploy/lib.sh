# Shared by the scripts in deploy/: where things are, and steps that say how long they took. Sourced, not run.
# shellcheck shell=bash
export LANG=C.UTF-8 LC_ALL=C.UTF-8
REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
INFERA_CACHE=${INFERA_CACHE:-${HOME:-/root}/.cache/infera}
DATA=$REPO/.infera
command -v cargo >/dev/null || PATH=$HOME/.cargo/bin:$PATH

note() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }
fail() { note "$*"; exit 1; }

# Cargo's own answer, so that CARGO_TARGET_DIR and .cargo/config.toml both count.
target_dir() {
    cargo metadata --manifest-path "$REPO/Cargo.toml" --no-deps --offline --format-version 1 2>/dev/null |
        sed -n 's/.*"target_directory":"\([^"]*\)".*/\1/p'
}
enough_disk() { # FOLDER MIB WHAT
    local free
    mkdir -p "$1" || fail "cannot write below $1"
    free=$(df -Pm "$1" | awk 'NR == 2 { print $4 }')
    ((free >= $2)) || fail "the disk that holds $1 is full: $free MiB free, $2 MiB needed for $3"
}
clock() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }
