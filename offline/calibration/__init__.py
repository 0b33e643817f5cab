"""The calibration run: its text, the activations, and the statistics of what linears read."""
