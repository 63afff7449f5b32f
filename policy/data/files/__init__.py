"""The files of a LeRobotDataset: metadata, columns, videos, and which frame is where."""
