"""Demonstrations for training."""

from cogvla.policy.data.demonstrations import DataConfig, DemonstrationData, TrainingBatches

__all__ = ["DataConfig", "DemonstrationData", "TrainingBatches"]
