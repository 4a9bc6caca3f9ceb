#!/usr/bin/env bash
# A folder of compressed speech -> an ear and a bridge, on one GPU, in calls of a few minutes each:
# decodes, aligns, distils, adapts, scores, trains the bridge and the judge. The next call goes on where the last one
# stopped.
#
#   training/on_gpu.sh FOLDER [MINUTES]     (default 9)
#
# FOLDER/sources/NAME/manifest.jsonl   speech, packed into FOLDER/packs/NAME; folders may come later
# FOLDER/pieces.json                   what the ear spells with
# FOLDER/ear.safetensors               optional: an ear that finds poor transcripts (skip_poor in the configs)
# FOLDER/distill.toml                  optional: training.distill -> FOLDER/distill
# FOLDER/adapt.toml                    training.adapt -> FOLDER/adapt/ear.safetensors
# FOLDER/joint.toml                    optional: training.joint -> FOLDER/joint/bridge.safetensors
# FOLDER/prefix.toml                   optional: training.prefix -> FOLDER/prefix/prefix.safetensors
# FOLDER/score/NAME/manifest.jsonl     optional: word error rates of greedy CTC into FOLDER/score.jsonl
#
# Paths in the configs are relative to FOLDER. A stage that has ended leaves STAGE.done behind; remove it
# to go on with more steps. Exit status: 0 all is done, 75 the time was not enough (call again), else the error's.
set -uo pipefail
code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "${1:?a folder with sources and configs}" || exit 2
end=$(($(date +%s) + $((60 * ${2:-9}))))
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
export PYTHONPATH="$code:$code/kernels${PYTHONPATH:+:$PYTHONPATH}"
AGAIN=75 # of sysexits.h: try again

left() { echo $((end - $(date +%s))); }

stage() { # NAME COMMAND...: asked to save and stop when the time is over
  local name=$1 status=0
  shift
  [[ -e $name.done ]] && return
  (($(left) > 20)) || exit $AGAIN
  echo "== $name" >&2
  timeout --signal=INT --kill-after=30 $(($(left) - 10)) "$@" || status=$?
  ((status == 124)) && exit $AGAIN
  ((status == 0)) || exit "$status"
  touch "$name.done"
}

packed() { # FOLDER: all of its sources side by side
  local jobs=() source job
  for source in "$1"/*/manifest.jsonl; do
    [[ -e $source ]] || continue
    source=$(basename "$(dirname "$source")")
    [[ -e packs/$source/index.jsonl ]] && continue
    "$python" -m training.prepare pack --resume "packs/$source" "$1/$source" 2>"packs/$source.log" &
    jobs+=("$! $source")
  done
  for job in ${jobs[@]+"${jobs[@]}"}; do
    wait "${job%% *}" || { echo "error: ${job#* }: see $PWD/packs/${job#* }.log" >&2; exit 1; }
  done
}

mkdir -p packs
packed sources
packed score
aligned() {
  local pack
  for pack in sources/*/; do
    "$python" -m training.align "packs/$(basename "$pack")" --ear ear.safetensors --resume \
      --pieces pieces.json --device "$device" || return 1
  done
}
[[ -e ear.safetensors ]] && { aligned || exit 1; }
[[ -e distill.toml ]] && stage distill \
  "$python" -m training.distill distill.toml --work distill --resume --device "$device"
stage adapt "$python" -m training.adapt adapt.toml --work adapt --resume --device "$device"
score() {
  local name
  : >score.jsonl
  for name in score/*/; do
    "$python" -m training.evaluate ear "packs/$(basename "$name")" --weights adapt/ear.safetensors \
      --pieces pieces.json --device "$device" >>score.jsonl || return 1
  done
}
if [[ -d score && ! -e score.done ]]; then
  score || exit 1
  cat score.jsonl
  touch score.done
fi
[[ -e joint.toml ]] && stage joint \
  "$python" -m training.joint joint.toml --work joint --resume --device "$device"
[[ -e prefix.toml ]] && stage prefix \
  "$python" -m training.prefix prefix.toml --work prefix --resume --device "$device"
exit 0
