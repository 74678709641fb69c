"""The mathematics on tensors: head weights, products, decompositions, and rotary pairs. No files."""
