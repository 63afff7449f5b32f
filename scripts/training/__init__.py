"""Parts of `train_policy`."""
