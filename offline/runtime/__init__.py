"""What a run stands on: its ranks and its memory."""
