"""Faults on purpose: real processes, real signals, real cables cut. See ``campaign.py``."""
