"""Plan memory before a launch, record it in a run, and compare both.

Plans run on fake tensors.
"""
