"""Records: a rank's memory as a run uses it, beside its plan."""
