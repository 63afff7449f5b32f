"""Policies of lerobot behind our contract."""
