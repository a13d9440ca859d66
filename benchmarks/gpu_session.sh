#!/usr/bin/env bash
# One part of a GPU session, for a machine that is lent for minutes:  benchmarks/gpu_session.sh PART
#   tests    tests/gpu                      quick    gpu.py --quick
#   windows, video, wan, lists, vmoba, agent, moa, decode, routed, bam, mip   the full table in parts, each within ten minutes
#   moa_models  tokens a second and memory of whole models (gpu_moa.py), on 8 of their layers
#   bench    masks by backends, forward and backward (attn-plugins bench); what it leaves out, another session takes up
#   sweep    the kernel configurations      all      tests, quick and those parts, one after another
# Output goes to $OUT (default: a new folder of the temporary directory): log, CSV and Markdown of each part.
# PYTHON is the interpreter (default python3). The parts write files of their own; PART=join makes one table of those
# CSV files that lie in $OUT. ATTN_PLUGINS_COMMIT names the commit where the tree has no history.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${OUT:-$(mktemp -d)}
export PYTHONUNBUFFERED=1
mkdir -p "$OUT"

measure() {  # name, arguments of gpu.py
  local name=$1
  shift
  timeout 590 "$PYTHON" benchmarks/gpu.py --minutes 8 --out "$OUT/gpu_$name.csv" "$@" 2>&1 | tee "$OUT/gpu_$name.log"
}

part() {
  case $1 in
    tests)  # most of its time is compiling: in parallel where pytest-xdist is installed
      workers=$("$PYTHON" -c 'import importlib.util as u, os; print(f"-n {min(6, os.cpu_count())}" * bool(u.find_spec("xdist")))')
      # shellcheck disable=SC2086
      timeout 590 "$PYTHON" -m pytest tests/gpu -q $workers -p no:cacheprovider --durations 10 2>&1 | tee "$OUT/tests.log" ;;
    quick) measure quick --quick ;;
    windows) measure windows --only flux 1d ;;
    video) measure video --only hunyuan ;;
    wan) measure wan --only wan dense ;;
    lists) measure lists --only random ;;
    vmoba) measure vmoba --only vmoba ;;
    agent) measure agent --only agent ;;
    moa) measure moa --seconds 1 --only moa ;;
    decode) measure decode --forward-only --only decode ;;
    routed) measure routed --only routed ;;
    bam) measure bam --forward-only --only bam ;;
    mip) measure mip --only mip ;;
    moa_models) timeout 590 "$PYTHON" benchmarks/gpu_moa.py --layers 8 --minutes 8 --out "$OUT/moa_models.csv" 2>&1 | tee "$OUT/moa_models.log" ;;
    bench)
      timeout 590 "$PYTHON" -m attn_plugins.pipelines.cli bench --device cuda --lengths 8k,16k,32k --backward --seconds 1 \
        --resume --minutes 8 --out "$OUT/bench.csv" 2>&1 | tee "$OUT/bench.log" ;;
    sweep) timeout 590 "$PYTHON" benchmarks/gpu.py --sweep 2>&1 | tee "$OUT/sweep.log" ;;
    join) "$PYTHON" -m benchmarks.gpu_suite.join "$OUT"/gpu_{windows,video,wan,lists,vmoba,agent,moa,decode,routed,bam,mip}.csv --out "$OUT/gpu.csv" ;;
    *) echo "unknown part $1: see the head of this file" >&2; return 2 ;;
  esac
}

status=0
parts=${*:-all}
[ "$parts" = all ] && parts="tests quick windows video wan lists vmoba agent moa decode routed bam mip join"
for name in $parts; do
  part "$name" || status=$?
done
echo "output in $OUT, exit status $status"
exit "$status"
