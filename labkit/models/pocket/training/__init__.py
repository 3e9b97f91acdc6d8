"""Training the pocket model anew; no part of the installed package."""
