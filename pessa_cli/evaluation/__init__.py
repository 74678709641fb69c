"""What a model is worth: verification, quality on data, search for a budget, and speed."""
