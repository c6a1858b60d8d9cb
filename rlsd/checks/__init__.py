"""Against the specification and the clock: validation, measurement, benchmark."""
