"""Training: the job, from its flags to its adapter."""
