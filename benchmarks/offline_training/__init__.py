"""Train on a machine without a network: pack, run there, unpack; run as `python -m benchmarks.offline_training`."""
