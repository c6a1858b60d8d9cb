"""What the policy says: rollouts, samplers, held-out accuracy, leaks of the hint."""
