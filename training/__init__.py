"""What train.py is made of: data set, batches, checkpoints, optimizers, log, agreement between processes."""
