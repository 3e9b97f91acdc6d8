"""Loads a model under a plan into an engine, saves quantized checkpoints, and exports other libraries' formats."""
