"""From a checkpoint and text to pictures."""
