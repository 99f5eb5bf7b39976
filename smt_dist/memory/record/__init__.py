"""Record a rank's memory in a run, beside its plan."""
