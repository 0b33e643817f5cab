"""The dense model as transformers runs it, with few of its weights in memory."""
