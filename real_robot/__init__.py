"""Run a policy on a real robot: server and clients, control loop with safety limits, ROS 2 and lerobot bridges."""
