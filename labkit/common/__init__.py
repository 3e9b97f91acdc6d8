"""Shared code that needs no model: errors, files, the machine, processes, messages, actions."""
