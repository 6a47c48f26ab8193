#!/bin/bash
# Runs the GPU suite and bench from a bundle (`make gpu-bundle`), and prints a short table last.
#
#   PARTS="suite sanitizer bench" bash run.sh [arguments of benches/gpu.py]
#
# Needs torch 2.11 or newer with a CUDA device, NumPy, pandas, scipy, h5py, xarray and pytest, and for the peer cupy and
# numba; everything else is in wheels/ and peer-wheels/.
set -u
cd "$(dirname "$0")"
export OUT="${OUT:-$PWD/out}" PYTHONUNBUFFERED=1
mkdir -p "$OUT"
site=/tmp/annbatch-site peer_site=/tmp/annbatch-peer-site
row() { printf '| %s | %s |\n' "$1" "$2" >> "$OUT/table.md"; }
printf '| what | result |\n|---|---|\n' > "$OUT/table.md"
wants() { [[ " ${PARTS:-suite sanitizer bench} " == *" $1 "* ]]; }
# what does not end says where it stands
tests() { timeout -k 5 "${SUITE_SECONDS:-400}" python3 -m pytest -q -p no:cacheprovider -o faulthandler_timeout=60 -m gpu "$@"; }

nvidia-smi --query-gpu=name,driver_version,pcie.link.gen.current,pcie.link.width.current --format=csv,noheader
python3 -m pip install -q --no-index --no-deps --upgrade --target "$site" wheels/*.whl || exit 1
python3 -m pip install -q --no-index --no-deps --upgrade --target "$peer_site" peer-wheels/*.whl || exit 1
export PYTHONPATH="$PWD/python:$site"

if wants suite; then
  tests --durations=10 tests/python/gpu tests/python/ops/test_device.py tests/python/loader/test_loader.py 2>&1 | tee "$OUT/suite.log" | tail -60
  row suite "$(tail -1 "$OUT/suite.log" | tr -d '=')"
fi

for tool in memcheck racecheck; do
  wants sanitizer || break
  if command -v compute-sanitizer > /dev/null; then
    timeout -k 5 "${SANITIZER_SECONDS:-200}" compute-sanitizer --tool "$tool" --target-processes all python3 -m pytest -q -p no:cacheprovider tests/python/gpu \
      -k "bits_are_those and float32" > "$OUT/$tool.log" 2>&1
    row "compute-sanitizer $tool" "$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$OUT/$tool.log" | tail -1 | tr -d '=');$(
      grep -E '[0-9]+ (passed|failed)' "$OUT/$tool.log" | tail -1 | tr -d '=')"
  else
    row "compute-sanitizer $tool" "not on this machine"
  fi
done

if wants bench; then
  # scverse annbatch has the name of this package: an interpreter that finds that one
  printf '#!/bin/sh\nPYTHONPATH="%s:%s" exec python3 "$@"\n' "$peer_site" "$site" > "$OUT/peer-python"
  chmod +x "$OUT/peer-python"
  timeout "${BENCH_SECONDS:-600}" python3 benches/gpu.py --data "${DATA:-/tmp/annbatch-bench}" --peers "$OUT/peer-python" --ceiling ./ceiling "$@" 2> "$OUT/bench.err" |
    tee "$OUT/bench.log"
  grep -A30 Traceback "$OUT/bench.err"
  grep '^| ' "$OUT/bench.log" | tail -n +2 >> "$OUT/table.md"
fi
rm -f "$OUT/peer-python"
echo
cat "$OUT/table.md"
