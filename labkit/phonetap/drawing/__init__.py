"""Drawing PhoneTap's screens."""
