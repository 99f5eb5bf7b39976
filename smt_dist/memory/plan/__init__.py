"""Plan a rank's memory on fake tensors, before a launch."""
