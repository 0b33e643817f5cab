"""Measurements that run from a checkout, each as `python -m benchmarks.NAME`. The wheel does not contain them."""
