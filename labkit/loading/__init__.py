"""Model and plan in, engine out; and into files: quantized checkpoints, and other libraries' formats in export/."""
