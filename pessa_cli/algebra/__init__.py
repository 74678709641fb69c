"""The mathematics on tensors: head weights, products, decompositions and rotary pairs. It reads and writes no files."""
