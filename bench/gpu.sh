#!/usr/bin/env bash
# All measurements and tests that need a GPU, in three commands of at most nine minutes each, without a network:
#
#   bench/gpu.sh prove OUTDIR [cuda|cpu]      does everything work: smoke test, convolutions, step, GPU tests, ops, memory
#   bench/gpu.sh tune OUTDIR [cuda|cpu]       the captured step, at 32 and 64 pixels; each lever alone; streamed images
#   bench/gpu.sh accuracy OUTDIR [cuda|cpu]   a whole LTAT run with evaluation, then AutoAttack on 1,000 images
#
# cpu is a dry run of this script on small problems. It tests nothing but this script.
#
# The machine must have python3 with torch and triton, and nvcc. Put the other packages of requirements.txt that it
# lacks into carry/wheels beforehand: pip download --no-deps -d carry/wheels NAME... The wheel of pyautoattack has 42 MB
# because of an example checkpoint. To repack the wheel without it:
#
#   python -m wheel unpack -d /tmp/w carry/wheels/pyautoattack-*.whl && rm -r /tmp/w/pyautoattack-*/pyautoattack/examples
#   python -m wheel pack -d carry/wheels /tmp/w/pyautoattack-*
#
# accuracy trains on the images in carry/data, which may be zipped: an image folder (train/<class>/*, test/<class>/*) or
# the archive of CIFAR-10. Without it, it trains on the embedded digits. $LTAT_TRAIN_FLAGS are more flags of
# ltat_fast.train, for example "--epochs 50". $LTAT_GIT_REVISION names the commit where there is no .git folder.
#
# OUTDIR gets at most eight files of at most 15 MiB: summary.md (started at once and written part by part), log.txt, and
# the tables, each row as soon as it is known. Each part is a process with a time limit of its own; the next part runs
# even if the last one failed. Exit status: 0 if every part succeeded or was skipped.
set -uo pipefail
command=${1:-} device=${3:-cuda}
if (($# < 2)) || [[ -z $2 || " prove tune accuracy " != *" $command "* || " cuda cpu " != *" $device "* ]]; then
    echo "usage: bench/gpu.sh prove|tune|accuracy OUTDIR [cuda|cpu]" >&2
    exit 2
fi
out=$(realpath -m "$2") || exit
cd "$(dirname "$0")/.." || exit
budget=$([[ $device == cuda ]] && echo 510 || echo 1200)
largest=$((15 << 20))
log=$out/log.txt
summary=$out/summary.md
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out"
: >"$log"
failures=0

note() { # note PART RESULT SECONDS
    echo "| $1 | $2 | $3 |" >>"$summary"
    echo "$1: $2, $3 s"
}

part() { # part NAME SECONDS COMMAND...
    local name=$1 limit=$2 began=$SECONDS left=$((budget - SECONDS)) status result
    shift 2
    [[ $device == cuda ]] || limit=$((4 * limit))
    if ((left < 15)); then
        note "$name" "skipped: no time left" 0
        return 1
    fi
    printf '\n===== %s: %s\n' "$name" "$*" >>"$log"
    # On SIGINT pytest reports its results, bench.step times the rows that it has built, and training saves its state.
    timeout --signal=INT --kill-after=30 $((limit < left ? limit : left)) "$@" >>"$log" 2>&1
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

install() {
    # If nvcc on the PATH is a link or a wrapper, torch guesses a folder without the headers.
    if [[ -z ${CUDA_HOME:-} && -e /usr/local/cuda/include/cuda_runtime.h ]]; then
        export CUDA_HOME=/usr/local/cuda
    fi
    # A scratch virtual environment on top of the machine's own packages, which stay as they are.
    python=$scratch/venv/bin/python
    python3 -m venv --without-pip "$scratch/venv" || exit
    python3 - "$("$python" -c 'import site; print(site.getsitepackages()[0])')/machine.pth" <<'END'
import pathlib, site, sys
lines = "".join(f"import site; site.addsitedir({p!r})\n" for p in site.getsitepackages())
pathlib.Path(sys.argv[1]).write_text(lines)
END
    local pip=("$python" -m pip --disable-pip-version-check install --quiet --no-index --no-deps)
    if compgen -G 'carry/wheels/*.whl' >/dev/null; then
        part "carried wheels" 60 "${pip[@]}" carry/wheels/*.whl
    fi
    if [[ $device == cpu ]] || ! part "build of the extension" 130 \
        env LTAT_REQUIRE_EXT=1 "${pip[@]}" --no-build-isolation --editable .; then
        part "install without the extension" 30 env LTAT_BUILD_EXT=0 "${pip[@]}" --no-build-isolation --editable .
    fi
}

prove() {
    part "doctor" 40 "$python" -m ltat_fast.doctor
    local small=() convs=() graph="+ CUDA graph"
    local others=(reference "torch.compile(reference)" "reference, frozen attack" "+ fused ops and SGD" "+ BN folded"
        "+ channels_last" "+ bf16" "+ torch.compile")
    if [[ $device == cpu ]]; then # a CPU captures no row, and compiling would take most of the time
        small=(--arch smallresnet --image-size 8 --batch-size 8 --attack-steps 1)
        convs=(--arch smallresnet --image-size 8 --batch-sizes 2 4)
        graph="+ bf16" others=(reference "+ channels_last")
    fi
    part "smoke test" 90 "$python" -m bench.smoke --device "$device" "${small[@]}" --out "$out/smoke.txt"
    part "convolutions, ResNet-18 at 32" 50 "$python" -m bench.convs --device "$device" "${convs[@]}" --out "$out/convs.csv"
    local step=("$python" -m bench.step --device "$device" --out "$out/step.csv")
    part "captured step, ResNet-18 at 32" 90 "${step[@]}" "${small[@]}" --rows "$graph"
    part "other steps, ResNet-18 at 32" 120 "${step[@]}" "${small[@]}" --rows "${others[@]}"

    # In four processes if pytest-xdist is installed, because compiling takes most of the time.
    local tests=(env TORCHINDUCTOR_COMPILE_THREADS=2
        "$python" -m pytest -q -m gpu -p no:cacheprovider --continue-on-collection-errors)
    "$python" -c 'import xdist' 2>/dev/null && [[ $device == cuda ]] && tests+=(-n 4)
    # The operators first: everything else uses them.
    part "GPU tests of the operators" 110 "${tests[@]}" tests/ops tests/kernels
    part "operators" 60 "$python" -m bench.ops --device "$device" --quick --out "$out/ops.csv"
    part "GPU tests of the rest" 110 "${tests[@]}" --ignore=tests/ops --ignore=tests/kernels
    local sanitizer
    sanitizer=$(PATH=$PATH:/usr/local/cuda/bin type -P compute-sanitizer)
    if [[ $device == cuda && -n $sanitizer ]]; then
        # Without torch's caching allocator every tensor is its own allocation, and the tool sees where it ends.
        part "memory check of the operators" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            "$sanitizer" --tool memcheck --error-exitcode 99 "$python" -m bench.smoke --device cuda --parts operators
    else
        note "memory check of the operators" "skipped: no $([[ $device == cuda ]] && echo tool || echo GPU)" 0
    fi
}

tune() {
    local problem=() large=(--arch preactresnet18 --image-size 64) all="+ CUDA graph" rows=() row levers lever
    mapfile -t rows < <("$python" -c 'from bench.step import COMPILED, LEVER_ROWS
print(COMPILED, *(name for name, _, _ in LEVER_ROWS), sep="\n")')
    if [[ $device == cpu ]]; then
        problem=(--arch smallresnet --image-size 8 --batch-size 8 --attack-steps 1 --method at-bsl)
        large=("${problem[@]}")
        all="+ bf16" rows=("+ channels_last") # not compiled, so that the dry run takes minutes and not an hour
    fi
    levers=$("$python" -c 'from bench.levers import LEVERS; print(*(f"--{name}" for name in LEVERS))') || exit
    local step=("$python" -m bench.step --device "$device" --out "$out/tune.csv")
    part "all levers" 90 "${step[@]}" "${problem[@]}" --rows "$all"
    for lever in $levers; do
        part "all levers, $lever" 75 "${step[@]}" "${problem[@]}" --rows "$all" "$lever"
    done
    part "all levers, PreActResNet-18 at 64" 90 "${step[@]}" "${large[@]}" --rows "$all"
    local loader=(--images 65536) # 0.8 GB
    [[ $device == cpu ]] && loader=("${problem[@]:0:6}" --images 256 --attack-steps 1 --rounds 1)
    part "streamed images" 75 "$python" -m bench.loader --device "$device" "${loader[@]}" --out "$out/loader.csv"
    for row in "${rows[@]}"; do # each adds one lever to the row before it
        part "$row" 75 "${step[@]}" "${problem[@]}" --rows "$row"
    done
}

accuracy() {
    local run=$scratch/run data=$scratch/data flags archive
    # shellcheck disable=SC2206  # several flags
    flags=(${LTAT_TRAIN_FLAGS:-})
    mkdir -p "$data"
    if [[ -d carry/data ]]; then
        cp -r carry/data/. "$data"
        for archive in "$data"/*.zip; do
            [[ -e $archive ]] && part "unpacking of ${archive##*/}" 30 "$python" -m zipfile -e "$archive" "$data"
        done
    fi
    local tree
    tree=$(find "$data" -type d -name train -printf '%h\n' -quit)
    local dataset=(--dataset digits-lt)
    if [[ -n $tree ]]; then
        dataset=(--dataset imagefolder-lt --data-dir "$tree")
    elif compgen -G "$data/cifar-10*" >/dev/null; then
        dataset=(--dataset cifar10-lt --data-dir "$data")
    fi
    local images=1000 limit=430
    if [[ $device == cpu ]]; then
        images=20 limit=60
        flags+=(--epochs 2 --teacher-epochs 1 --max-steps 4 --attack-steps 2 --limit-eval 50)
    fi
    # The best epoch is selected on held-out training images. They are few; the test set would take too long.
    part "training, selection and evaluation" "$limit" "$python" -m ltat_fast.train --device "$device" "${dataset[@]}" \
        --select-on heldout --eval-every 10 --eval-attacks clean,pgd20 --out "$run" "${flags[@]}"
    keep "$run"
    part "AutoAttack on $images images" 200 "$python" -m ltat_fast.evaluate "$run" --device "$device" --checkpoint best \
        --attacks autoattack --limit-autoattack "$images"
    keep "$run"
}

keep() { # keep RUN: copy its results, and its best weights in pieces that are small enough
    cat "$1"/config.json "$1"/env.json >>"$log" 2>/dev/null
    cp "$1/metrics.jsonl" "$out/metrics.jsonl" 2>/dev/null
    cp "$1/teacher/metrics.jsonl" "$out/teacher-metrics.jsonl" 2>/dev/null
    cp "$1/eval.json" "$out/eval.json" 2>/dev/null
    local best=$1/checkpoints/best.safetensors
    if [[ -e $best ]] && (($(stat -c %s "$best") <= 3 * largest)); then
        split --bytes="$largest" --numeric-suffixes --suffix-length=1 "$best" "$out/best.safetensors."
    fi
}

finish() {
    {
        shopt -s nullglob
        python3 - "$out"/*.csv <<'END'
import csv, sys

COLUMNS = {
    "step": "arch image_size variant median_ms images_per_s speedup tflop_per_s share_of_matmul peak_mb loss note",
    "tune": "arch image_size variant median_ms images_per_s speedup tflop_per_s share_of_matmul peak_mb loss note",
    "ops": "op shape direction launch provider median_ms speedup_over_eager share_of_copy launches",
    "loader": "part placement batches_per_s gb_per_s relative growth_mb",
    "convs": "count batch in_channels out_channels kernel stride height pass median_us tflop_per_s note",
}
for path in sys.argv[1:]:
    name = path.rpartition("/")[2].removesuffix(".csv")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        continue
    columns = COLUMNS[name].split()
    about = {key: rows[0].get(key) for key in ("method", "batch_size", "device", "torch", "git")}
    print(f"\n## {name}\n\n" + ", ".join(f"{key} {value}" for key, value in about.items() if value) + "\n")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        print("| " + " | ".join(row[column] for column in columns) + " |")
END
        if [[ $command == prove ]]; then
            printf '\n## Last lines of the tests\n\n```\n'
            grep -E '^(FAILED|ERROR)|[0-9]+ (passed|failed|skipped|deselected)' "$log" | tail -n 25
            echo '```'
        elif [[ $command == accuracy ]]; then
            printf '\n## Last lines of the log\n\n```\n'
            tail -n 25 "$log"
            echo '```'
        fi
    } >>"$summary"
    rm -f "$out"/*.png # they can be drawn from the tables, and only eight files may come back
    if (($(stat -c %s "$log") > largest)); then
        tail -c "$largest" "$log" >"$scratch/log" && mv "$scratch/log" "$log"
    fi
    echo "$summary"
}

{
    echo "# bench/gpu.sh $command, $(uname -n), $(date -u +%Y-%m-%dT%H:%MZ)"
    echo
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null
    python3 -c 'import platform, torch; print("torch", torch.__version__, "python", platform.python_version())'
    printf '\n| part | result | seconds |\n|---|---|---|\n'
} >"$summary"
install
"$command"
finish
exit $((failures > 0))
