"""Data pipeline: download stories (`sources`), train a `tokenizer`, `prepare` token files, pack windows."""
