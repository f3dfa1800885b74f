#!/usr/bin/env bash
# Generates libs/cortex_common/pb/v1 from protos/cortex/v1. Package cortex.v1 would become the Python module cortex.v1 and collide
# with the SDK `cortex`, so the imports are rewritten to cortex_common.pb.v1.
set -euo pipefail
python=${1:-python}
out=${2:-libs/cortex_common/pb/v1}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
bin=$(dirname "$(command -v "$python")")
PATH="$bin:$PATH" "$python" -m grpc_tools.protoc -I protos --python_out="$work" --grpc_python_out="$work" \
    --mypy_out=quiet:"$work" --mypy_grpc_out=quiet:"$work" protos/cortex/v1/*.proto
mkdir -p "$out"
rm -f "$out"/*_pb2*.py "$out"/*_pb2*.pyi
for file in "$work"/cortex/v1/*; do
    sed -E 's/from cortex\.v1 import/from cortex_common.pb.v1 import/; s/^import cortex\.v1\.([a-z_0-9]+)/import cortex_common.pb.v1.\1/; s/\bcortex\.v1\.([a-z_0-9]+_pb2)\b/cortex_common.pb.v1.\1/g' \
        "$file" > "$out/$(basename "$file")"
done
printf '"""Generated from protos/cortex/v1 by `make proto`; never edited."""\n' > "$out/__init__.py"
