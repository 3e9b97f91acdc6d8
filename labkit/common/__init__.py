"""What every room uses and no model is needed for: errors, files, the machine, processes, messages, actions."""
