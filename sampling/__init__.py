"""From a checkpoint and text to pictures: the pipeline, and the grids that show them."""
