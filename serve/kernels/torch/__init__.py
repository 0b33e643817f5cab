"""The product by what torch brings along."""
