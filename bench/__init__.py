"""The benchmark of the loss: `make bench` (quick), `make bench-cpu` (beside other libraries)."""
