#!/usr/bin/env bash
# Captions of whatever ffmpeg opens: a file, rtsp://, rtmp://, an HLS list, a sound device.
#
#   examples/ffmpeg_pipe.sh INPUT                            captioned here
#   examples/ffmpeg_pipe.sh INPUT ws://127.0.0.1:8765        captioned by a server
#
# What follows goes to sparqle-stream, for example: --format srt --output talk.srt
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "usage: $0 INPUT [ws://HOST:PORT] [options of sparqle-stream]" >&2
  exit 2
fi
input=$1
shift
command=(sparqle-stream transcribe)
case ${1:-} in
  ws://* | wss://* | http://* | https://*)
    command=(sparqle-stream client "$1")
    shift
    ;;
esac
ffmpeg -nostdin -loglevel error -i "$input" -vn -ac 1 -ar 16000 -f s16le - |
  "${command[@]}" - --input-hz 16000 --input-format s16le "$@"
