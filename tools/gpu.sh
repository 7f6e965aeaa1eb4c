#!/usr/bin/env bash
# Everything that we want to know from a GPU, in about seven minutes and without a network: tools/gpu.sh --help
#   tools/gpu.sh [--seconds N] [--only STAGE ...] [--out FOLDER] [--wheels FOLDER] [--rehearse]
# PYTHON names the interpreter (python3), which has torch and Triton. Wheels of what it lacks (hydra-core, omegaconf,
# antlr4-python3-runtime, flash-linear-attention, fla-core; all pure Python) lie in a folder that git ignores:
#   pip wheel --no-deps -w .wheels hydra-core omegaconf antlr4-python3-runtime==4.9.3 flash-linear-attention fla-core
# Without Hydra's, the stages of kernels run all the same. No setting of the card is changed.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT

arguments=()
while (($#)); do
    if [[ $1 == --wheels ]]; then
        "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$2"/*.whl
        shift 2
    else
        arguments+=("$1")
        shift
    fi
done

# the checkout is the package, whatever its folder is called and whatever else is installed under the name
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
if "$python" -c 'import hydra' 2>/dev/null; then
    ln -s "$root" "$site/mixerzoo"
else # then the package cannot be imported whole, but its kernels can
    mkdir "$site/mixerzoo"
    echo "__path__ = ['$root']" >"$site/mixerzoo/__init__.py"
fi
cd "$root"
"$python" -P -m mixerzoo.tools.gpu ${arguments[@]+"${arguments[@]}"}
