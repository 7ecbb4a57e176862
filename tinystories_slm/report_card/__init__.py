"""Report card: measures of the stories that a model generates, beside those of held-out stories."""
