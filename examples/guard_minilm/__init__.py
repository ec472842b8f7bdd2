"""A safe/unsafe prompt guard: a pre-trained MiniLM, privately fine-tuned."""
