"""python -m examples.guard_minilm"""

from .train import main

main()
