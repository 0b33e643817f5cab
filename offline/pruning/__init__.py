"""From a weight and the statistics of its input to an order, a mask and the weights that stay."""
