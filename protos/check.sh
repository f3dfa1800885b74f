#!/usr/bin/env bash
# Checks the protocol: lint, no breaking change since the base commit, generated code current. Needs buf and python on PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "buf lint"
buf lint

# The base is where this branch left the published main, or on main itself the commit before; PROTO_BASE names another.
base=${PROTO_BASE:-}
if [[ -z $base ]]; then
    head=$(git rev-parse --verify --quiet HEAD || true)
    base=$(git merge-base HEAD origin/main 2>/dev/null || true)
    if [[ -z $base || $base == "$head" ]]; then
        base=$(git rev-parse --verify --quiet HEAD~1 || true)
    fi
fi
if [[ -n $base ]] && git cat-file -e "$base:protos" 2>/dev/null; then
    echo "buf breaking, against $(git rev-parse --short "$base")"
    git archive "$base" protos buf.yaml | tar -x -C "$work"
    buf breaking --against "$work"
else
    echo "buf breaking: skipped, there is no earlier commit with protos"
fi

echo "generated code is current"
mkdir "$work/generated"
bash protos/generate.sh python "$work/generated"
if ! diff --recursive --brief --exclude=__pycache__ libs/cortex_common/pb/v1 "$work/generated"; then
    echo "libs/cortex_common/pb/v1 differs from what protos/ generates: run make proto" >&2
    exit 1
fi
