"""Demonstrations for training."""

from cogvla.policy.data.config import DataConfig
from cogvla.policy.data.demonstrations import DemonstrationData
from cogvla.policy.data.sampling import TrainingBatches

__all__ = ["DataConfig", "DemonstrationData", "TrainingBatches"]
