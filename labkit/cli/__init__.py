"""The command ``labkit``: a file for each command, with its arguments and its output; nothing is computed here."""
