"""The training kit: from manifests of speech to weights in `sparqle_stream/assets`."""
