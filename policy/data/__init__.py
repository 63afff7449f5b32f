"""Demonstrations for training."""

from cogvla.policy.data.demonstrations import DataConfig, DemonstrationData
from cogvla.policy.data.sampling import TrainingBatches

__all__ = ["DataConfig", "DemonstrationData", "TrainingBatches"]
