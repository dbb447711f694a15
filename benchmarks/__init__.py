"""Side-by-side speed: each file compares on the same work in one run and prints ratios. `make bench` runs them all."""
