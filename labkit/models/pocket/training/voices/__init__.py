"""Synthesized speech for training."""
