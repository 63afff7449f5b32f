"""The bridge of cogvla as a ROS 2 lifecycle node."""
