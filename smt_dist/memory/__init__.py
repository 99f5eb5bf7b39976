"""Memory: planned on fake tensors before a launch. One room a file; nothing here reads weights or needs a GPU."""
