#!/usr/bin/env bash
# Run everything that needs a GPU in one call: build, GPU tests, benchmarks and a memory check. It takes at most nine
# minutes and needs no network.
#
#   bench/gpu.sh OUTDIR [cuda|cpu]      cpu: a dry run of this script on small problems
#
# The machine must have python3 with torch and triton, and nvcc. Other missing packages of requirements.txt must be in
# carry/wheels (pip download --no-deps -d carry/wheels ...). OUTDIR receives summary.md, log.txt, and a CSV and a plot of
# each benchmark. Each part has its own time limit, and the next part runs even if a part fails.
# Exit status: 0 if every part succeeded or was skipped.
set -uo pipefail
: "${1:?usage: bench/gpu.sh OUTDIR [cuda|cpu]}"
out=$(realpath -m "$1")
cd "$(dirname "$0")/.." || exit
device=${2:-cuda}
budget=510
log=$out/log.txt
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out"
: >"$log"
failures=0

note() { # note PART RESULT SECONDS
    echo "| $1 | $2 | $3 |" >>"$scratch/parts"
    echo "$1: $2, $3 s"
}

part() { # part NAME SECONDS COMMAND...
    local name=$1 limit=$2 began=$SECONDS left=$((budget - SECONDS)) status result
    shift 2
    if ((left < 15)); then
        note "$name" "skipped: no time left" 0
        return 1
    fi
    printf '\n===== %s: %s\n' "$name" "$*" >>"$log"
    # After SIGINT pytest reports its results so far, and bench.step times the rows that it has built so far.
    timeout --signal=INT --kill-after=40 $((limit < left ? limit : left)) "$@" >>"$log" 2>&1
    status=$?
    case $status in
    0) result=ok ;;
    124 | 137) result="stopped after its time limit" ;;
    *) result="failed, status $status: see log.txt" ;;
    esac
    note "$name" "$result" $((SECONDS - began))
    ((status == 0)) || failures=$((failures + 1))
    return $status
}

# If nvcc on the PATH is a link or a wrapper, torch guesses a CUDA folder without headers.
if [[ -z ${CUDA_HOME:-} && -e /usr/local/cuda/include/cuda_runtime.h ]]; then
    export CUDA_HOME=/usr/local/cuda
fi

# A temporary virtual environment that can import the packages of the machine, but does not change them.
python=$scratch/venv/bin/python
python3 -m venv --without-pip "$scratch/venv" || exit
python3 - "$("$python" -c 'import site; print(site.getsitepackages()[0])')/machine.pth" <<'EOF'
import pathlib, site, sys
pathlib.Path(sys.argv[1]).write_text("".join(f"import site; site.addsitedir({p!r})\n" for p in site.getsitepackages()))
EOF
pip=("$python" -m pip --disable-pip-version-check install --quiet --no-index --no-deps)
if compgen -G 'carry/wheels/*.whl' >/dev/null; then
    part "carried wheels" 60 "${pip[@]}" carry/wheels/*.whl
fi
if ! part "build of the extension" 130 env LTAT_REQUIRE_EXT=1 "${pip[@]}" --no-build-isolation --editable .; then
    part "install without it" 30 env LTAT_BUILD_EXT=0 "${pip[@]}" --no-build-isolation --editable .
fi
part "doctor" 40 "$python" -m ltat_fast.doctor

if [[ $device == cuda ]]; then
    small=(--batch-size 128)
    large=(--arch preactresnet18 --image-size 64 --batch-size 128)
else
    small=(--arch smallresnet --image-size 8 --batch-size 8 --attack-steps 1 --rounds 2)
    large=("${small[@]}" --method at-bsl)
fi
# Test the operators first, because everything else uses them. Use four processes if pytest-xdist is installed, because
# most of the time goes into compilation.
tests=("$python" -m pytest -q -m gpu -p no:cacheprovider)
"$python" -c 'import xdist' 2>/dev/null && [[ $device == cuda ]] && tests+=(-n 4)
part "GPU tests of the operators" 130 "${tests[@]}" tests/ops tests/kernels
part "bench.step, ResNet-18 at 32" 170 "$python" -m bench.step --device "$device" "${small[@]}" \
    --out "$out/step-resnet18-$device.csv"
part "bench.ops" 70 "$python" -m bench.ops --device "$device" --quick --out "$out/ops-$device.csv"
part "GPU tests of the rest" 110 "${tests[@]}" --ignore=tests/ops --ignore=tests/kernels
part "bench.step, PreActResNet-18 at 64" 130 "$python" -m bench.step --device "$device" "${large[@]}" \
    --out "$out/step-preactresnet18-$device.csv"
sanitizer=$(PATH=$PATH:/usr/local/cuda/bin type -P compute-sanitizer)
if [[ $device == cuda && -n $sanitizer ]]; then
    # Without torch's caching allocator every tensor is a separate allocation with an end that the tool can check.
    # Graph captures need that allocator and are excluded.
    part "compute-sanitizer memcheck of the ops" 100 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        "$sanitizer" --tool memcheck --error-exitcode 99 \
        "$python" -m pytest -q -x -m gpu -k "not graph and not captur" -p no:cacheprovider tests/ops
else
    note "compute-sanitizer memcheck of the ops" "skipped: no $([[ $device == cuda ]] && echo tool || echo GPU)" 0
fi

{
    echo "# ltat-fast on $(uname -n), $(date -u +%Y-%m-%dT%H:%MZ)"
    echo
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
    "$python" -c 'import platform, torch; print("torch", torch.__version__, "python", platform.python_version())'
    printf '\n| part | result | seconds |\n|---|---|---|\n'
    cat "$scratch/parts"
    shopt -s nullglob
    "$python" - "$out"/*.csv <<'EOF'
import csv, sys

COLUMNS = {
    "step": ["variant", "median_ms", "images_per_s", "speedup", "tflop_per_s", "share_of_matmul", "peak_mb", "loss", "note"],
    "ops": ["op", "shape", "direction", "launch", "provider", "median_ms", "speedup_over_eager", "share_of_copy", "launches"],
}
for path in sys.argv[1:]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    columns = COLUMNS["ops" if "op" in rows[0] else "step"]
    about = {key: rows[0].get(key) for key in ("arch", "image_size", "batch_size", "method", "device", "torch", "git")}
    print(f"\n## {path.rpartition('/')[2]}\n\n" + ", ".join(f"{key} {value}" for key, value in about.items() if value) + "\n")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(row[column] for column in columns) + " |")
EOF
    printf '\n## Last lines of the tests\n\n```\n'
    grep -E '^(FAILED|ERROR)|[0-9]+ (passed|failed|skipped|deselected)' "$log" | tail -n 25
    echo '```'
} >"$out/summary.md"
echo "$out/summary.md"
exit $((failures > 0))
