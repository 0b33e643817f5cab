"""Stage 1: a Hugging Face model in, a compressed 2:4 checkpoint out."""
