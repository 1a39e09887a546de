#!/usr/bin/env bash
# Repeats the runs of a row of RESULTS.md with all its seeds, and compares all digits.
#
#     EUROSAT=PATH experiments/studies/reproduce.sh ROW [DIR]
#
# ROW is TABLE/VARIANT, such as eurosat32/plain or shapes/recipe, or a TABLE for all of its
# rows; the tables are the files in experiments/results/. EUROSAT is the folder of EuroSAT's
# images, one sub-folder a class. The runs are in DIR/TABLE (runs/reproduce by default); a
# new start resumes them. Exits with 1 if a number differs. With the versions, the processor and
# the number of cores that results/TABLE.json names, no number should differ.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  exit 2
}

here=$(cd "$(dirname "$0")/.." && pwd)
row=${1:-}
table=${row%%/*}
expected=$here/results/$table.json
[[ -n $table && -f $expected ]] \
  || fail "a row is TABLE or TABLE/VARIANT, of the tables $(cd "$here/results" && echo *.json)"
directory=$(realpath -m "${2:-runs/reproduce}")/$table

# The seeds, the cores of a run, and the requested variant, or all variants.
read -r seeds cores variants < <(python - "$expected" "${row#"$table"}" <<'PYTHON'
import json, sys
by_variant = json.load(open(sys.argv[1]))
wanted = sys.argv[2].lstrip("/")
variants = [wanted] if wanted else list(by_variant)
if set(variants) <= set(by_variant):
    seeds = min(len(by_variant[variant]) for variant in variants)
    print(seeds, by_variant[variants[0]][0]["cores"], ",".join(variants))
PYTHON
) || true
[[ -n ${variants:-} ]] || fail "$expected has no ${row#*/}"

configs=$here/../configs
eurosat=(--config.data.source="folder:${EUROSAT:-}" --config.data.stratify=exact)
case $table in
  best) settings=(--config="$configs/best.py" "${eurosat[@]}") ;;
  eurosat32) settings=(--config="$configs/eurosat.py" "${eurosat[@]}" --config.data.image_size=32) ;;
  eurosat32_15) settings=(--config="$configs/eurosat.py" "${eurosat[@]}"
    --config.data.image_size=32 --config.train.epochs=15) ;;
  eurosat64) settings=(--config="$configs/eurosat.py" "${eurosat[@]}") ;;
  shapes) settings=(--config="$configs/default.py") ;;
  *) fail "nobody has said how the table $table is made" ;;
esac
[[ $table == shapes || -d ${EUROSAT:-} ]] || fail "EUROSAT must be the folder of its images"

jobs=$(($(nproc) / cores))
exec python "$here/studies/ablation.py" --grid=all --variants="$variants" --seeds="$seeds" \
  --jobs=$((jobs > 0 ? jobs : 1)) --workdir="$directory" --expect="$expected" "${settings[@]}"
