"""Benchmarks: each module is a command, its result one JSON document with the machine in it.

    python -m bench.accuracy FOLDER...   word error rate, false words on noise, delays
    python -m bench.latency FILE...      delays and compute per chunk at the speed of speech
    python -m bench.report               bench/results/*.json -> docs/performance.md

Progress goes to stderr, the last line of stdout is the result.
"""
