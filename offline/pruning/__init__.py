"""From a weight and the statistics of its input to a channel order, a mask and the kept weights."""
