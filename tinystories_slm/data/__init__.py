"""Stories -> tokens -> windows: `sources`, `tokenizer`, `prepare`, `windows`, in this order."""
