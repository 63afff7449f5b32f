"""Real robots: the policy server and its clients, and the control loop with its safety limits."""
