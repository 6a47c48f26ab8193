#!/bin/bash
# Runs the GPU suite and bench from a bundle (`make gpu-bundle`), and prints a short table last.
# Needs torch 2.11 or newer with a CUDA device, NumPy, pandas, scipy, h5py and pytest; everything else is in wheels/.
set -u
cd "$(dirname "$0")"
export OUT="${OUT:-$PWD/out}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
mkdir -p "$OUT" /tmp/annbatch-site
python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/annbatch-site wheels/*.whl || exit 1
export PYTHONPATH="$PWD/python:/tmp/annbatch-site"
row() { printf '| %s | %s |\n' "$1" "$2" >> "$OUT/table.md"; }
printf '| what | result |\n|---|---|\n' > "$OUT/table.md"

python3 -m pytest -q -p no:cacheprovider tests/python/gpu tests/python/test_ops.py tests/python/test_loader.py \
  -k "not scvi and not lightning" 2>&1 | tee "$OUT/suite.log" | tail -40
row suite "$(tail -1 "$OUT/suite.log" | tr -d '=')"

for tool in memcheck racecheck; do
  if command -v compute-sanitizer > /dev/null; then
    compute-sanitizer --tool "$tool" python3 -m pytest -q -p no:cacheprovider tests/python/gpu \
      -k "bits_are_those and (float32 or uint16) and not dense" > "$OUT/$tool.log" 2>&1
    row "compute-sanitizer $tool" "$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$OUT/$tool.log" | tail -1 | tr -d '=')"
  else
    row "compute-sanitizer $tool" "not on this machine"
  fi
done

python3 benches/gpu.py --data "${DATA:-/tmp/annbatch-bench}" "$@" 2>&1 | tee "$OUT/bench.log"
grep '^| ' "$OUT/bench.log" | tail -n +2 >> "$OUT/table.md"
echo
cat "$OUT/table.md"
