"""From a weight and the statistics of its input to a permutation of channels, a mask and the kept weights."""
