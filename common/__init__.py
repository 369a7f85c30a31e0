"""What every room may use: files written whole or not at all, the machine, FLOPs, plots."""
