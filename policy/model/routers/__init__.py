"""Token routers in the network of a policy: where they stand, what they read and what they remember."""
