"""What a checkpoint stores, as tensors and as config.json: weight formats, permutations, proofs."""
