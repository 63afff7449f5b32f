"""Real robots: the policy server, the control loop and the ROS 2 bridge will live here; nothing does yet."""
