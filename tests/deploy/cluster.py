"""A Ray cluster of this machine with two oracle replicas, in a process of its own.

Prints `ready URL`. Then, for every line on stdin, one line of JSON: what the replicas say about
themselves, by process id. Ends with its stdin.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import sys

import ray
from ray import serve

from deploy.ray_serve import NAME, Scale, application
from sparqle_stream import server, testing
from sparqle_stream.config import EngineConfig, StreamOptions, VadConfig

SLOTS = 4
N_REPLICAS = 2
N_ASKED = 40  # calls go to replicas at random: all of two but once in 10^12
SPOKEN = StreamOptions(vad=VadConfig(kind="off"))


def oracle_engine():
    return testing.oracle_engine(EngineConfig(n_slots=SLOTS, threads=1))


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The address: without it Ray looks for the one that leads to the internet.
    ray.init(
        num_cpus=N_REPLICAS,
        include_dashboard=False,
        configure_logging=False,
        _node_ip_address="127.0.0.1",
        object_store_memory=100 << 20,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    cfg = server.ServerConfig(insecure=True, drain_s=1.0, defaults=SPOKEN)
    scale = Scale(min_replicas=N_REPLICAS, max_replicas=N_REPLICAS, num_cpus=0.1)
    handle = serve.run(application(oracle_engine, cfg, SLOTS, scale), name=NAME)
    tell(f"ready ws://127.0.0.1:{port}")
    for _ in sys.stdin:
        found = {}
        for _ in range(N_ASKED):
            with contextlib.suppress(ray.exceptions.RayError):  # one that was killed
                state = handle.state.remote().result(timeout_s=60)
                found[state["pid"]] = state
        tell(json.dumps(list(found.values())))
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    main()
