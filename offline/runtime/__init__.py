"""What a run stands on: its ranks, its device and its memory."""
