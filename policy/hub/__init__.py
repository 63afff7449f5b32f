"""Policies and data sets on the Hugging Face hub: download, cards, upload."""
