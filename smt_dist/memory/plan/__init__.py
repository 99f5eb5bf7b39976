"""Plans: a rank's memory worked out on fake tensors, before a launch."""
