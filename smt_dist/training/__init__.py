"""Run the training job, from its flags to its adapter."""
