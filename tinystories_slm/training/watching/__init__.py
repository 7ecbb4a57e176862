"""What is seen of a run: the screen, metrics.jsonl, pictures, pages, trackers, and what it will need."""
