"""The weight files of a dense model."""
