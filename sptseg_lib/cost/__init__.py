"""What methods cost: counted operations, measured time and memory, and which part of a model takes them."""
