# Sourced by the scripts in this folder: installs what a build needs and says so, and sets one target directory for all of them.
# Nothing here is needed to use cargo by hand; it only makes the build quicker.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '\033[1m== %s\033[0m\n' "$*"; }

install() { # install PACKAGE WHAT: installs a Debian package and says what for
  local sudo=""
  [ "$(id -u)" = 0 ] || sudo="sudo"
  say "installing $1 ($2)"
  $sudo apt-get update -qq && DEBIAN_FRONTEND=noninteractive $sudo apt-get install -y -qq --no-install-recommends "$1" >/dev/null
}

need() { # need COMMAND PACKAGE: installs PACKAGE when COMMAND is missing
  command -v "$1" >/dev/null 2>&1 || install "$2" "provides $1"
}

command -v cargo >/dev/null 2>&1 || { echo "error: cargo not found; install Rust 1.95 or later first (rustup)" >&2; exit 2; }
need cc build-essential
need mold mold
need python3 python3

# One flag set for every script: a different one would build all dependencies again.
export RUSTFLAGS="-C link-arg=-fuse-ld=mold"
# Outside the clone, so that a fresh clone reuses what an older one has built.
export CARGO_TARGET_DIR="${SIMULACRO_TARGET_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/simulacro/target}"
export CARGO_TERM_COLOR="${CARGO_TERM_COLOR:-auto}"
