"""The command ``labkit``: one file a command, its arguments and what it prints; nothing is computed here."""
