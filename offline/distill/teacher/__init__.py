"""The dense model, what it predicts, and how far others are from it."""
