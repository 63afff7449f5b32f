"""Bridge between a robot and a cogvla policy server, as a ROS 2 lifecycle node."""
