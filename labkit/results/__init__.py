"""Records of measurements: read, written, summarized, shown in tables and charts; no torch."""
