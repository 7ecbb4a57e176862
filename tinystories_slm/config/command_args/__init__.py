"""Options of each command. Nothing here imports torch or transformers: `--help` prints without them."""
