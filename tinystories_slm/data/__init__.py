"""Data pipeline: sources, filters, raw stories on disk, tokenizer, token files (`prepare`), packing."""
