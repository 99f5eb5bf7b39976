"""Memory: planned on fake tensors before a launch, recorded during a run, and both compared. One room a file."""
