"""Side-by-side measurements; run with ``python -m benchmarks.<name>`` from the checkout's root."""
