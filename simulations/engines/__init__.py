"""Where clients run. Each engine is a Flower Grid."""
