"""transformers' `from_pretrained` reads compressed folders."""
