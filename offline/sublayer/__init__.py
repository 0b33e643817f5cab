"""What is done to one sublayer: rotate, smooth, solve, train."""
