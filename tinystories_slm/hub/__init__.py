"""Publish a run on the Hugging Face Hub: model card, staging and upload."""
