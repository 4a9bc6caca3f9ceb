"""A machine as results name it, for pages that are made of them."""

CARD = {
    "cpu": "Example CPU",
    "cpu_flags": [],
    "cores": 2,
    "cores_allowed": 2,
    "threads": 2,
    "memory_gb": 8.0,
    "system": "Linux x86_64",
    "python": "3.11.9",
    "versions": {},
    "commit": "0123456789ab",
    "weights_hash": "",
}
