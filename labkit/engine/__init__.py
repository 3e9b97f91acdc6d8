"""The one generation loop: prefill, decoding, streaming, batching; everything that answers goes through it."""
