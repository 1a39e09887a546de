#!/usr/bin/env bash
# Makes a row of RESULTS.md again, over all its seeds, and compares it to the last digit.
#
#     EUROSAT=PATH experiments/reproduce.sh ROW [DIR]
#
# ROW is TABLE/VARIANT, such as eurosat32/plain or shapes/recipe, or a TABLE for all of its
# rows; the tables are the files in experiments/results/. EUROSAT is the folder of EuroSAT's
# images, one sub-folder a class. The runs go to DIR/TABLE (runs/reproduce by default), and go
# on there if they were interrupted. Exits with 1 if a figure differs: with the versions and
# the number of cores that results/TABLE.json names, none should.
set -euo pipefail

row=${1:?a row, such as shapes/plain}
table=${row%%/*}
variant=${row#"$table"}
directory=${2:-runs/reproduce}/$table
here=$(dirname "$0")
expected=$here/results/$table.json

seeds=$(python -c "import json, sys
print(1 + max(run['seed'] for runs in json.load(open(sys.argv[1])).values() for run in runs))" \
  "$expected")
variants=${variant#/}
variants=${variants:-$(python -c "import json, sys; print(','.join(json.load(open(sys.argv[1]))))" \
  "$expected")}

eurosat() {
  echo --config=configs/eurosat.py --config.data.stratify=exact \
    "--config.data.source=folder:${EUROSAT:?the folder of its images}"
}
case $table in
  eurosat32) settings="$(eurosat) --config.data.image_size=32" ;;
  eurosat64) settings=$(eurosat) ;;
  shapes) settings=--config=configs/default.py ;;
  *) echo "there is no table $table" >&2; exit 2 ;;
esac

# shellcheck disable=SC2086  (the settings are several words)
python "$here/ablation.py" --grid=all --variants="$variants" --seeds="$seeds" --jobs=2 \
  --workdir="$directory" --expect="$expected" $settings
