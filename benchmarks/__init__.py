"""Measurements that run from a checkout, installed or not; see README.md."""
