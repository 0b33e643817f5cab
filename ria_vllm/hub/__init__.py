"""What goes with a folder to the Hugging Face Hub, and the way there."""
