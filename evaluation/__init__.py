"""What judges pictures: Inception, CLIP, distances, prompts, GenEval's rules."""
