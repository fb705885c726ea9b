"""The names and forms of the cross-modal attention guide, on top of everything else."""
